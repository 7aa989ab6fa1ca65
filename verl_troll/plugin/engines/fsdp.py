"""verl's FSDP and FSDP2 engine with TROLL. Each rank holds the whole vocabulary; Ulysses splits the tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu
from verl.utils.ulysses import (
    get_ulysses_sequence_parallel_group,
    get_ulysses_sequence_parallel_rank,
    get_ulysses_sequence_parallel_world_size,
)
from verl.workers.engine import FSDPEngineWithLMHead

from verl_troll.core.vocab import VocabShard
from verl_troll.patches import registry, verl_fsdp2_snapshot
from verl_troll.plugin.engines.mixin import TrollEngineMixin
from verl_troll.plugin.layout import TokenLayout

registry.apply(verl_fsdp2_snapshot.PATCH)


class TrollFSDPEngine(TrollEngineMixin, FSDPEngineWithLMHead):
    """verl's FSDP and FSDP2 engine with TROLL."""

    def token_layout(self, shape: tuple[int, int], data: TensorDict, data_format: str) -> TokenLayout:
        """The packed sequence (``thd``; this rank's slice under Ulysses) or padded rows (``bshd``)."""
        input_ids = data["input_ids"]
        row_of = torch.arange(input_ids.values().shape[0], device=input_ids.device)
        group = None
        if data_format == "bshd":
            starts, lengths = input_ids.offsets()[:-1], input_ids.offsets().diff()
            row = torch.arange(lengths.shape[0], device=lengths.device) * shape[1]
            return TokenLayout(
                row_of + torch.repeat_interleave(row - starts, lengths, output_size=row_of.shape[0]), shape, None
            )
        if get_ulysses_sequence_parallel_world_size() > 1:
            group = get_ulysses_sequence_parallel_group()
            row_of = row_of - get_ulysses_sequence_parallel_rank() * shape[1]
            row_of = torch.where((row_of >= 0) & (row_of < shape[1]), row_of, -1)
        return TokenLayout(row_of, shape, group)

    def head_inputs(self, hidden: Tensor) -> tuple[Tensor, str]:
        """Packed or padded, as the batch specifies."""
        packed = tu.get_non_tensor_data(self._micro_batch, key="use_remove_padding", default=True)
        return hidden, "thd" if packed else "bshd"

    def within_head(self, read: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor) -> Tensor:
        """Read inside the head's own forward if FSDP2 wraps the head separately, as it does when the head is not tied.

        There FSDP2 gathers the weight and reduces its gradient; verl calls its fused kernels outside.
        """
        if not isinstance(weight, DTensor):
            return read(hidden, weight)
        head = self.head_module
        head.forward = lambda hidden: read(hidden, head.weight)
        try:
            result: Tensor = head(hidden)
        finally:
            del head.forward
        return result

    @property
    def head_module(self) -> Any:
        """The model's output embedding."""
        model: Any = getattr(self.module, "module", self.module)
        return model.get_output_embeddings()

    def vocab_shard(self, columns: int) -> VocabShard:
        """All columns, none of them padding."""
        return VocabShard.whole(columns)
