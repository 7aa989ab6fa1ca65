"""Puts verl_troll's configuration groups on Hydra's search path, so that ``+troll=default`` works alone.

Hydra imports this module in every Hydra application of the environment, so it imports nothing but Hydra's own
classes, and names the folder of the groups instead of the package, which would import torch.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class VerlTrollSearchPath(SearchPathPlugin):
    """Appends the groups where verl is installed. They come last, so that an application's own take precedence."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folder ``verl_troll/configs``."""
        package = find_spec("verl_troll")
        if package is not None and package.origin is not None and find_spec("verl") is not None:
            search_path.append("verl_troll", f"file://{os.path.dirname(package.origin)}/configs")
