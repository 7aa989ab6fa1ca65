"""What the report says of inputs that it cannot read."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from pathlib import Path

INSTALL = "pip install 'verl_troll[report]'"
Warn = Callable[[str], None]
"""Prints or keeps a message."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


class ReportError(ValueError):
    """The inputs give no report; the message says why and what to do."""


class ForeignError(ReportError):
    """A file is of another kind; ``note`` says that it is left out."""

    def __init__(self, path: Path, reason: str):
        shown = shown_path(path)
        super().__init__(f"{shown}{reason}")
        self.path = path
        self.note = f"{shown} is left out: it is neither a log of verl's file logger nor a file of collected runs"


def short(value: object) -> str:
    """A value for a message, shortened."""
    try:
        return _SHORT.repr(value)
    except (ValueError, RecursionError):
        return f"{type(value).__name__} too long to show"


def shown_path(path: str | Path) -> str:
    """A path for a message: as it is, if that fits on a line."""
    text = str(path)
    return text if text.isprintable() and len(text) <= 400 else short(text)
