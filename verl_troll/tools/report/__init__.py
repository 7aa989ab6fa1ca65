"""``verl-troll report``: runs of verl compared by arm, on one HTML page that needs nothing beside it.

:mod:`~verl_troll.tools.report.read` reads logs into runs, :mod:`~verl_troll.tools.report.statistics` holds every
number's rule, :mod:`~verl_troll.tools.report.comparison` applies them to arms and learning rates,
:mod:`~verl_troll.tools.report.figures` draws, :mod:`~verl_troll.tools.report.page` writes the page. Needs ``pip install
'verl_troll[report]'``; neither verl nor torch.
"""
