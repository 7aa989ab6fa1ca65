"""mbridge's models, built from the layers of CPU mode."""

from __future__ import annotations

from typing import Any

from mbridge.core import LLMBridge
from mbridge.core.bridge import register_model
from mbridge.models import LLaMABridge, Qwen2Bridge, Qwen3Bridge, Qwen3MoEBridge

from verl_troll.cpu.megatron.layers import decoder_block

__all__ = ["register"]


class _CpuBridge(LLMBridge):  # type: ignore[misc, unused-ignore]
    """Builds the decoder from :func:`~verl_troll.cpu.megatron.layers.decoder_block`, its weights on the CPU."""

    # Read by mbridge: the model takes the virtual pipeline stage as an argument.
    has_vp_stage = True

    def _build_base_config(self, **settings: Any) -> Any:
        # mbridge's models ask for what is fused on an accelerator.
        settings.update(
            use_cpu_initialization=True,
            persist_layer_norm=False,
            masked_softmax_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            gradient_accumulation_fusion=False,
        )
        return super()._build_base_config(**settings)

    def _get_transformer_layer_spec(self, vp_stage: int | None = None) -> Any:
        return decoder_block(self.config, vp_stage)


class CpuQwen2Bridge(_CpuBridge, Qwen2Bridge):  # type: ignore[misc, unused-ignore]
    """Qwen2."""


class CpuQwen3Bridge(_CpuBridge, Qwen3Bridge):  # type: ignore[misc, unused-ignore]
    """Qwen3."""


class CpuQwen3MoEBridge(_CpuBridge, Qwen3MoEBridge):  # type: ignore[misc, unused-ignore]
    """Qwen3 with a mixture of experts."""


class CpuLlamaBridge(_CpuBridge, LLaMABridge):  # type: ignore[misc, unused-ignore]
    """Llama."""


BRIDGES = {
    "qwen2": CpuQwen2Bridge,
    "qwen3": CpuQwen3Bridge,
    "qwen3_moe": CpuQwen3MoEBridge,
    "llama": CpuLlamaBridge,
}


def register() -> None:
    """Put :data:`BRIDGES` in the place of mbridge's own."""
    for model_type, bridge in BRIDGES.items():
        register_model(model_type)(bridge)
