"""Where the tokens of a micro-batch lie in the logits that a rank sees: packed, padded, or shared out over ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """Places of packed positions in the logits.

    Attributes:
        place: ``[T]`` int64, the row of the flattened logits that holds each packed position, -1 where another rank
            holds it.
        shape: leading dimensions of the logits, ``(1, N)`` packed or ``(b, s)`` padded.
        group: ranks that share the micro-batch's tokens (context parallel, Ulysses); None where all are here.
    """

    place: Tensor
    shape: tuple[int, int]
    group: dist.ProcessGroup | None

    def local(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Places among ``positions`` of those that lie here, and the rows of these; both int64."""
        rows = self.place[positions]
        if self.group is None:
            return torch.arange(rows.shape[0], device=rows.device), rows
        here = (rows >= 0).nonzero().squeeze(-1)
        return here, rows[here]

    def spread(self, rows: Tensor, values: Tensor) -> Tensor:
        """``values`` at flattened ``rows``, 0 elsewhere, in the leading shape of the logits; differentiable."""
        full = values.new_zeros(self.shape[0] * self.shape[1])
        return full.index_copy(0, rows, values).view(self.shape)

    def gather(self, here: Tensor, values: Tensor, total: int) -> Tensor:
        """``[total, ...]`` integers from each rank's own ``values``, which belong at ``here``.

        One all-reduce where ranks share the tokens: every position has one owner, all others add zero.
        """
        if self.group is None:
            return values
        full = values.new_zeros(total, *values.shape[1:])
        full[here] = values
        dist.all_reduce(full, group=self.group)
        return full
