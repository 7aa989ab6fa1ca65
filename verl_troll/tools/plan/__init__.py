"""``verl-troll plan``: what TROLL adds per GPU and per step at a given scale, beside what verl's clipping takes.

Arithmetic alone: no tensor, no GPU and no verl. :mod:`~verl_troll.tools.plan.setting` holds and checks the numbers that
a run is described by, :mod:`~verl_troll.tools.plan.formulas` every formula, :mod:`~verl_troll.tools.plan.report` the
tables. ``tests/tools/test_plan.py`` measures what runs on a small machine beside what the formulas say.
"""
