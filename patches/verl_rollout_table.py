"""Patch: make verl find the embedded rollout's training-side class under the rollout name ``hf``.

The serving side has a public registry (``RolloutReplicaRegistry``); the training side has only a private table.
Applied by ``verl_troll.embedded`` only, which CPU mode includes.
"""

from __future__ import annotations

from verl_troll.patches.registry import Patch


def _install() -> None:
    from verl.workers.rollout import base

    base._ROLLOUT_REGISTRY[("hf", "async")] = "verl_troll.embedded.rollout.EmbeddedRollout"


PATCH = Patch(
    name="verl-rollout-table",
    host="verl",
    versions=">=0.9.1,<0.10",
    why="verl has no public way to name a rollout's training-side class.",
    upstream="verl/workers/rollout/base.py: a register() beside get_rollout_class()",
    install=_install,
    replaces={"verl.workers.rollout.base:get_rollout_class": "b82e97bb3ad28dee"},
)
