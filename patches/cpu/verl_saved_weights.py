"""Patch: the weights that an asynchronous trainer saves to the CPU are a copy.

verl's asynchronous trainers keep the weights of the old policy, train on, and put them back to re-score the next
mini-batch. They save with ``Tensor.cpu()``, which on a CPU returns the live weights themselves: every mini-batch would
be its own old policy, with a ratio of 1. Applied in CPU mode only (``verl_troll.cpu.checkpoint_engine``).
"""

from __future__ import annotations

from typing import Any

from verl_troll.patches.registry import Patch
from verl_troll.versions import TESTED_VERL


def _install() -> None:
    from verl.utils import fsdp_utils

    original = fsdp_utils.fsdp2_sharded_save_to_cpu

    def fsdp2_sharded_save_to_cpu(model: Any) -> tuple[dict[str, tuple[Any, Any]], Any]:
        saved, spec = original(model)
        return {name: (shard.clone(), layout) for name, (shard, layout) in saved.items()}, spec

    # verl's workers import it at each use.
    fsdp_utils.fsdp2_sharded_save_to_cpu = fsdp2_sharded_save_to_cpu


PATCH = Patch(
    name="verl-saved-weights",
    host="verl",
    versions=TESTED_VERL,
    why="verl saves the old policy's weights with Tensor.cpu(), which copies nothing that is on the CPU already.",
    upstream="verl/utils/fsdp_utils.py, fsdp2_sharded_save_to_cpu: clone, as copy_megatron_model_to_cpu does",
    install=_install,
    replaces={
        "verl.utils.fsdp_utils:fsdp2_sharded_save_to_cpu": "5e1356156fc38b8b",
        "verl.experimental.separation.engine_workers:DetachActorWorker._get_strategy_handlers": "60ef996f6bd8a0a8",
    },
)
