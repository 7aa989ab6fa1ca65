"""mbridge's models, built from CPU-mode layers."""

from __future__ import annotations

from typing import Any

from mbridge.core import LLMBridge
from mbridge.core.bridge import register_model
from mbridge.models import LLaMABridge, Qwen2Bridge, Qwen3Bridge, Qwen3MoEBridge

from verl_troll.cpu.megatron.layers import decoder_block

__all__ = ["register"]


class _CpuBridge(LLMBridge):
    """Builds the decoder from :func:`~verl_troll.cpu.megatron.layers.decoder_block`, with weights on the CPU."""

    # Tells mbridge that the model takes the virtual pipeline stage as an argument.
    has_vp_stage = True

    def _build_base_config(self, **settings: Any) -> Any:
        # mbridge's models enable fusions that need an accelerator.
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

    def _get_gptmodel_args(self) -> dict[str, Any]:
        # mbridge drops the rotary scaling, or treats any scaling as linear.
        arguments: dict[str, Any] = super()._get_gptmodel_args()
        arguments.pop("seq_len_interpolation_factor", None)
        return {**arguments, **_rope_scaling(self.hf_config.rope_parameters)}


# The only values that Megatron's own scaling supports.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _rope_scaling(rope: dict[str, Any]) -> dict[str, Any]:
    """Megatron GPT arguments for transformers' ``rope_parameters``.

    Raises:
        NotImplementedError: Megatron's GPT does not support the scaling.
    """
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return {}
    if kind == "llama3" and all(rope[name] == value for name, value in _LLAMA3.items()):
        return {"rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    raise NotImplementedError(
        f"Megatron's CPU mode does not support rope_parameters={rope!r}: rope_type must be 'default', or 'llama3' with "
        f"{_LLAMA3}"
    )


class CpuQwen2Bridge(_CpuBridge, Qwen2Bridge):
    """Qwen2."""


class CpuQwen3Bridge(_CpuBridge, Qwen3Bridge):
    """Qwen3."""


class CpuQwen3MoEBridge(_CpuBridge, Qwen3MoEBridge):
    """Qwen3 MoE."""


class CpuLlamaBridge(_CpuBridge, LLaMABridge):
    """Llama."""


BRIDGES = {
    "qwen2": CpuQwen2Bridge,
    "qwen3": CpuQwen3Bridge,
    "qwen3_moe": CpuQwen3MoEBridge,
    "llama": CpuLlamaBridge,
}


def register() -> None:
    """Replace mbridge's own bridges with :data:`BRIDGES`."""
    for model_type, bridge in BRIDGES.items():
        register_model(model_type)(bridge)
