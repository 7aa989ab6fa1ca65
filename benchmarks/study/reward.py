"""The study's ``reward.custom_reward_function`` for verl: 1 for a right response, else 0."""

from __future__ import annotations

from typing import Any

from benchmarks.study.tasks import TASKS

MAX_RESPONSE = 256
"""Maximum characters of a response; longer ones count as wrong."""


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **unused: Any
) -> float:
    """Score one response.

    Args:
        data_source: name of the task.
        solution_str: the response as text, without special tokens.
        ground_truth: the problem's ``answer``.
        extra_info: unused.
    """
    return float(len(solution_str) <= MAX_RESPONSE and TASKS[data_source].check(solution_str.strip(), ground_truth))
