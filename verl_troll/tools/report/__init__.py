"""``verl-troll report``: compares verl runs by arm, on one self-contained HTML page.

:mod:`~verl_troll.tools.report.read` parses logs into runs, :mod:`~verl_troll.tools.report.statistics` defines every
number, :mod:`~verl_troll.tools.report.comparison` computes them per arm and learning rate,
:mod:`~verl_troll.tools.report.figures` draws, :mod:`~verl_troll.tools.report.page` writes the page. Needs ``pip install
'verl_troll[report]'``, but neither verl nor torch.
"""
