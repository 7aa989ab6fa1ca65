"""Which ids of a policy are kept: the most probable ones, and the sampled one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from verl_troll.core.kernels.constants import mass_to_keep
from verl_troll.core.logits import Normaliser
from verl_troll.core.vocab import VocabLogits


@dataclass(frozen=True)
class Selection:
    """How many ids of a policy are kept: the most probable ones, until their mass reaches ``1 - dropped_mass``.

    Attributes:
        k: maximum number; at least 1. The sampled id may be added.
        dropped_mass: delta in [0, 1).

    Raises:
        ValueError: naming the setting that is out of range.
    """

    k: int = 64
    dropped_mass: float = 1e-5

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k!r}")
        if not 0 <= self.dropped_mass < 1:
            raise ValueError(f"dropped_mass must be at least 0 and below 1, got {self.dropped_mass!r}")

    @property
    def mass_to_keep(self) -> float:
        """The mass below which selection continues: an id is kept if the more probable ones have less than this."""
        return mass_to_keep(self.dropped_mass)


@dataclass(frozen=True)
class SparsePolicy:
    """Most probable ids of a policy at some rows, always including the sampled one.

    Attributes:
        ids: int64, by falling probability (equal ones by rising id); the sampled id last if it was not selected; -1
            for unused.
        log_probs: log-probabilities over the full vocabulary, ``-inf`` where unused.
        sampled: int64, index of the sampled id in ``ids``.
        entropy: of the whole policy, in nats, if requested.
    """

    ids: Int[Tensor, "rows ids"]
    log_probs: Float[Tensor, "rows ids"]
    sampled: Int[Tensor, " rows"]
    entropy: Float[Tensor, " rows"] | None = None

    @property
    def sampled_ids(self) -> Int[Tensor, " rows"]:
        """The sampled ids."""
        return at(self.ids, self.sampled)

    @property
    def sampled_log_probs(self) -> Float[Tensor, " rows"]:
        """Their log-probabilities over the full vocabulary."""
        return at(self.log_probs, self.sampled)


def select(
    logits: VocabLogits, sampled_ids: Int[Tensor, " rows"], selection: Selection, *, entropy: bool = False
) -> SparsePolicy:
    """Keep each row's most probable ids according to ``selection``, and the sampled id.

    Equal logits are ordered by id, so the choice does not depend on how the row is searched or sharded. One pass
    over the logits, without gradient; one all-to-all and one all-gather if the vocabulary is sharded.

    Args:
        sampled_ids: int64 below the vocabulary size.
        entropy: whether to read the entropy too, in the same pass.
    """
    policy, normaliser = select_with_normaliser(logits, sampled_ids, selection, entropy=entropy)
    return replace(policy, entropy=normaliser.entropy()) if entropy else policy


def select_with_normaliser(
    logits: VocabLogits, sampled_ids: Int[Tensor, " rows"], selection: Selection, *, entropy: bool
) -> tuple[SparsePolicy, Normaliser]:
    """:func:`select`, and the normaliser of the whole vocabulary."""
    with torch.no_grad():
        top = logits.top(selection.k, sampled_ids, entropy=entropy)
        if logits.source.triton:
            from verl_troll.core.kernels import tokens_triton

            kept = tokens_triton.keep(
                top.ids,
                top.values,
                sampled_ids,
                top.sampled_values,
                top.normaliser.max,
                top.normaliser.sumexp,
                selection.mass_to_keep,
            )
            return SparsePolicy(*kept), top.normaliser
        normaliser, log_probs, sampled_log_probs = top.normaliser, top.log_probs, top.sampled_log_probs
        ids = torch.where(log_probs > -math.inf, top.ids, -1)
        # Its tensors would count at the peak of memory.
        del top
        return keep_most_probable(ids, log_probs, sampled_ids, sampled_log_probs, selection.dropped_mass), normaliser


def keep_most_probable(
    ids: Int[Tensor, "rows k"],
    log_probs: Float[Tensor, "rows k"],
    sampled_ids: Int[Tensor, " rows"],
    sampled_log_probs: Float[Tensor, " rows"],
    dropped_mass: float,
) -> SparsePolicy:
    """Keep the first candidates until their mass reaches ``1 - dropped_mass``, and the sampled id.

    Args:
        ids: candidates, by falling probability.
        log_probs: over the full vocabulary; ``-inf`` where there are fewer candidates.
    """
    width = ids.shape[-1]
    before = log_probs.exp().cumsum(-1) - log_probs.exp()
    keep = before < mass_to_keep(dropped_mass)
    keep &= log_probs > -math.inf
    keep[:, 0] = True
    ids = torch.where(keep, ids, -1)
    log_probs = torch.where(keep, log_probs, -math.inf)

    found = ids == sampled_ids.unsqueeze(-1)
    missing = ~found.any(-1)
    ids = torch.cat([ids, torch.where(missing, sampled_ids, -1).unsqueeze(-1)], dim=-1)
    log_probs = torch.cat([log_probs, torch.where(missing, sampled_log_probs, -math.inf).unsqueeze(-1)], dim=-1)
    sampled = torch.where(missing, width, found.int().argmax(-1))
    return SparsePolicy(ids, log_probs, sampled)


def at(values: Tensor, index: Int[Tensor, " rows"]) -> Tensor:
    """``[R]`` elements of ``values [R, W]`` at ``index``."""
    return values.gather(-1, index.unsqueeze(-1)).squeeze(-1)
