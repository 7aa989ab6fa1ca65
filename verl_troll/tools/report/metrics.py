"""The metrics that the report shows, by verl's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

REWARDS = ("critic/score/mean", "critic/rewards/mean")
ENTROPY = "actor/entropy"
GRAD_NORM = "actor/grad_norm"
PPO_KL = "actor/ppo_kl"
KL_BEFORE, KL_BEFORE_MAX = "troll/kl_before", "troll/kl_before_max"
KL_AFTER, KL_AFTER_MAX = "troll/kl_after", "troll/kl_after_max"
PROJECTED_SHARE = "troll/projected_share"
SUPPORT_SIZE = "troll/support_size"
OLD_KEPT_MASS, NEW_KEPT_MASS = "troll/old_kept_mass", "troll/new_kept_mass"
STEP_SECONDS = "timing_s/step"
RESPONSE_LENGTH = "response_length/mean"
# Not one of verl's: a trainer logs it under a prefix of its own.
DISTINCT_ANSWERS = "distinct_answers"
SHOWN = frozenset(
    (
        *REWARDS,
        ENTROPY,
        GRAD_NORM,
        PPO_KL,
        KL_BEFORE,
        KL_BEFORE_MAX,
        KL_AFTER,
        KL_AFTER_MAX,
        PROJECTED_SHARE,
        SUPPORT_SIZE,
        OLD_KEPT_MASS,
        NEW_KEPT_MASS,
        STEP_SECONDS,
        RESPONSE_LENGTH,
        DISTINCT_ANSWERS,
    )
)
_HELD_OUT = re.compile(r"val-core/(?P<source>.+?)(?:/(?P<variable>[^/]+))?/mean@(?P<samples>[0-9]+)", re.DOTALL)


def held_out_keys(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The held-out success metric of each data source: the one with most samples, then with the longest name."""
    found: dict[str, tuple[int, str, int, str]] = {}
    for key in metrics:
        match = _HELD_OUT.fullmatch(key)
        if match:
            # Compared as text: Python converts at most 4,300 digits.
            samples = match["samples"].lstrip("0")
            rank = (len(samples), samples, len(key), key)
            found[match["source"]] = max(rank, found.get(match["source"], rank))
    return {source: rank[3] for source, rank in sorted(found.items())}


def is_shown(key: str) -> bool:
    """Whether the report shows a metric."""
    return not SHOWN.isdisjoint(names_of(key)) or (key.startswith("val-core/") and _HELD_OUT.fullmatch(key) is not None)


def names_of(key: str) -> tuple[str, str]:
    """What a metric is found by: its name with and without prefix."""
    return key, key.rsplit("/", 1)[-1]
