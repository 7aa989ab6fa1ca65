"""verl's ``reward.custom_reward_function`` for the quickstart: 1 for the right answer, else 0."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from task import check


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **unused: Any
) -> float:
    """Score of one response.

    Args:
        data_source: which data set the problem is from; there is one.
        solution_str: the response as text, special tokens removed.
        ground_truth: the right last digit.
        extra_info: unused.
    """
    return float(check(solution_str.strip(), ground_truth))
