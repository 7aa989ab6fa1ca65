"""verl's ``reward.custom_reward_function`` for the study: 1 for a right response, else 0."""

from __future__ import annotations

from typing import Any

from benchmarks.study.tasks import TASKS

LONGEST = 256
"""Characters of a response; a longer one is wrong, whatever it says."""


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **unused: Any
) -> float:
    """Score of one response.

    Args:
        data_source: name of the task.
        solution_str: the response as text, special tokens removed.
        ground_truth: the problem's ``answer``.
        extra_info: unused.
    """
    return float(len(solution_str) <= LONGEST and TASKS[data_source].check(solution_str.strip(), ground_truth))
