"""Exact log-probabilities of a few outcomes per token, straight from the logits.

No ``[tokens, vocabulary]`` log-softmax is kept: the forward pass reads the logits in blocks of rows, the backward pass
writes their gradient once.

Shapes: N packed tokens, V vocabulary, R rows of interest (indices into N), W outcomes per row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of logits that are held in working precision at a time (64 MiB in float32).
_BLOCK_ELEMENTS = 1 << 24


def row_blocks(logits: Tensor, rows: Tensor) -> Iterator[slice]:
    """Slices of ``rows`` whose logits fit the working block."""
    step = max(1, _BLOCK_ELEMENTS // logits.shape[-1])
    for start in range(0, rows.shape[0], step):
        yield slice(start, start + step)


def working_dtype(logits: Tensor) -> torch.dtype:
    """float32 for half precisions, the logits' own dtype otherwise."""
    return torch.promote_types(logits.dtype, torch.float32)


def log_normaliser(logits: Tensor, rows: Tensor, vocab_size: int) -> Tensor:
    """``log sum_v exp(logits[row, v])`` over the first ``vocab_size`` columns.

    Args:
        logits: ``[N, V]``; columns at or above ``vocab_size`` are padding and never counted.
        rows: ``[R]`` int64.

    Returns:
        ``[R]`` in :func:`working_dtype`, without gradient.
    """
    result = torch.empty(rows.shape[0], dtype=working_dtype(logits), device=logits.device)
    with torch.no_grad():
        for block in row_blocks(logits, rows):
            result[block] = torch.logsumexp(logits[rows[block], :vocab_size].to(result.dtype), dim=-1)
    return result


def log_probs_at(logits: Tensor, rows: Tensor, ids: Tensor, log_z: Tensor, vocab_size: int) -> Tensor:
    """``log_softmax(logits[rows, :vocab_size]).gather(-1, ids)``, differentiable with respect to the logits.

    Args:
        logits: ``[N, V]`` float.
        rows: ``[R]`` int64, without repetition.
        ids: ``[R, W]`` int64 below ``vocab_size``; negative ids give ``-inf`` and no gradient.
        log_z: ``[R]`` of :func:`log_normaliser`.
        vocab_size: columns that count.

    Returns:
        ``[R, W]`` in :func:`working_dtype`, nats.
    """
    log_probs: Tensor = _LogProbsAt.apply(logits, rows, ids, log_z, vocab_size)  # type: ignore[no-untyped-call]
    return log_probs


class _LogProbsAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, ids: Tensor, log_z: Tensor, vocab_size: int) -> Tensor:
        ctx.save_for_backward(logits, rows, ids, log_z)
        ctx.vocab_size = vocab_size
        picked = logits[rows.unsqueeze(-1), ids.clamp_min(0)].to(log_z.dtype)
        return torch.where(ids >= 0, picked - log_z.unsqueeze(-1), -math.inf)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, rows, ids, log_z = ctx.saved_tensors
        grad = torch.where(ids >= 0, grad, 0.0)
        total = grad.sum(-1, keepdim=True)
        result = torch.zeros_like(logits)
        for block in row_blocks(logits, rows):
            columns = logits[rows[block], : ctx.vocab_size].to(log_z.dtype)
            dense = torch.sub(columns, log_z[block].unsqueeze(-1)).exp_().mul_(-total[block])
            dense.scatter_add_(-1, ids[block].clamp_min(0), grad[block])
            result[rows[block], : ctx.vocab_size] = dense.to(logits.dtype)
        return result, None, None, None, None
