"""Patch: make a snapshot of FSDP2 weights a copy even if the weights are in host memory.

verl's asynchronous trainer saves the policy at the start of a step and restores it to compute old log-probs in later
mini-batches. For FSDP2 it saves with ``Tensor.cpu()``, which does not copy a parameter that is already on the CPU
(``param_offload``, or CPU mode). The "old" policy is then the new one, every ratio is 1 and no token is projected.
"""

from __future__ import annotations

import functools
from typing import Any

from verl_troll.patches.registry import Patch
from verl_troll.versions import TESTED_VERL


def _install() -> None:
    from verl.utils import fsdp_utils

    original = fsdp_utils.fsdp2_sharded_save_to_cpu

    @functools.wraps(original)
    def fsdp2_sharded_save_to_cpu(model: Any) -> Any:
        state, spec = original(model)
        on_host = {name for name, parameter in model.named_parameters() if parameter.device.type == "cpu"}
        copies = {
            name: (shard.clone() if name in on_host else shard, shard_spec)
            for name, (shard, shard_spec) in state.items()
        }
        return copies, spec

    fsdp_utils.fsdp2_sharded_save_to_cpu = fsdp2_sharded_save_to_cpu


PATCH = Patch(
    name="verl-fsdp2-snapshot",
    host="verl",
    versions=TESTED_VERL,
    why="verl's FSDP2 snapshot does not copy weights in host memory, so the old policy changes with the new one.",
    upstream="verl/utils/fsdp_utils.py, fsdp2_sharded_save_to_cpu: .to('cpu', copy=True), as in its FSDP1 twin",
    install=_install,
    replaces={"verl.utils.fsdp_utils:fsdp2_sharded_save_to_cpu": "5e1356156fc38b8b"},
)
