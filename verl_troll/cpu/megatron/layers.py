"""Replacements for the TransformerEngine layers of Megatron's GPT, in plain torch.

Parameters have the same names and sharding as in TransformerEngine's layers, so bridges and checkpoints work unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from verl_troll.cpu.megatron.attention import CausalAttention

__all__ = ["ColumnParallelExperts", "NormedColumnParallelLinear", "RMSNorm", "RowParallelExperts", "decoder_block"]


def _norm_weight(size: int, config: TransformerConfig) -> torch.nn.Parameter:
    weight = torch.nn.Parameter(torch.ones(size, dtype=config.params_dtype))
    # Megatron sums these gradients over tensor-parallel ranks, since each rank sees only some tokens.
    weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return weight


class RMSNorm(torch.nn.Module):
    """Replaces ``TENorm``: root-mean-square norm, with or without sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _norm_weight(hidden_size, config)

    def forward(self, rows: Tensor) -> Tensor:
        """Normalise ``rows`` over the last dimension."""
        return rms_norm(rows, self.weight.shape, self.weight, self.eps)


class NormedColumnParallelLinear(ColumnParallelLinear):
    """Replaces ``TELayerNormColumnParallelLinear``: a norm and a linear layer with sharded outputs."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **others: Any) -> None:
        super().__init__(input_size, output_size, config=config, **others)
        self.layer_norm_weight = _norm_weight(input_size, config)

    def forward(self, rows: Tensor, *others: Any, **more: Any) -> Any:
        """Megatron's ``(output, bias)``."""
        normed = rms_norm(rows, rows.shape[-1:], self.layer_norm_weight, self.config.layernorm_epsilon)
        return super().forward(normed, *others, **more)


class Router(TopKRouter):
    """Megatron's router, without TransformerEngine's matrix product."""

    def gating(self, input: Tensor) -> Tensor:
        """Scores ``[..., experts]`` from ``[..., hidden]``."""
        dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(self.config.moe_router_dtype, input.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return linear(input.to(dtype), self.weight.to(dtype), bias)


class _Experts(torch.nn.Module):
    """One linear layer per local expert (``weight0``, ...); the token dispatcher does all communication."""

    # Sharded dimension of each [outputs, inputs] weight over the experts' tensor-parallel ranks.
    partition_dim: int

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Any,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        tp_comm_buffer_name: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        self.groups = pg_collection
        self.count = num_gemms
        if bias:
            raise NotImplementedError("Megatron's CPU mode only supports experts without a bias")
        shape = [output_size, input_size]
        shape[self.partition_dim] //= pg_collection.expt_tp.size()
        for index in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
            init_method(weight)
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=self.partition_dim, stride=1)
            # Megatron reduces expert gradients over fewer ranks than other gradients.
            weight.allreduce = config.expert_model_parallel_size == 1  # type: ignore[attr-defined]
            self.register_parameter(f"weight{index}", weight)

    def forward(self, rows: Tensor, tokens_per_expert: list[int]) -> tuple[Tensor, None]:
        """Megatron's ``(output, bias)``, for rows sorted by expert."""
        parts = zip(torch.split(rows, tokens_per_expert), self.parameters(), strict=True)
        return torch.cat([linear(part, weight) for part, weight in parts]), None

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Megatron's checkpoint shards: each weight is one of the experts of all ranks."""
        metadata = metadata or {}
        if metadata.get("singleton_local_shards"):
            raise NotImplementedError("Megatron's CPU mode does not support checkpoints with singleton_local_shards")
        experts = self.groups.ep.size() * self.count
        first = self.groups.ep.rank() * self.count
        state = {}
        for index, weight in enumerate(self.parameters()):
            offsets = (*sharded_offsets, (len(sharded_offsets), first + index, experts))
            ((_, shard),) = make_sharded_tensors_for_checkpoint(
                {"weight": weight},
                prefix,
                {"weight": self.partition_dim},
                offsets,
                tp_group=self.groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            ).items()
            # Experts have fewer replicas than other weights.
            shard.replica_id = (*shard.replica_id[:2], self.groups.expt_dp.rank())
            state[f"{prefix}weight{index}"] = shard
        return state


class ColumnParallelExperts(_Experts):
    """Replaces ``TEColumnParallelGroupedLinear``."""

    partition_dim = 0


class RowParallelExperts(_Experts):
    """Replaces ``TERowParallelGroupedLinear``."""

    partition_dim = 1


class _CpuBackend(LocalSpecProvider):
    """The layers for Megatron's feed-forward block."""

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return NormedColumnParallelLinear

    def grouped_mlp_modules(
        self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool
    ) -> tuple[type, MLPSubmodules]:
        return TEGroupedMLP, MLPSubmodules(linear_fc1=ColumnParallelExperts, linear_fc2=RowParallelExperts)


def decoder_block(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, all identical.

    Raises:
        NotImplementedError: the model needs other layers.
    """
    for name, supported in (
        ("normalization", config.normalization == "RMSNorm"),
        ("layernorm_zero_centered_gamma", not config.layernorm_zero_centered_gamma),
        ("multi_latent_attention", not config.multi_latent_attention),
        ("moe_layer_freq", config.num_moe_experts is None or config.moe_layer_freq == 1),
        ("mtp_num_layers", not config.mtp_num_layers),
        ("fp8", not config.fp8),
    ):
        if not supported:
            raise NotImplementedError(f"Megatron's CPU mode does not support {name}={getattr(config, name)!r}")
    backend = _CpuBackend()
    head_norm = RMSNorm if config.qk_layernorm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=NormedColumnParallelLinear,
        core_attention=CausalAttention,
        linear_proj=backend.row_parallel_linear(),
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    mlp = get_mlp_module_spec_for_backend(backend, config.num_moe_experts, moe_grouped_gemm=True)
    if config.num_moe_experts:
        mlp.submodules.router = Router
    layer = TransformerLayerSubmodules(
        self_attention=ModuleSpec(SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention),
        self_attn_bda=get_bias_dropout_add,
        # A router also reads the normalised rows, so the norm cannot be part of a linear layer.
        pre_mlp_layernorm=RMSNorm if config.num_moe_experts else IdentityOp,
        mlp=mlp,
        mlp_bda=get_bias_dropout_add,
    )
    layers = [ModuleSpec(TransformerLayer, submodules=layer)] * get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
