"""Log-probabilities from logits whose vocabulary is split over the ranks of a group.

Every rank holds all N tokens and the columns ``[start, stop)`` of the vocabulary. Each function below gives every rank
the same result, the one that a single process would get from all columns; backward touches the local columns only.
Without a group nothing is sent.

============================  ==============================  =======================  ========
call                          forward                         message per row, bytes   backward
============================  ==============================  =======================  ========
:func:`log_probs_at`, W ids   one all-reduce                  4 (W + 2 P)              none
:func:`top_log_probs`, K ids  one all-to-all, one all-gather  8 K + 12                 none
:func:`with_gradient`         none                            0                        none
============================  ==============================  =======================  ========

P is the number of ranks; the entropy adds one number per rank (4 P) or per row (4). Each rank sends and receives 2 (P -
1) / P times the message, so that the cost per rank hardly grows with P. float64 logits send twice the bytes for each
number that is not an id. An all-reduce stands in for a gather because each id lives on one rank: all others add zero,
so that the sum is exact.

Logits come as a tensor or as a head that computes them where they are read
(:class:`~verl_troll.core.logits.LogitsSource`).

Shapes: N tokens, C local columns, R rows of interest (indices into N), W or K ids per row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from verl_troll.core.logits import LogitsSource, Normaliser, Reading, as_source, fused


@dataclass(frozen=True)
class VocabShard:
    """The columns of the vocabulary that this rank holds.

    Attributes:
        start, stop: ids of the local columns, ``[start, stop)``; they rise with the rank in ``group`` and leave no gap.
        vocab_size: true vocabulary size; columns of ids at or above it are padding, which never counts.
        group: ranks that hold the other columns; None where all are here.

    Raises:
        ValueError: bounds that are no interval, a vocabulary without an id, or one that a lone rank does not hold.
    """

    start: int
    stop: int
    vocab_size: int
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"a vocabulary shard needs 0 <= start <= stop, got [{self.start}, {self.stop})")
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {self.vocab_size!r}")
        if self.ranks == 1 and not (self.start == 0 and self.vocab_size <= self.stop):
            raise ValueError(
                f"vocab_size must lie between 1 and the {self.stop} logit columns, got {self.vocab_size!r}: columns "
                f"from {self.start} on, and no group that holds others"
            )

    @classmethod
    def whole(cls, columns: int, vocab_size: int | None = None) -> VocabShard:
        """All ``columns`` on this rank, the first ``vocab_size`` (by default all) of them real."""
        return cls(0, columns, columns if vocab_size is None else vocab_size)

    @classmethod
    def even(cls, columns: int, vocab_size: int, group: dist.ProcessGroup) -> VocabShard:
        """``columns`` on every rank of ``group`` in order of ranks, as Megatron splits its output layer."""
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        if ranks * columns < vocab_size:
            raise ValueError(
                f"{ranks} ranks with {columns} logit columns each cannot hold a vocabulary of {vocab_size} ids"
            )
        return cls(rank * columns, (rank + 1) * columns, vocab_size, group)

    @property
    def ranks(self) -> int:
        """Number of ranks that hold a part of the vocabulary."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """This rank's place among them."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def columns(self) -> int:
        """Local columns that are real; padding comes last."""
        return max(0, min(self.stop, self.vocab_size) - self.start)

    def local(self, ids: Tensor) -> Tensor:
        """Local columns of ``ids`` (global, negative for none), -1 where this rank does not own them."""
        columns = ids - self.start
        return torch.where((ids >= 0) & (columns >= 0) & (columns < self.columns), columns, -1)

    def columns_of(self, ids: Tensor, logits: LogitsSource) -> Tensor:
        """As :meth:`local`; the kernels pass over columns that ``logits`` have not, which saves these operations."""
        return ids if self.start == 0 and fused(logits) else self.local(ids)

    def check(self, logits: LogitsSource) -> None:
        """Raise ``ValueError`` where ``logits`` has other columns than the shard says."""
        if logits.columns != self.stop - self.start:
            raise ValueError(
                f"the vocabulary shard [{self.start}, {self.stop}) does not fit {logits.columns} logit columns"
            )


class LogProbs(NamedTuple):
    """What :func:`log_probs_at` reads off the logits, alike on every rank and differentiable.

    Attributes:
        log_probs: ``[R, W]`` nats, over the whole vocabulary; ``-inf`` for a negative id.
        entropy: ``[R]`` nats, where it was asked for.
    """

    log_probs: Tensor
    entropy: Tensor | None


