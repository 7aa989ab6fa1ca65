"""``verl-troll report``: compares verl runs by arm, on one self-contained HTML page.

:mod:`~verl_troll.tools.report.read` finds runs under files and folders, :mod:`~verl_troll.tools.report.logs` reads the
formats of logs, :mod:`~verl_troll.tools.report.runs` says what a run is, :mod:`~verl_troll.tools.report.statistics`
defines every number, :mod:`~verl_troll.tools.report.comparison` computes them per arm and learning rate,
:mod:`~verl_troll.tools.report.figures` draws, :mod:`~verl_troll.tools.report.page` writes the page. Needs ``pip install
'verl_troll[report]'``, but neither verl nor torch.
"""
