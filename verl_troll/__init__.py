"""TROLL: trust-region projection of token distributions in place of PPO clipping, as a plugin for verl.

The mathematics is in :mod:`verl_troll.core`, the connection to verl in :mod:`verl_troll.plugin`.
"""

from verl_troll.core.projection import Projection, project

__version__ = "0.1.0"

__all__ = ["Projection", "__version__", "project"]
