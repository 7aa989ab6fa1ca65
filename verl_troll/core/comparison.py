"""Old and new policy on common outcomes, by one of the rules in :data:`RULES`.

``union`` is the published rule (arXiv 2510.03817): both policies keep their most probable ids, an id that only one of
them keeps has probability 1e-12 under the other, and both are renormalised.

``anchored`` keeps the old policy's ids and puts all other mass into one ``rest`` outcome, so that nothing is selected
from the new policy. KL on these outcomes never exceeds the KL on the vocabulary (data processing) and is exactly 0 if
the policies agree. Inside ``rest`` the projected policy keeps the new one's conditional distribution::

    KL_vocabulary(pi || q) = KL_anchored(pi || q) + pi(rest) KL(p(. | rest) || q(. | rest))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from verl_troll.core.kernels.constants import LOG_MISSING, REST_FLOOR
from verl_troll.core.logits import Normaliser
from verl_troll.core.support import Selection, SparsePolicy, at, select_with_normaliser
from verl_troll.core.vocab import VocabLogits


@dataclass(frozen=True)
class Comparison:
    """Both policies over the same outcomes, and what this restriction leaves out.

    Attributes:
        new_log_probs: normalised log p, differentiable down to the logits; ``-inf`` where unused.
        old_log_probs: normalised log q.
        sampled: int64, index of the sampled id among the outcomes.
        sampled_log_probs: log p of the sampled id over the full vocabulary, differentiable.
        outcomes: int64, number of outcomes compared.
        support_size: int64, ids kept of the old policy.
        old_kept_mass: q of the ids kept of the old policy.
        new_kept_mass: p of the ids kept of the new policy (``union``) or of the old one (``anchored``).
        cap_hit: the cap k ended the old policy's selection before it reached its mass.
        entropy: of the whole new policy, in nats, differentiable, if requested.
    """

    new_log_probs: Float[Tensor, "rows outcomes"]
    old_log_probs: Float[Tensor, "rows outcomes"]
    sampled: Int[Tensor, " rows"]
    sampled_log_probs: Float[Tensor, " rows"]
    outcomes: Int[Tensor, " rows"]
    support_size: Int[Tensor, " rows"]
    old_kept_mass: Float[Tensor, " rows"]
    new_kept_mass: Float[Tensor, " rows"]
    cap_hit: Bool[Tensor, " rows"]
    entropy: Float[Tensor, " rows"] | None = None


@dataclass(frozen=True)
class NewPolicyReading:
    """What a rule reads from the new policy, without gradient, for :func:`~.kernels.tokens_triton.terms`.

    Attributes:
        normaliser: of the whole vocabulary, with its energy.
        values: logits at the old policy's ids, or log-probabilities at ``ids``.
        ids: ids kept of the new policy; None if the rule keeps none.
    """

    normaliser: Normaliser
    values: Float[Tensor, "rows ids"]
    ids: Int[Tensor, "rows ids"] | None = None


@dataclass(frozen=True)
class SupportRule:
    """One way to put two policies on common outcomes.

    Attributes:
        compare: the comparison in torch, from the new policy's logits, the old policy, the selection, and whether to
            return the entropy.
        read: what the Triton form needs from the new policy; None if the rule has no Triton form and GPUs use torch.
    """

    compare: Callable[[VocabLogits, SparsePolicy, Selection, bool], Comparison]
    read: Callable[[VocabLogits, SparsePolicy, Selection], NewPolicyReading] | None = None


def rule_named(name: str) -> SupportRule:
    """The rule of this name in :data:`RULES`.

    Raises:
        ValueError: there is none.
    """
    if name not in RULES:
        raise ValueError(f"support must be one of {tuple(RULES)}, got {name!r}")
    return RULES[name]


def compare(
    rule: str, logits: VocabLogits, old: SparsePolicy, selection: Selection, *, entropy: bool = False
) -> Comparison:
    """Put the new policy given by ``logits`` and the old one on common outcomes.

    If the vocabulary is sharded: one all-reduce (``anchored``) or one all-to-all and one all-gather (``union``) in the
    forward pass, nothing in the backward pass.

    Args:
        rule: a key of :data:`RULES`, ``union`` (published) or ``anchored``.
        logits: of the new policy; gradients flow to them.
        old: the old policy at the same rows.
        selection: the one that the old policy was selected with.
        entropy: whether to return the new policy's entropy.

    Raises:
        ValueError: an unknown rule.
    """
    return rule_named(rule).compare(logits, old, selection, entropy)


def _anchored(logits: VocabLogits, old: SparsePolicy, selection: Selection, want_entropy: bool) -> Comparison:
    new_log_probs, entropy = logits.log_probs_at(old.ids, entropy=want_entropy)
    support_size = (old.ids >= 0).sum(-1)
    has_rest = support_size < logits.shard.vocab_size
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
        cap_hit=_cap_hit(old, selection, logits.shard.vocab_size),
        entropy=entropy,
    )


def _rest(log_probs: Tensor, has_rest: Tensor) -> tuple[Tensor, Tensor]:
    """``[R, 1]`` log-mass outside ``log_probs [R, W]`` (``-inf`` if nothing is outside) and ``[R]`` mass inside."""
    mass = log_probs.exp().sum(-1)
    rest = torch.where(has_rest, (1 - mass).clamp_min(REST_FLOOR), 1.0).log()
    return torch.where(has_rest, rest, -math.inf).unsqueeze(-1), mass


def _read_anchored(logits: VocabLogits, old: SparsePolicy, selection: Selection) -> NewPolicyReading:
    normaliser, values = logits.logits_at(old.ids, entropy=True)
    return NewPolicyReading(normaliser, values)


def _union(logits: VocabLogits, old: SparsePolicy, selection: Selection, want_entropy: bool) -> Comparison:
    new, normaliser = select_with_normaliser(logits, old.sampled_ids, selection, entropy=want_entropy)
    only_new = torch.where(_find(new.ids, old.ids) >= 0, -1, new.ids)
    ids = torch.cat([old.ids, only_new], dim=-1)
    used = ids >= 0
    index = _find(old.ids, new.ids)
    kept_by_new = torch.cat([index >= 0, only_new >= 0], dim=-1)

    selected = torch.cat([new.log_probs.gather(-1, index.clamp_min(0)), new.log_probs], dim=-1)
    selected = torch.where(kept_by_new, selected, -math.inf)
    new_log_probs, entropy = logits.differentiable(selected, torch.where(kept_by_new, ids, -1), normaliser)
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
        cap_hit=_cap_hit(old, selection, logits.shard.vocab_size),
        entropy=entropy,
    )


def _read_union(logits: VocabLogits, old: SparsePolicy, selection: Selection) -> NewPolicyReading:
    new, normaliser = select_with_normaliser(logits, old.sampled_ids, selection, entropy=True)
    return NewPolicyReading(normaliser, new.log_probs, new.ids)


RULES: dict[str, SupportRule] = {
    "union": SupportRule(_union, read=_read_union),
    "anchored": SupportRule(_anchored, read=_read_anchored),
}
"""Every rule by its name, which is also the value of the setting ``support``."""


def _cap_hit(policy: SparsePolicy, selection: Selection, vocab_size: int) -> Tensor:
    size = (policy.ids >= 0).sum(-1)
    # The sampled id, if it was added, comes after the k selected ones.
    selected_mass = policy.log_probs[:, : selection.k].exp().sum(-1)
    return (size >= selection.k) & (size < vocab_size) & (selected_mass < selection.mass_to_keep)


def _find(ids: Tensor, among: Tensor) -> Tensor:
    """``[R, W]`` int64: index of each used id of ``ids [R, W]`` in the same row of ``among [R, M]``, -1 if absent."""
    ordered, order = among.sort(dim=-1)
    index = torch.searchsorted(ordered, ids.contiguous()).clamp_max(ordered.shape[-1] - 1)
    found = (ordered.gather(-1, index) == ids) & (ids >= 0)
    return torch.where(found, order.gather(-1, index), -1)
