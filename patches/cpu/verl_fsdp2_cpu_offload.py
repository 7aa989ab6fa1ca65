"""Patch: do not pin host memory for FSDP2's CPU offload if there is no accelerator to copy to.

verl gives every forward-only engine (the reference policy) ``CPUOffloadPolicy(pin_memory=True)``; pinning needs an
accelerator. Applied in CPU mode only (``verl_troll.cpu``).
"""

from __future__ import annotations

import sys

from verl_troll.patches.registry import Patch
from verl_troll.versions import TESTED_VERL

# Once imported, both modules hold the class under its own name.
_VERL_USERS = ("verl.utils.fsdp_utils", "verl.workers.engine.fsdp.transformer_impl")


def _install() -> None:
    import torch.distributed.fsdp as fsdp

    class UnpinnedCPUOffloadPolicy(fsdp.CPUOffloadPolicy):
        """``CPUOffloadPolicy`` that ignores ``pin_memory``."""

        def __init__(self, pin_memory: bool = True) -> None:
            super().__init__(pin_memory=False)

    # verl imports the class by name from this namespace. Importing verl's modules here would add more than a second
    # to the start of every process, most of which build no engine.
    fsdp.CPUOffloadPolicy = UnpinnedCPUOffloadPolicy  # type: ignore[misc]
    for name in _VERL_USERS:
        if name in sys.modules:
            sys.modules[name].CPUOffloadPolicy = UnpinnedCPUOffloadPolicy  # type: ignore[attr-defined]


PATCH = Patch(
    name="verl-fsdp2-cpu-offload",
    host="verl",
    versions=TESTED_VERL,
    why="verl pins memory for every forward-only FSDP2 engine, which raises without an accelerator.",
    upstream="verl/workers/engine/fsdp/transformer_impl.py, _build_fsdp_module: pin_memory only where an accelerator "
    "is available",
    install=_install,
    replaces={"verl.workers.engine.fsdp.transformer_impl:FSDPEngine._build_fsdp_module": "6855699967a0ec5e"},
)
