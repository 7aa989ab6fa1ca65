"""Which outcomes the two policies are compared on: the old policy's sparse support, and two rules around it.

``union`` is the published rule (arXiv 2510.03817): both policies keep their most probable ids, an id that only one
side keeps has probability 1e-12 on the other, and both sides are renormalised.

``anchored`` keeps the old policy's ids and lumps all other mass into one ``rest`` outcome, so that the new policy
needs no selection. KL on the lumped outcomes never exceeds the KL on the vocabulary (data processing), is 0 exactly
where the policies agree, and inside ``rest`` the projected policy keeps the new one's conditional distribution::

    KL_vocabulary(pi || q) = KL_anchored(pi || q) + pi(rest) KL(p(. | rest) || q(. | rest))

Logits come as a tensor, or as a head that computes them where they are read
(:class:`~verl_troll.core.lm_head.LinearHead`). They may be split over a group of ranks
(:class:`~verl_troll.core.vocab.VocabShard`); every rank then gets the same ids, in the same order, and the same
values as a single process would.

Shapes: N packed tokens, C local logit columns, R rows of interest (indices into N), W kept ids, n outcomes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from verl_troll.core import kernels
from verl_troll.core.logits import LogitsSource, Normaliser, as_source, fused
from verl_troll.core.vocab import VocabShard, log_probs_at, top_log_probs, top_values, with_gradient

SupportRule = Literal["union", "anchored"]
SUPPORT_RULES: tuple[str, ...] = get_args(SupportRule)

# Log-probability of an id that a policy did not keep, under ``union``.
LOG_MISSING = math.log(1e-12)
# Least mass of the rest outcome: what a float32 sum of probabilities can resolve.
REST_FLOOR = 1e-6


@dataclass(frozen=True)
class SparsePolicy:
    """Most probable ids of a policy at each row, the sampled one always among them.

    Attributes:
        ids: ``[R, W]`` int64, by falling probability (ties by lower id), the sampled id last where it was not
            selected; -1 marks an unused place.
        log_probs: ``[R, W]`` log-probabilities over the full vocabulary, ``-inf`` at unused places.
        sampled: ``[R]`` int64, place of the sampled id in ``ids``.
        entropy: ``[R]`` of the whole policy, in nats, where it was asked for.
    """

    ids: Tensor
    log_probs: Tensor
    sampled: Tensor
    entropy: Tensor | None = None


@dataclass(frozen=True)
class Comparison:
    """Both policies over the same outcomes, and what the restriction to them left out.

    Attributes:
        new_log_probs: ``[R, n]`` normalised log p, differentiable down to the logits; ``-inf`` at unused places.
        old_log_probs: ``[R, n]`` normalised log q.
        sampled: ``[R]`` int64, the sampled id's place.
        sampled_log_probs: ``[R]`` log p of the sampled id over the full vocabulary, differentiable.
        outcomes: ``[R]`` int64, number of outcomes compared.
        support_size: ``[R]`` int64, ids kept of the old policy.
        old_kept_mass: ``[R]`` q of the ids kept of the old policy.
        new_kept_mass: ``[R]`` p of the ids kept of the new policy (``union``) or of the old one (``anchored``).
        cap_hit: ``[R]`` bool, the cap K ended the old policy's selection before its mass was reached.
        entropy: ``[R]`` of the whole new policy, in nats, differentiable, where it was asked for.
    """

    new_log_probs: Tensor
    old_log_probs: Tensor
    sampled: Tensor
    sampled_log_probs: Tensor
    outcomes: Tensor
    support_size: Tensor
    old_kept_mass: Tensor
    new_kept_mass: Tensor
    cap_hit: Tensor
    entropy: Tensor | None = None


def check_support_settings(k: int, dropped_mass: float, rule: str = "union") -> None:
    """Raise ``ValueError`` naming the setting that is out of range."""
    if rule not in SUPPORT_RULES:
        raise ValueError(f"support must be one of {SUPPORT_RULES}, got {rule!r}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k!r}")
    if not 0 <= dropped_mass < 1:
        raise ValueError(f"dropped_mass must be at least 0 and below 1, got {dropped_mass!r}")


def select(
    logits: Tensor | LogitsSource,
    rows: Tensor,
    sampled_ids: Tensor,
    *,
    k: int,
    dropped_mass: float,
    shard: VocabShard | None = None,
    entropy: bool = False,
) -> SparsePolicy:
    """Keep each row's most probable ids until their mass reaches ``1 - dropped_mass``, at most ``k``, and the sampled.

    Equal logits are ordered by lower id, so that the choice does not depend on how the row is searched or sharded.
    One pass over the logits; one all-to-all and one all-gather where the vocabulary is sharded.

    Args:
        logits: ``[N, C]`` float, temperature already applied, or a head that yields them. No gradient flows.
        rows: ``[R]`` int64, without repetition.
        sampled_ids: ``[R]`` int64 below the vocabulary size.
        k: cap K on the selected ids (the sampled id may add one).
        dropped_mass: delta in [0, 1).
        shard: the columns of ``logits``; the whole vocabulary, without padding, by default.
        entropy: whether the entropy is wanted; it is read in the same pass.

    Raises:
        ValueError: ``k`` or ``dropped_mass`` out of range, or a shard that does not fit the logits.
    """
    check_support_settings(k, dropped_mass)
    source = as_source(logits)
    policy, normaliser = select_with_normaliser(
        source, rows, sampled_ids, k, dropped_mass, shard or VocabShard.whole(source.columns), entropy
    )
    return replace(policy, entropy=normaliser.entropy()) if entropy else policy


def select_with_normaliser(
    logits: LogitsSource,
    rows: Tensor,
    sampled_ids: Tensor,
    k: int,
    dropped_mass: float,
    shard: VocabShard,
    entropy: bool,
) -> tuple[SparsePolicy, Normaliser]:
    """:func:`select`, and the normaliser of the whole vocabulary; settings are not checked."""
    if fused(logits):
        with torch.no_grad():
            normaliser, sampled, values, ids = top_values(logits, rows, sampled_ids, k, shard, entropy=entropy)
            kept = kernels.keep(ids, values, sampled_ids, sampled, *normaliser[:2], mass_to_keep(dropped_mass))
        return SparsePolicy(*kept), normaliser
    ids, log_probs, sampled_log_probs, normaliser = top_log_probs(logits, rows, sampled_ids, k, shard, entropy=entropy)
    return keep_most_probable(ids, log_probs, sampled_ids, sampled_log_probs, dropped_mass), normaliser


def keep_most_probable(
    ids: Tensor, log_probs: Tensor, sampled_ids: Tensor, sampled_log_probs: Tensor, dropped_mass: float
) -> SparsePolicy:
    """Of each row's candidates, keep the first until their mass reaches ``1 - dropped_mass``, and the sampled id.

    Args:
        ids: ``[R, k]`` int64, by falling probability.
        log_probs: ``[R, k]`` over the full vocabulary; ``-inf`` where there are fewer candidates.
        sampled_ids, sampled_log_probs: ``[R]``.
        dropped_mass: delta in [0, 1).
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


