"""``verl-troll plan``: what TROLL adds per GPU and per step at a given scale, beside what verl's clipping takes.

Arithmetic alone: no tensor, no GPU and no verl. :mod:`~verl_troll.tools.plan.setting` describes a run and checks its
numbers, :mod:`~verl_troll.tools.plan.formulas` has the formulas, :mod:`~verl_troll.tools.plan.number` what they share
and how they are explained, :mod:`~verl_troll.tools.plan.report` the tables. ``tests/tools/test_plan.py`` measures what
runs on a small machine and compares.
"""
