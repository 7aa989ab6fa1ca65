"""Patch: make verl find our training-side class by the name of its rollout.

The serving side has a public registry (``RolloutReplicaRegistry``), the training side only a private table.
Only ``verl_troll.embedded`` applies it, which is part of CPU mode.
"""

from __future__ import annotations

from verl_troll.patches.registry import Patch
from verl_troll.versions import TESTED_VERL


def _install(name: str, training_side: str) -> None:
    from verl.workers.rollout import base

    base._ROLLOUT_REGISTRY[(name, "async")] = training_side  # a dotted path


PATCH = Patch(
    name="verl-rollout-table",
    host="verl",
    versions=TESTED_VERL,
    why="verl has no public way to name a rollout's training-side class.",
    upstream="verl/workers/rollout/base.py: a register() beside get_rollout_class()",
    install=_install,
    replaces={"verl.workers.rollout.base:get_rollout_class": "b82e97bb3ad28dee"},
)
