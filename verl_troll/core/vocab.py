"""Log-probabilities from logits whose vocabulary may be split over the ranks of a group.

Every rank holds all tokens and the columns ``[start, stop)`` of the vocabulary. Each method of :class:`VocabLogits`
gives every rank the result that a single process would get from all columns; backward touches only the local
columns. Without a group nothing is sent.

======================================  ==============================  =======================  ========
call                                    forward                         message per row, bytes   backward
======================================  ==============================  =======================  ========
:meth:`VocabLogits.log_probs_at`, W ids  one all-reduce                  4 (W + 2 P)              none
:meth:`VocabLogits.top`, K ids           one all-to-all, one all-gather  8 K + 12                 none
:meth:`VocabLogits.differentiable`       none                            0                        none
======================================  ==============================  =======================  ========

P is the number of ranks; the entropy adds one number per rank (4 P) or per row (4). Each rank sends and receives 2 (P -
1) / P times the message, so the cost per rank hardly grows with P. With float64 logits every number except ids takes
twice the bytes. An all-reduce replaces a gather because each id lives on one rank: all others add zero, so the sum is
exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from verl_troll.core.logits import DenseLogits, LogitGradient, LogitsSource, Normaliser, Reading


@dataclass(frozen=True)
class VocabShard:
    """The columns of the vocabulary that this rank holds.

    Attributes:
        start, stop: ids of the local columns, ``[start, stop)``; they rise with the rank in ``group`` and leave no gap.
        vocab_size: true vocabulary size; columns of ids at or above it are padding and never count.
        group: ranks that hold the other columns; None if all are here.

    Raises:
        ValueError: the bounds are no interval, the vocabulary is empty, or a lone rank does not hold all of it.
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
        """``columns`` on every rank of ``group``, in the order of ranks, as Megatron splits its output layer."""
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
        """This rank's index among them."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def columns(self) -> int:
        """Number of local columns that are real; padding comes last."""
        return max(0, min(self.stop, self.vocab_size) - self.start)

    def local(self, ids: Tensor) -> Tensor:
        """Local columns of ``ids`` (global, negative for none), -1 where another rank owns them."""
        columns = ids - self.start
        return torch.where((ids >= 0) & (columns >= 0) & (columns < self.columns), columns, -1)


class LogProbs(NamedTuple):
    """Log-probabilities, the same on every rank, differentiable with respect to the local logits.

    Attributes:
        log_probs: nats, over the whole vocabulary; ``-inf`` for a negative id.
        entropy: nats, if requested.
    """

    log_probs: Float[Tensor, "rows ids"]
    entropy: Float[Tensor, " rows"] | None


class TopLogits(NamedTuple):
    """The most probable ids, the same on every rank.

    Attributes:
        ids: int64, by falling logit (equal ones by rising id).
        values: their logits; ``-inf`` for an id without mass.
        sampled_values: logits of the sampled ids.
        normaliser: of the whole vocabulary.
    """

    ids: Int[Tensor, "rows k"]
    values: Float[Tensor, "rows k"]
    sampled_values: Float[Tensor, "rows 1"]
    normaliser: Normaliser

    @property
    def log_probs(self) -> Float[Tensor, "rows k"]:
        """Log-probabilities of ``ids`` over the whole vocabulary, in nats; ``-inf`` for an id without mass."""
        return self.normaliser.log_probs(self.values)

    @property
    def sampled_log_probs(self) -> Float[Tensor, " rows"]:
        """Log-probabilities of the sampled ids over the whole vocabulary, in nats."""
        return self.normaliser.log_probs(self.sampled_values).squeeze(-1)


@dataclass(frozen=True)
class VocabLogits:
    """Logits of some rows over the whole vocabulary, of which this rank holds a shard.

    Attributes:
        source: the local columns of all tokens, temperature already applied.
        rows: int64 indices into the tokens, without duplicates, the same on every rank.
        shard: the columns of ``source``.

    Raises:
        ValueError: the shard does not match the columns.
    """

    source: LogitsSource
    rows: Int[Tensor, " rows"]
    shard: VocabShard

    def __post_init__(self) -> None:
        if self.source.columns != self.shard.stop - self.shard.start:
            raise ValueError(
                f"the vocabulary shard [{self.shard.start}, {self.shard.stop}) does not fit "
                f"{self.source.columns} logit columns"
            )

    @classmethod
    def of(
        cls, logits: Tensor | LogitsSource, rows: Tensor | None = None, shard: VocabShard | None = None
    ) -> VocabLogits:
        """From a tensor ``[tokens, columns]`` or a source; by default at all rows, with the whole vocabulary."""
        source = DenseLogits(logits) if isinstance(logits, Tensor) else logits
        if rows is None:
            rows = torch.arange(source.tensors[0].shape[0], device=source.tensors[0].device)
        return cls(source, rows, shard or VocabShard.whole(source.columns))

    def top(self, k: int, sampled_ids: Int[Tensor, " rows"], *, entropy: bool = False) -> TopLogits:
        """The ``min(k, vocab_size)`` most probable ids of each row, and the sampled id's logit; no gradient.

        Each rank contributes its best candidates, its part of the normaliser and, if it owns it, the sampled id's
        logit: one all-to-all and one all-gather of ``8 k + 12`` bytes per row (``8 k + 16`` with the entropy).

        Args:
            k: at least 1.
            sampled_ids: below the vocabulary size.
            entropy: whether the normaliser's entropy will be needed.
        """
        shard = self.shard
        own = self._columns_of(sampled_ids.unsqueeze(-1))
        reading = self.source.read(self.rows, own, shard.columns, k=min(k, shard.vocab_size), energy=entropy)
        if shard.start > 0:
            reading = reading._replace(top_ids=torch.where(reading.top_ids >= 0, reading.top_ids + shard.start, -1))
        if shard.ranks > 1 and self.rows.shape[0] > 0:
            reading = _merge(reading, shard)
        return TopLogits(reading.top_ids, reading.top_values, reading.values, reading.normaliser)

    def logits_at(self, ids: Int[Tensor, "rows ids"], *, entropy: bool) -> tuple[Normaliser, Float[Tensor, "rows ids"]]:
        """The normaliser of the whole vocabulary, and the logits at ``ids`` (0 where negative); no gradient.

        One all-reduce, the one of :meth:`log_probs_at`.
        """
        shard = self.shard
        normaliser, values, *_ = self.source.read(self.rows, self._columns_of(ids), shard.columns, energy=entropy)
        if shard.ranks > 1 and self.rows.shape[0] > 0:
            # One slot per rank for its part of the normaliser; the other ranks' are zero.
            parts = torch.stack([part for part in normaliser if part is not None], dim=-1)
            slots = values.new_zeros(self.rows.shape[0], shard.ranks, parts.shape[-1])
            slots[:, shard.rank] = parts
            message = torch.cat([values, slots.flatten(1)], dim=-1)
            dist.all_reduce(message, group=shard.group)
            values, slots = message[:, : ids.shape[-1]], message[:, ids.shape[-1] :].view(slots.shape)
            normaliser = Normaliser.combine(*slots.permute(2, 1, 0))
        return normaliser, values

    def log_probs_at(self, ids: Int[Tensor, "rows ids"], *, entropy: bool = False) -> LogProbs:
        """``log_softmax(logits[rows]).gather(-1, ids)`` over the whole vocabulary, differentiable in the local logits.

        One all-reduce of ``W + 2 P`` numbers per row in the forward pass (``W + 3 P`` with the entropy), nothing in the
        backward pass.

        Args:
            ids: int64 below the vocabulary size, the same on every rank, each once per row; negative ids give ``-inf``
                and no gradient.
            entropy: whether to return the entropy.

        Returns:
            Values in the working dtype (at least float32).
        """
        with torch.no_grad():
            normaliser, values = self.logits_at(ids, entropy=entropy)
            log_probs = torch.where(ids >= 0, normaliser.log_probs(values), -math.inf)
        return self.differentiable(log_probs, ids, normaliser)

    def differentiable(
        self, log_probs: Float[Tensor, "rows ids"], ids: Int[Tensor, "rows ids"], normaliser: Normaliser
    ) -> LogProbs:
        """Make known ``log_probs`` at ``ids``, and the entropy, differentiable with respect to the local logits.

        Backward writes the gradient of both to the logits' columns in one pass. The loss must be the same function of
        them on every rank, as Megatron's losses are: then each rank's gradient of its own columns is complete, and
        nothing is sent.

        Args:
            normaliser: of the whole vocabulary; with its energy if the entropy is requested.
        """
        entropy = None if normaliser.energy is None else normaliser.entropy()
        return LogProbs(
            *_Differentiable.apply(log_probs, entropy, ids, *normaliser, self, *self.source.tensors)  # type: ignore[no-untyped-call]
        )

    def gradients(self, gradient: LogitGradient, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """Gradients of the source's tensors, from a gradient whose ``ids`` are those of the whole vocabulary."""
        gradient = gradient._replace(ids=self._columns_of(gradient.ids))
        return self.source.gradients(self.rows, self.shard.columns, gradient, needed)

    def _columns_of(self, ids: Tensor) -> Tensor:
        # Triton's kernels ignore columns that the logits do not have, so they need no masking.
        return ids if self.shard.start == 0 and self.source.triton else self.shard.local(ids)