class TopLogProbs(NamedTuple):
    """What :func:`top_log_probs` reads off the logits, alike on every rank.

    Attributes:
        ids: ``[R, K]`` int64, by falling log-probability (equal ones by rising id); -1 for an id without mass.
        log_probs: ``[R, K]`` nats, over the whole vocabulary; ``-inf`` for an id without mass.
        sampled_log_probs: ``[R]``.
        normaliser: of the whole vocabulary.
    """

    ids: Tensor
    log_probs: Tensor
    sampled_log_probs: Tensor
    normaliser: Normaliser


def log_probs_at(
    logits: Tensor | LogitsSource, rows: Tensor, ids: Tensor, shard: VocabShard, *, entropy: bool = False
) -> LogProbs:
    """``log_softmax(logits[rows]).gather(-1, ids)`` over the whole vocabulary, differentiable in the local logits.

    One all-reduce of ``W + 2 P`` numbers per row in the forward pass (``W + 3 P`` with the entropy), nothing in the
    backward pass.

    Args:
        logits: ``[N, C]`` float, or a source of such.
        rows: ``[R]`` int64, without repetition, alike on every rank.
        ids: ``[R, W]`` int64 below ``vocab_size``, alike on every rank, each once per row; negative ids give ``-inf``
            and no gradient.
        shard: the columns of ``logits``.
        entropy: whether the entropy is wanted.

    Returns:
        Values in the working dtype (at least float32).
    """
    source = as_source(logits)
    with torch.no_grad():
        normaliser, values = values_at(source, rows, ids, shard, entropy=entropy)
        log_probs = torch.where(ids >= 0, normaliser.log_probs(values), -math.inf)
    return with_gradient(log_probs, source, rows, ids, normaliser, shard)


def values_at(
    logits: LogitsSource, rows: Tensor, ids: Tensor, shard: VocabShard, *, entropy: bool
) -> tuple[Normaliser, Tensor]:
    """The normaliser of the whole vocabulary and the logits ``[R, W]`` at ``ids``, 0 where negative; no gradient.

    The one all-reduce of :func:`log_probs_at`.
    """
    shard.check(logits)
    normaliser, values, *_ = logits.read(rows, shard.columns_of(ids, logits), shard.columns, energy=entropy)
    if shard.ranks > 1 and rows.shape[0] > 0:
        # A slot per rank for its normaliser, zero on all others.
        parts = torch.stack([part for part in normaliser if part is not None], dim=-1)
        slots = values.new_zeros(rows.shape[0], shard.ranks, parts.shape[-1])
        slots[:, shard.rank] = parts
        message = torch.cat([values, slots.flatten(1)], dim=-1)
        dist.all_reduce(message, group=shard.group)
        values, slots = message[:, : ids.shape[-1]], message[:, ids.shape[-1] :].view(slots.shape)
        normaliser = Normaliser.combine(*slots.permute(2, 1, 0))
    return normaliser, values


def top_log_probs(
    logits: Tensor | LogitsSource,
    rows: Tensor,
    sampled_ids: Tensor,
    k: int,
    shard: VocabShard,
    *,
    entropy: bool = False,
) -> TopLogProbs:
    """The ``min(k, vocab_size)`` most probable ids of each row and the sampled id's log-probability; no gradient.

    Each rank brings its own best candidates, its part of the normaliser and, if it owns it, the sampled id's logit:
    one all-to-all and one all-gather of ``8 K + 12`` bytes per row (``8 K + 16`` with the entropy).

    Args:
        logits, rows, shard: as in :func:`log_probs_at`.
        sampled_ids: ``[R]`` int64 below ``vocab_size``.
        k: at least 1.
        entropy: whether the normaliser's entropy will be asked for.
    """
    with torch.no_grad():
        normaliser, sampled, values, ids = top_values(as_source(logits), rows, sampled_ids, k, shard, entropy=entropy)
        log_probs = normaliser.log_probs(values)
        sampled_log_probs = normaliser.log_probs(sampled).squeeze(-1)
        return TopLogProbs(torch.where(log_probs > -math.inf, ids, -1), log_probs, sampled_log_probs, normaliser)


def top_values(
    logits: LogitsSource, rows: Tensor, sampled_ids: Tensor, k: int, shard: VocabShard, *, entropy: bool
) -> Reading:
    """As :func:`top_log_probs`, but logits: of the sampled id ``[R, 1]``, and of the best ids; ids of the vocabulary.

    The collectives of :func:`top_log_probs`.
    """
    shard.check(logits)
    own = shard.columns_of(sampled_ids.unsqueeze(-1), logits)
    reading = logits.read(rows, own, shard.columns, k=min(k, shard.vocab_size), energy=entropy)
    if shard.start > 0:
        reading = reading._replace(top_ids=torch.where(reading.top_ids >= 0, reading.top_ids + shard.start, -1))
    return _merge(reading, shard) if shard.ranks > 1 and rows.shape[0] > 0 else reading


