"""Patch: run verl's Megatron engine with the CPU as Megatron's accelerator.

Applied in CPU mode only, and only if an engine configuration asks for it
(``verl_troll.cpu.megatron.config.CpuMcoreEngineConfig``).
"""

from __future__ import annotations

from collections.abc import Callable

from verl_troll.patches.registry import Patch
from verl_troll.versions import TESTED_VERL


def _install(run_on_cpu: Callable[[type], None]) -> None:
    from verl.workers.engine.megatron.transformer_impl import MegatronEngine

    run_on_cpu(MegatronEngine)


PATCH = Patch(
    name="verl-megatron-engine",
    host="verl",
    versions=TESTED_VERL,
    why="megatron-core hard-codes CUDA as its device. The class itself is changed, because other engines derive from "
    "it and a torch function mode belongs to a thread, so each call must enter it in its own.",
    upstream="megatron-core: one function that names the device, as parallel_state does for the process groups",
    install=_install,
    replaces={
        "verl.workers.engine.megatron.transformer_impl:MegatronEngine": "b41d1ab09b5b5b6e",
        "verl.workers.config.engine:McoreEngineConfig.__post_init__": "b765951a5edb6eb1",
    },
)
