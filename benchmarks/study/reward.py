"""The study's ``reward.custom_reward_function`` for verl: 1 for a right response, else 0."""

from __future__ import annotations

from typing import Any

from benchmarks.study.tasks import PRETRAINED, TASKS

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
        extra_info: what the reward of reasoning-gym needs; unused by the tasks for models trained from scratch.
    """
    if len(solution_str) > MAX_RESPONSE:
        return 0.0
    if data_source in PRETRAINED:
        # The library is needed by these tasks alone.
        from verl_troll.tasks.rewards import reasoning_gym

        return reasoning_gym.compute_score(data_source, solution_str, ground_truth, extra_info)["acc"]
    return float(TASKS[data_source].check(solution_str.strip(), ground_truth))
