"""Building blocks of this folder's stand-ins: names that can be imported but not used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def names_of(module: str) -> Callable[[str], Any]:
    """A module ``__getattr__`` that returns, for every name, a class that cannot be instantiated."""

    def find(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")

        def refuse(*args: Any, **options: Any) -> Any:
            raise NotImplementedError(f"{module}.{name} is a stand-in (tests/sglang/stand_ins)")

        return type(name, (), {"__new__": refuse, "__module__": module})

    return find
