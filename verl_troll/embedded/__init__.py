"""The rollout ``hf`` (:mod:`verl_troll.embedded.rollout`), on verl's device, an accelerator or the CPU.

It is for tests and for models too small to justify installing vLLM or SGLang. One environment variable, set in every
process of a run, registers it::

    VERL_USE_EXTERNAL_MODULES=verl_troll.embedded

and the configuration group ``+embedded=default`` selects it. CPU mode (:mod:`verl_troll.cpu`) does both.
"""

from __future__ import annotations

import os
from typing import Any

__all__ = ["register"]


def _load_replica() -> type[Any]:
    from verl_troll.embedded.rollout import EmbeddedReplica

    return EmbeddedReplica


def register() -> None:
    """Register the rollout with verl; idempotent.

    Raises:
        verl_troll.patches.registry.PatchError: the patch does not support the installed verl.
    """
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    from verl_troll.patches import registry, verl_rollout_table

    registry.apply(verl_rollout_table.PATCH, "hf", "verl_troll.embedded.rollout.EmbeddedRollout")
    RolloutReplicaRegistry.register("hf", _load_replica)


if __name__ in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(","):
    register()
