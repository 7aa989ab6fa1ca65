"""A dense reward for the trainer tests: every group of samples has advantages, whatever the model has learnt."""

from __future__ import annotations

from typing import Any


def compute_score(data_source: str, solution_str: str, ground_truth: str, **_: Any) -> float:
    """Share of the first 8 characters whose code is even."""
    return sum(ord(character) % 2 == 0 for character in solution_str[:8]) / 8
