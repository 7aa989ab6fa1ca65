"""Imported at the end of ``import verl``: installs the probe as soon as the plugin itself is loaded."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType

PLUGIN = "verl_troll.plugin"


class _AfterPlugin(importlib.abc.MetaPathFinder):
    """Lets the regular finders load the plugin, then installs the probe."""

    def find_spec(
        self, name: str, path: object = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != PLUGIN:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_probe(module: ModuleType) -> None:
            execute(module)
            from tests.trainer import probe

            probe.install()

        spec.loader.exec_module = execute_and_probe  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _AfterPlugin())
