"""``verl-troll plan``: what TROLL adds per GPU and step at a given scale, compared with verl's clipping.

Arithmetic only: no tensors, no GPU, no verl. :mod:`~verl_troll.tools.plan.setting` describes a run and checks its
numbers, :mod:`~verl_troll.tools.plan.formulas` holds the formulas, :mod:`~verl_troll.tools.plan.number` evaluates and
explains them, :mod:`~verl_troll.tools.plan.report` prints the tables. ``tests/tools/test_plan.py`` compares them with
what can be measured on a small machine.
"""
