"""Compares answers with math-verify, in a process of :mod:`verl_troll.tasks.rewards.worker`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def load() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Import math-verify; returns a function from ``gold`` and ``answer`` to ``equal``."""
    from math_verify import parse, verify

    def compare(question: dict[str, Any]) -> dict[str, Any]:
        try:
            gold = parse(question["gold"], parsing_timeout=None)
            answer = parse(question["answer"], parsing_timeout=None)
            return {"equal": bool(verify(gold, answer, timeout_seconds=None))}
        except Exception:
            # Answers that cannot be parsed or compared are wrong.
            return {"equal": False}

    return compare