def compare(
    rule: SupportRule,
    logits: Tensor | LogitsSource,
    rows: Tensor,
    old: SparsePolicy,
    *,
    k: int,
    dropped_mass: float,
    shard: VocabShard | None = None,
    entropy: bool = False,
    reuse_logits: bool = False,
) -> Comparison:
    """Put the new policy given by ``logits`` beside the old one on common outcomes.

    Where the vocabulary is sharded: one all-reduce (``anchored``) or one all-to-all and one all-gather (``union``) in
    the forward pass, nothing in the backward pass.

    Args:
        rule: ``union`` (published) or ``anchored``.
        logits: ``[N, C]`` of the new policy, temperature applied, or a head that yields them; gradients flow to its
            rows ``rows``.
        rows: ``[R]`` int64, without repetition.
        old: the old policy at these rows.
        k, dropped_mass, shard, entropy: as in :func:`select`.
        reuse_logits: the backward pass may write the gradient over the logits, see
            :class:`~verl_troll.core.logits.DenseLogits`.

    Raises:
        ValueError: an unknown rule, or a setting out of range.
    """
    check_support_settings(k, dropped_mass, rule)
    source = as_source(logits, reuse=reuse_logits)
    shard = shard or VocabShard.whole(source.columns)
    if rule == "anchored":
        return _anchored(source, rows, old, k, dropped_mass, shard, entropy)
    return _union(source, rows, old, k, dropped_mass, shard, entropy)


