"""Weight updates for vLLM's CPU build.

On a CPU, vLLM packs the weights of linear layers for its own kernels and drops the originals, which rules out weight
updates. vLLM calls :func:`keep_weights_reloadable` in each of its processes, through its plugin group
``vllm.general_plugins`` (declared in ``examples/vllm_cpu``).
"""

from __future__ import annotations

from typing import Any

from verl_troll.cpu import is_active


def keep_weights_reloadable() -> None:
    """In CPU mode, make vLLM's linear layers use the live parameters; otherwise do nothing."""
    if is_active():
        from verl_troll.patches import registry
        from verl_troll.patches.cpu import vllm_cpu_linear

        registry.apply(vllm_cpu_linear.PATCH, linear_without_packing)


def linear_without_packing(layer: Any, remove_weight: bool) -> None:
    """Replace vLLM's choice of a matrix product with torch's, on the live parameter.

    Args:
        layer: a vLLM layer with ``weight``.
        remove_weight: vLLM's permission to drop the parameter; ignored.
    """
    import torch

    layer.cpu_linear = torch.nn.functional.linear
