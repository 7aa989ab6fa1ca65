"""Imports modules of ``examples/quickstart``, which is a folder of scripts, not a package."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

_FOLDER = str(Path(__file__).resolve().parents[3] / "examples" / "quickstart")


def quickstart(name: str) -> Any:
    """The quickstart's module ``name``."""
    if _FOLDER not in sys.path:
        sys.path.insert(0, _FOLDER)
    return importlib.import_module(name)