def _anchored(
    logits: LogitsSource,
    rows: Tensor,
    old: SparsePolicy,
    k: int,
    dropped_mass: float,
    shard: VocabShard,
    want_entropy: bool,
) -> Comparison:
    new_log_probs, entropy = log_probs_at(logits, rows, old.ids, shard, entropy=want_entropy)
    support_size = (old.ids >= 0).sum(-1)
    has_rest = support_size < shard.vocab_size
    new_rest, new_mass = _rest(new_log_probs, has_rest)
    old_rest, old_mass = _rest(old.log_probs, has_rest)
    return Comparison(
        new_log_probs=torch.cat([new_log_probs, new_rest], dim=-1),
        old_log_probs=torch.cat([old.log_probs, old_rest], dim=-1),
        sampled=old.sampled,
        sampled_log_probs=at(new_log_probs, old.sampled),
        outcomes=support_size + has_rest.long(),
        support_size=support_size,
        old_kept_mass=old_mass,
        new_kept_mass=new_mass.detach(),
        cap_hit=_cap_hit(old, k, dropped_mass, shard.vocab_size),
        entropy=entropy,
    )


def _rest(log_probs: Tensor, has_rest: Tensor) -> tuple[Tensor, Tensor]:
    """``[R, 1]`` log-mass outside ``log_probs [R, W]`` (``-inf`` where nothing is outside) and ``[R]`` mass inside."""
    mass = log_probs.exp().sum(-1)
    rest = torch.where(has_rest, (1 - mass).clamp_min(REST_FLOOR), 1.0).log()
    return torch.where(has_rest, rest, -math.inf).unsqueeze(-1), mass


def _union(
    logits: LogitsSource,
    rows: Tensor,
    old: SparsePolicy,
    k: int,
    dropped_mass: float,
    shard: VocabShard,
    want_entropy: bool,
) -> Comparison:
    new, normaliser = select_with_normaliser(
        logits, rows, at(old.ids, old.sampled), k, dropped_mass, shard, want_entropy
    )
    only_new = torch.where(_find(new.ids, old.ids) >= 0, -1, new.ids)
    ids = torch.cat([old.ids, only_new], dim=-1)
    used = ids >= 0
    place = _find(old.ids, new.ids)
    kept_by_new = torch.cat([place >= 0, only_new >= 0], dim=-1)

    selected = torch.cat([new.log_probs.gather(-1, place.clamp_min(0)), new.log_probs], dim=-1)
    selected = torch.where(kept_by_new, selected, -math.inf)
    new_log_probs, entropy = with_gradient(selected, logits, rows, torch.where(kept_by_new, ids, -1), normaliser, shard)
    sampled_log_probs = at(new_log_probs, old.sampled)
    new_log_probs = torch.where(used & ~kept_by_new, LOG_MISSING, new_log_probs)
    defaults = torch.full_like(new.log_probs, -math.inf).masked_fill(only_new >= 0, LOG_MISSING)
    old_log_probs = torch.cat([old.log_probs, defaults], dim=-1)
    support_size = (old.ids >= 0).sum(-1)
    old_mass = old.log_probs.exp().sum(-1)
    return Comparison(
        new_log_probs=new_log_probs - torch.logsumexp(new_log_probs, dim=-1, keepdim=True),
        old_log_probs=old_log_probs - torch.logsumexp(old_log_probs, dim=-1, keepdim=True),
        sampled=old.sampled,
        sampled_log_probs=sampled_log_probs,
        outcomes=used.sum(-1),
        support_size=support_size,
        old_kept_mass=old_mass,
        new_kept_mass=new.log_probs.exp().sum(-1),
        cap_hit=_cap_hit(old, k, dropped_mass, shard.vocab_size),
        entropy=entropy,
    )


def at(values: Tensor, place: Tensor) -> Tensor:
    """``[R]`` entries of ``values [R, W]`` at ``place [R]``."""
    return values.gather(-1, place.unsqueeze(-1)).squeeze(-1)


def _cap_hit(policy: SparsePolicy, k: int, dropped_mass: float, vocab_size: int) -> Tensor:
    size = (policy.ids >= 0).sum(-1)
    # The sampled id, where it was added, comes after the k selected ones.
    selected_mass = policy.log_probs[:, :k].exp().sum(-1)
    return (size >= k) & (size < vocab_size) & (selected_mass < mass_to_keep(dropped_mass))


def mass_to_keep(dropped_mass: float) -> float:
    """Ids are kept while those before them have less mass than this."""
    # Without a mass to drop nothing but zero mass is dropped, however float32 rounds the sum.
    return 1 - dropped_mass if dropped_mass > 0 else math.inf


def _find(ids: Tensor, among: Tensor) -> Tensor:
    """``[R, W]`` int64: place of each used id of ``ids [R, W]`` in the same row of ``among [R, M]``, -1 without one."""
    ordered, order = among.sort(dim=-1)
    place = torch.searchsorted(ordered, ids.contiguous()).clamp_max(ordered.shape[-1] - 1)
    found = (ordered.gather(-1, place) == ids) & (ids >= 0)
    return torch.where(found, order.gather(-1, place), -1)
