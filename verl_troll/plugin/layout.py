"""Which rows of a rank's logits hold which tokens of a micro-batch: packed, padded, or shared by ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """From positions in the packed sequence to rows of the logits.

    Attributes:
        row_of: ``[T]`` int64, the row of the flattened logits that holds each packed position, -1 if another rank
            holds it.
        shape: leading dimensions of the logits, ``(1, N)`` packed or ``(b, s)`` padded.
        group: ranks that share the micro-batch's tokens (context parallel, Ulysses); None if all are here.
    """

    row_of: Tensor
    shape: tuple[int, int]
    group: dist.ProcessGroup | None

    def local(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the ``positions`` that this rank holds, and their rows; both int64."""
        rows = self.row_of[positions]
        if self.group is None:
            return torch.arange(rows.shape[0], device=rows.device), rows
        here = (rows >= 0).nonzero().squeeze(-1)
        return here, rows[here]

    def spread(self, rows: Tensor, values: Tensor) -> Tensor:
        """``values`` at flattened ``rows``, 0 elsewhere, in the leading shape of the logits; differentiable."""
        full = values.new_zeros(self.shape[0] * self.shape[1])
        return full.index_copy(0, rows, values).view(self.shape)

    def gather(self, here: Tensor, values: Tensor, total: int) -> Tensor:
        """``[total, ...]`` integers from each rank's ``values``, which belong at indices ``here``.

        One all-reduce if ranks share the tokens: every position has one owner, all others add zero.
        """
        if self.group is None:
            return values
        full = values.new_zeros(total, *values.shape[1:])
        full[here] = values
        dist.all_reduce(full, group=self.group)
        return full
