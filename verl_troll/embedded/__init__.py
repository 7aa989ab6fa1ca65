"""The rollout ``hf`` (:mod:`verl_troll.embedded.rollout`) on the device that verl runs on, an accelerator or the CPU.

It serves tests and models of a size for which installing vLLM or SGLang does not pay. One environment variable, in
every process of a run, makes it known::

    VERL_USE_EXTERNAL_MODULES=verl_troll.embedded

and the configuration group ``+embedded=default`` chooses it. CPU mode (:mod:`verl_troll.cpu`) has both already.
"""

from __future__ import annotations

import os
from typing import Any

__all__ = ["register"]


def _load_replica() -> type[Any]:
    from verl_troll.embedded.rollout import EmbeddedReplica

    return EmbeddedReplica


def register() -> None:
    """Make verl know the rollout; idempotent.

    Raises:
        verl_troll.patches.registry.PatchError: the installed verl is none that the patch was written for.
    """
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    from verl_troll.patches import registry, verl_rollout_table

    registry.apply(verl_rollout_table.PATCH, "hf", "verl_troll.embedded.rollout.EmbeddedRollout")
    RolloutReplicaRegistry.register("hf", _load_replica)


if __name__ in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(","):
    register()
