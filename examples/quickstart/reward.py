"""The quickstart's ``reward.custom_reward_function`` for verl: 1 for the right answer, else 0."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from task import check


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **unused: Any
) -> float:
    """Score one response.

    Args:
        data_source: unused; there is only one data set.
        solution_str: the response as text, without special tokens.
        ground_truth: the right last digit.
        extra_info: unused.
    """
    return float(check(solution_str.strip(), ground_truth))