def _merge(reading: Reading, shard: VocabShard) -> Reading:
    """The reading of the whole vocabulary from those of all ranks.

    Each rank merges its share of the rows: an all-to-all brings it what every rank found there, an all-gather
    distributes the results.
    """
    normaliser, sampled, values, ids = reading
    rows, width = ids.shape
    found = _pack(normaliser, values, ids, sampled)
    share = -(-rows // shard.ranks)
    found = torch.nn.functional.pad(found, (0, 0, 0, share * shard.ranks - rows))
    received = torch.empty_like(found)
    dist.all_to_all_single(received, found, group=shard.group)
    parts, values, ids, sampled = _unpack(received.view(shard.ranks, share, -1), width, values.dtype)

    # Candidates are in rank order, so equal values are in id order; a stable sort keeps that.
    best = values.transpose(0, 1).flatten(1).sort(dim=-1, descending=True, stable=True)
    ids = ids.transpose(0, 1).flatten(1).gather(-1, best.indices[:, :width])
    own = _pack(Normaliser.combine(*parts), best.values[:, :width], ids, sampled.sum(0))
    dist.all_gather_into_tensor(received, own, group=shard.group)
    normaliser, values, ids, sampled = _unpack(received[:rows], width, values.dtype)
    return Reading(normaliser, sampled, values, ids.long())


def _pack(normaliser: Normaliser, values: Tensor, ids: Tensor, sampled: Tensor) -> Tensor:
    """One int32 message per row, ``[..., words]``: the bits of k values, sampled and the normaliser, then k ids."""
    parts = [part.unsqueeze(-1) for part in normaliser if part is not None]
    return torch.cat([torch.cat([values, sampled, *parts], dim=-1).view(torch.int32), ids.to(torch.int32)], dim=-1)


def _unpack(message: Tensor, width: int, dtype: torch.dtype) -> tuple[Normaliser, Tensor, Tensor, Tensor]:
    # Copy: contiguous() would keep a single row's stride, with which it cannot be viewed as float64.
    numbers = message[..., :-width].clone(memory_format=torch.contiguous_format).view(dtype)
    return (
        Normaliser(*numbers[..., width + 1 :].unbind(-1)),
        numbers[..., :width],
        message[..., -width:],
        numbers[..., width : width + 1],
    )


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        log_probs: Tensor,
        entropy: Tensor | None,
        ids: Tensor,
        max_logit: Tensor,
        sumexp: Tensor,
        energy: Tensor | None,
        logits: VocabLogits,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(logits.rows, ids, max_logit, sumexp, energy, *tensors)
        ctx.builder, ctx.shard = logits.source.builder, logits.shard
        ctx.set_materialize_grads(False)
        return log_probs.view_as(log_probs), None if entropy is None else entropy.view_as(entropy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, ids, max_logit, sumexp, energy, *tensors = ctx.saved_tensors
        grad = torch.zeros(ids.shape, dtype=sumexp.dtype, device=sumexp.device) if grad is None else grad
        grad = torch.where(ids >= 0, grad, 0.0)
        level, slope = -grad.sum(-1) / sumexp, None
        if grad_entropy is not None:
            # dH / dx_j = -p_j (log p_j + H), and H = log sumexp - energy / sumexp.
            slope = -grad_entropy / sumexp
            level = level - slope * (energy / sumexp)
        gradient = LogitGradient(max_logit, level, slope, ids, grad)
        logits = VocabLogits(ctx.builder(*tensors), rows, ctx.shard)
        return (None,) * 7 + logits.gradients(gradient, ctx.needs_input_grad[7:])