def _merge(reading: Reading, shard: VocabShard) -> Reading:
    """The reading of the vocabulary from each rank's own.

    Each rank merges its share of the rows: an all-to-all brings it what all ranks found there, an all-gather hands
    the results round.
    """
    normaliser, sampled, values, ids = reading
    rows, width = ids.shape
    found = _pack(normaliser, values, ids, sampled)
    share = -(-rows // shard.ranks)
    found = torch.nn.functional.pad(found, (0, 0, 0, share * shard.ranks - rows))
    received = torch.empty_like(found)
    dist.all_to_all_single(received, found, group=shard.group)
    parts, values, ids, sampled = _unpack(received.view(shard.ranks, share, -1), width, values.dtype)

    # Candidates stand in order of ranks, thus equal values in order of ids; a stable sort keeps that.
    best = values.transpose(0, 1).flatten(1).sort(dim=-1, descending=True, stable=True)
    ids = ids.transpose(0, 1).flatten(1).gather(-1, best.indices[:, :width])
    own = _pack(Normaliser.combine(*parts), best.values[:, :width], ids, sampled.sum(0))
    dist.all_gather_into_tensor(received, own, group=shard.group)
    normaliser, values, ids, sampled = _unpack(received[:rows], width, values.dtype)
    return Reading(normaliser, sampled, values, ids.long())


def _pack(normaliser: Normaliser, values: Tensor, ids: Tensor, sampled: Tensor) -> Tensor:
    """One int32 message per row, ``[..., words]``: k values, sampled and the normaliser bit by bit, then k ids."""
    parts = [part.unsqueeze(-1) for part in normaliser if part is not None]
    return torch.cat([torch.cat([values, sampled, *parts], dim=-1).view(torch.int32), ids.to(torch.int32)], dim=-1)


def _unpack(message: Tensor, width: int, dtype: torch.dtype) -> tuple[Normaliser, Tensor, Tensor, Tensor]:
    # A copy: contiguous() would leave the stride of a single row, which float64 cannot be viewed with.
    numbers = message[..., :-width].clone(memory_format=torch.contiguous_format).view(dtype)
    return (
        Normaliser(*numbers[..., width + 1 :].unbind(-1)),
        numbers[..., :width],
        message[..., -width:],
        numbers[..., width : width + 1],
    )


def with_gradient(
    log_probs: Tensor, logits: LogitsSource, rows: Tensor, ids: Tensor, normaliser: Normaliser, shard: VocabShard
) -> LogProbs:
    """``log_probs [R, W]``, known already, as the function of the local logits that they are; so the entropy.

    Backward writes the gradient of both to the logits' columns in one pass. The loss must be the same function of
    them on every rank, as Megatron's losses are: then each rank's gradient of its own columns is complete, and nothing
    is sent.

    Args:
        log_probs: values at ``ids``.
        logits, rows, ids, shard: as in :func:`log_probs_at`.
        normaliser: of the whole vocabulary at ``rows``, with its energy where the entropy is wanted.
    """
    entropy = None if normaliser.energy is None else normaliser.entropy()
    return LogProbs(
        *_WithGradient.apply(log_probs, entropy, rows, ids, *normaliser, logits, shard, *logits.tensors)  # type: ignore[no-untyped-call]
    )


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        log_probs: Tensor,
        entropy: Tensor | None,
        rows: Tensor,
        ids: Tensor,
        peak: Tensor,
        mass: Tensor,
        energy: Tensor | None,
        source: LogitsSource,
        shard: VocabShard,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(rows, ids, peak, mass, energy, *tensors)
        ctx.builder, ctx.shard = source.builder, shard
        ctx.set_materialize_grads(False)
        return log_probs.view_as(log_probs), None if entropy is None else entropy.view_as(entropy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, ids, peak, mass, energy, *tensors = ctx.saved_tensors
        grad = torch.zeros(ids.shape, dtype=mass.dtype, device=mass.device) if grad is None else grad
        grad = torch.where(ids >= 0, grad, 0.0)
        level, slope = -grad.sum(-1) / mass, None
        if grad_entropy is not None:
            # dH / dx_j = -p_j (log p_j + H), and H = log mass - energy / mass.
            slope = -grad_entropy / mass
            level = level - slope * (energy / mass)
        gradients: tuple[Tensor | None, ...] = ctx.builder(*tensors).gradients(
            rows, ctx.shard.columns, peak, level, slope, ctx.shard.local(ids), grad, ctx.needs_input_grad[9:]
        )
        return (None,) * 9 + gradients
