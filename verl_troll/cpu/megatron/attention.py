"""Causal attention in plain torch, replacing TransformerEngine's ``TEDotProductAttention``.

Shapes: ``s`` tokens of one sequence on this rank, ``b`` sequences, ``t`` tokens of all packed sequences on this rank,
``h`` query heads and ``g`` key heads on this rank, ``d`` head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["CausalAttention"]


class CausalAttention(MegatronModule):
    """Megatron's core attention for padded (bshd) and packed (thd) input, both with context parallelism.

    Under context parallelism every rank gathers the keys and values of whole sequences, where TransformerEngine would
    use a ring. Padding needs no mask: verl pads on the right, which causal attention never sees.

    Args:
        config: must have no attention dropout, sliding window or softmax offset.
        softmax_scale: default ``1 / sqrt(d)``.

    Raises:
        NotImplementedError: the model needs another kind of attention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        for name, supported in (
            ("attention_dropout", not dropout),
            ("window_size", config.window_size is None),
            ("softmax_type", config.softmax_type == "vanilla"),
            ("attention_type", attention_type == "self"),
            ("attn_mask_type", attn_mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)),
        ):
            if not supported:
                raise NotImplementedError(f"Megatron's CPU mode has only plain causal self-attention: {name} is set")
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attention of this rank's tokens; context parallelism adds two collectives per call or packed sequence.

        Args:
            query: ``[s, b, h, d]``, or ``[t, h, d]`` with ``packed_seq_params``.
            key: like ``query``, with ``g`` heads.
            value: like ``key``.
            attention_mask: unused.
            packed_seq_params: Megatron's boundaries of the packed sequences.

        Returns:
            ``[s, b, h * d]`` or ``[t, h * d]``.
        """
        if packed_seq_params is None:
            return self._attend(query, key, value)
        ranks = parallel_state.get_context_parallel_world_size()
        lengths = (packed_seq_params.cu_seqlens_q_padded.diff() // ranks).tolist()
        parts = (torch.split(rows.unsqueeze(1), lengths) for rows in (query, key, value))
        sequences = zip(*parts, strict=True)
        return torch.cat([self._attend(*sequence).squeeze(1) for sequence in sequences])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[s, b, h * d]`` from ``[s, b, h, d]`` and two ``[s, b, g, d]``."""
        key, value = _whole(key), _whole(value)
        positions = torch.arange(len(key), device=key.device)
        visible = positions <= _positions(len(query)).to(key.device)[:, None]
        query, key, value = (rows.permute(1, 2, 0, 3) for rows in (query, key, value))
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=self.scale, enable_gqa=True)
        return mixed.permute(2, 0, 1, 3).flatten(2)


def _positions(length: int) -> Tensor:
    """Positions of this rank's ``length`` tokens in the whole sequence: one chunk from each end."""
    ranks, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    if ranks == 1:
        return torch.arange(length)
    pieces = torch.arange(length * ranks).chunk(2 * ranks)
    return torch.cat([pieces[rank], pieces[2 * ranks - 1 - rank]])


def _whole(rows: Tensor) -> Tensor:
    """All ranks' ``rows`` in sequence order (collective); gradients are summed over the ranks."""
    if parallel_state.get_context_parallel_world_size() == 1:
        return rows
    group = parallel_state.get_context_parallel_group()
    gathered = gather_from_sequence_parallel_region(rows.contiguous(), group=group)
    pieces = gathered.chunk(2 * group.size())
    return torch.cat([*pieces[0::2], *pieces[1::2][::-1]])
