"""A dense reward for the trainer tests: the share of even digits in the answer."""

from __future__ import annotations

from typing import Any


def compute_score(data_source: str, solution_str: str, ground_truth: str, **_: Any) -> float:
    """Share of even digits among the first 8 characters."""
    return sum(character in "02468" for character in solution_str[:8]) / 8
