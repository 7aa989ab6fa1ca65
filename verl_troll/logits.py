"""Reading ``[tokens, columns]`` logits in blocks of rows, so that no second tensor of their size is ever held.

Shapes: N packed tokens, C columns, R rows of interest (indices into N).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of logits that are held in working precision at a time (64 MiB in float32).
_BLOCK_ELEMENTS = 1 << 24
# Candidates beyond k among which ties at the k-th place are ordered before a full row is searched.
_TIE_MARGIN = 64


def row_blocks(logits: Tensor, rows: Tensor) -> Iterator[slice]:
    """Slices of ``rows`` whose logits fit the working block."""
    step = max(1, _BLOCK_ELEMENTS // max(1, logits.shape[-1]))
    for start in range(0, rows.shape[0], step):
        yield slice(start, start + step)


def working_dtype(logits: Tensor) -> torch.dtype:
    """float32 for half precisions, the logits' own dtype otherwise."""
    return torch.promote_types(logits.dtype, torch.float32)


class Normaliser(NamedTuple):
    """The softmax's normaliser ``Z = mass * exp(peak)`` in two parts.

    Kept apart, log-probabilities of likely ids lose no digits to the size of the logits.

    Attributes:
        peak: ``[R]`` largest logit; ``-inf`` without columns.
        mass: ``[R]`` ``sum exp(logit - peak)``; 0 without columns.
    """

    peak: Tensor
    mass: Tensor

    def log_probs(self, values: Tensor) -> Tensor:
        """Log-probabilities ``[R, W]``, in nats, of outcomes with logits ``values [R, W]``."""
        return (values - self.peak.unsqueeze(-1)) - self.mass.log().unsqueeze(-1)

    @classmethod
    def combine(cls, peaks: Tensor, masses: Tensor) -> Normaliser:
        """The normaliser over all columns from those of P parts, ``[P, R]`` each.

        The parts are added one by one, so that the same parts give the same bits wherever they lie in memory: the old
        policy and an unchanged new one come by different ways, and their ratio must be exactly 1.
        """
        peaks, masses = peaks.contiguous(), masses.contiguous()
        peak = peaks.amax(0)
        mass = torch.zeros_like(peak)
        for part_peak, part_mass in zip(peaks, masses, strict=True):
            mass += part_mass * (part_peak - peak).exp()
        return cls(peak, mass)


def local_reading(logits: Tensor, rows: Tensor, columns: int, k: int = 0) -> tuple[Normaliser, Tensor, Tensor]:
    """Normaliser over the first ``columns`` columns of ``logits [N, C]`` at ``rows [R]``, and their k largest entries.

    One pass over the logits, without gradient.

    Returns:
        The normaliser, values ``[R, k]`` and columns ``[R, k]`` int64 as :func:`ordered_topk` orders them; beyond
        the columns there are, ``-inf`` and -1.
    """
    dtype = working_dtype(logits)
    peak = torch.full((rows.shape[0],), -math.inf, dtype=dtype, device=logits.device)
    mass = torch.zeros_like(peak)
    values = torch.full((rows.shape[0], k), -math.inf, dtype=dtype, device=logits.device)
    ids = torch.full((rows.shape[0], k), -1, dtype=torch.int64, device=logits.device)
    own = min(k, columns)
    with torch.no_grad():
        for block in row_blocks(logits, rows) if columns > 0 else ():
            dense = logits[rows[block], :columns]
            if own > 0:
                top_values, ids[block, :own] = ordered_topk(dense, own)
                values[block, :own] = top_values.to(dtype)
                peak[block] = values[block, 0]
            else:
                peak[block] = dense.amax(-1).to(dtype)
            # Where every local logit is -inf the difference from the peak would be undefined.
            shift = peak[block].clamp_min(torch.finfo(dtype).min)
            mass[block] = dense.to(dtype).sub_(shift.unsqueeze(-1)).exp_().sum(-1)
    return Normaliser(peak, mass), values, ids


def ordered_topk(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns ``[R, k]`` of the k largest entries of ``[R, C]``, by falling value, then rising column.

    ``torch.topk`` leaves the order of equal values open, also across the k-th place.
    """
    columns = rows.shape[-1]
    candidates = min(k + _TIE_MARGIN, columns)
    values, ids = rows.topk(candidates, dim=-1)
    ids, by_id = ids.sort(dim=-1)
    values, by_value = values.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, by_value)
    if candidates < columns:
        threshold = values[:, k - 1 : k]
        # Ties that may go on past the candidates: take the lowest ids among all entries equal to the k-th value.
        open_ended = (values[:, -1:] == threshold).squeeze(-1).nonzero().squeeze(-1)
        if open_ended.numel() > 0:
            tied = rows[open_ended] == threshold[open_ended]
            order = torch.arange(columns, device=rows.device)
            lowest = torch.where(tied, order, columns).topk(k, dim=-1, largest=False).values
            above = (values[open_ended] > threshold[open_ended]).sum(-1, keepdim=True)
            place = torch.arange(k, device=rows.device)
            tie_rank = (place - above).clamp_min(0)
            ids[open_ended, :k] = torch.where(place < above, ids[open_ended, :k], lowest.gather(-1, tie_rank))
            values[open_ended, :k] = torch.where(place < above, values[open_ended, :k], threshold[open_ended])
    return values[:, :k], ids[:, :k]
