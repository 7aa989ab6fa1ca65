"""``verl-troll report``: runs of verl compared by arm, on one HTML page that needs nothing beside it.

:mod:`~verl_troll.report.read` reads logs into runs, :mod:`~verl_troll.report.statistics` holds every number's rule,
:mod:`~verl_troll.report.comparison` applies them to arms and learning rates, :mod:`~verl_troll.report.figures` draws,
:mod:`~verl_troll.report.page` writes the page. Needs ``pip install 'verl_troll[report]'``; neither verl nor torch.
"""
