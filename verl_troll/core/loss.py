"""The TROLL objective (arXiv 2510.03817), from logits to losses. Per token, to be maximised::

    J = mean_t [ ratio_t A_t  -  alpha KL(p_t || stop_gradient(pi_t)) ],      ratio_t = pi(o_t) / q(o_t)

Only log pi(o) carries the policy gradient; the regression term pulls the network itself into the region. Both parts of
the ratio come from the same comparison, so it is exactly 1 where p = q.

:func:`policy_terms` yields each token's contribution, :func:`batch_losses` the loss of a batch of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from verl_troll.core import kernels
from verl_troll.core.comparison import Comparison, SupportRule, compare, rule_named
from verl_troll.core.kernels import constants
from verl_troll.core.kernels.constants import STATISTICS
from verl_troll.core.logits import LogitGradient
from verl_troll.core.projection import Projection, StepSizeGradient, check_projection_settings, project
from verl_troll.core.support import Selection, SparsePolicy
from verl_troll.core.vocab import VocabLogits

ImportanceRatio = Literal["token", "sequence"]
IMPORTANCE_RATIOS: tuple[str, ...] = get_args(ImportanceRatio)


@dataclass(frozen=True)
class TokenTerms:
    """What response tokens contribute.

    Attributes:
        log_ratio: log pi(o) - log q(o), differentiable.
        regression_kl: KL(p || stop_gradient(pi)) in nats, differentiable; 0 inside the region.
        projected: p is outside the region.
        projection: the projection itself.
    """

    log_ratio: Float[Tensor, " rows"]
    regression_kl: Float[Tensor, " rows"]
    projected: Bool[Tensor, " rows"]
    projection: Projection


def token_terms(
    comparison: Comparison,
    kl_bound: float,
    step_size_gradient: StepSizeGradient = "implicit",
    *,
    form: kernels.Form = "auto",
) -> TokenTerms:
    """Project the new policy and read off the two terms of the objective.

    Raises:
        ValueError: ``kl_bound`` or ``step_size_gradient`` out of range.
    """
    projection = project(
        comparison.new_log_probs,
        comparison.old_log_probs,
        kl_bound,
        step_size_gradient=step_size_gradient,
        form=form,
    )
    index = comparison.sampled.unsqueeze(-1)
    log_ratio = (projection.log_probs.gather(-1, index) - comparison.old_log_probs.gather(-1, index)).squeeze(-1)
    projected = ~(projection.kl_before <= kl_bound)
    new = comparison.new_log_probs
    target = projection.log_probs.detach()
    # Inside the region p = pi, and unused outcomes have no mass: avoid -inf - (-inf) in both cases.
    live = projected.unsqueeze(-1) & (new.detach() > -torch.inf)
    gap = torch.where(live, new, 0.0) - torch.where(live, target, 0.0)
    regression_kl = (torch.where(live, new, -torch.inf).exp() * gap).sum(-1)
    return TokenTerms(log_ratio, regression_kl, projected, projection)


@dataclass(frozen=True)
class PolicyTerms:
    """What response tokens contribute to loss and metrics; all float32, or float64 like the logits.

    Attributes:
        log_ratio: log pi(o) - log q(o), differentiable down to the logits.
        regression_kl: KL(p || stop_gradient(pi)) in nats, differentiable; 0 inside the region.
        sampled_log_probs: log p(o) over the full vocabulary, differentiable.
        entropy: of the whole new policy in nats, differentiable, if requested.
        statistics: the rows are those of :data:`STATISTICS`.
    """

    log_ratio: Float[Tensor, " rows"]
    regression_kl: Float[Tensor, " rows"]
    sampled_log_probs: Float[Tensor, " rows"]
    entropy: Float[Tensor, " rows"] | None
    statistics: Float[Tensor, "12 rows"]

    @property
    def projected(self) -> Float[Tensor, " rows"]:
        """1 where p is outside the region, 0 elsewhere."""
        return self.statistics[STATISTICS.index("projected_share")]


def policy_terms(
    rule: str,
    logits: VocabLogits,
    old: SparsePolicy,
    selection: Selection,
    *,
    kl_bound: float,
    step_size_gradient: StepSizeGradient = "implicit",
    entropy: bool = False,
) -> PolicyTerms:
    """The whole chain of each token, from the new policy's logits to the two terms of the objective.

    The torch form is :func:`verl_troll.core.comparison.compare` followed by :func:`token_terms`; the Triton form gives
    the same with three kernels forward (``anchored``: two) and two backward, and the host never waits. Collectives as
    in :func:`~verl_troll.core.comparison.compare`.

    Args:
        rule, logits, old, selection, entropy: as in :func:`~verl_troll.core.comparison.compare`.
        kl_bound, step_size_gradient: as in :func:`~verl_troll.core.projection.project`.

    Raises:
        ValueError: a setting out of range.
    """
    support_rule = rule_named(rule)
    check_projection_settings(kl_bound, step_size_gradient)
    if logits.source.triton and support_rule.read is not None and selection.k <= kernels.MAX_K_OF_TERMS:
        settings = _Settings(support_rule, selection, kl_bound, step_size_gradient == "implicit", entropy)
        return PolicyTerms(*_PolicyTerms.apply(logits, old, settings, *logits.source.tensors))  # type: ignore[no-untyped-call]
    comparison = compare(rule, logits, old, selection, entropy=entropy)
    terms = token_terms(comparison, kl_bound, step_size_gradient, form=logits.source.form)
    return PolicyTerms(
        terms.log_ratio,
        terms.regression_kl,
        comparison.sampled_log_probs,
        comparison.entropy,
        _statistics(comparison, terms),
    )


@torch.no_grad()
def _statistics(comparison: Comparison, terms: TokenTerms) -> Tensor:
    projection = terms.projection
    rows = (
        projection.kl_before,
        projection.kl,
        terms.projected,
        terms.projected & (comparison.outcomes == 2),
        projection.step_size,
        terms.regression_kl,
        comparison.support_size,
        comparison.old_kept_mass,
        comparison.new_kept_mass,
        comparison.cap_hit,
        projection.evaluations,
        ~projection.converged,
    )
    return torch.stack([row.to(terms.log_ratio.dtype) for row in rows])


class _Settings(NamedTuple):
    rule: SupportRule
    selection: Selection
    kl_bound: float
    implicit: bool
    entropy: bool


class _PolicyTerms(torch.autograd.Function):
    """The fields of :class:`PolicyTerms` through the Triton kernels; gradients to the source's tensors."""

    @staticmethod
    def forward(
        ctx: Any, logits: VocabLogits, old: SparsePolicy, settings: _Settings, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        from verl_troll.core.kernels import tokens_triton

        assert settings.rule.read is not None
        new = settings.rule.read(logits, old, settings.selection)
        max_logit, sumexp, energy = new.normaliser
        values, statistics, ids, *gradients = tokens_triton.terms(
            old.ids,
            old.log_probs,
            old.sampled,
            new.ids,
            new.values,
            max_logit,
            sumexp,
            kl_bound=settings.kl_bound,
            tolerance=constants.TOLERANCE,
            implicit=settings.implicit,
            vocab_size=logits.shard.vocab_size,
            k=settings.selection.k,
            mass_to_keep=settings.selection.mass_to_keep,
        )
        ctx.save_for_backward(logits.rows, ids, old.sampled, max_logit, sumexp, energy, *gradients, *tensors)
        ctx.builder, ctx.shard, ctx.entropy = logits.source.builder, logits.shard, settings.entropy
        ctx.mark_non_differentiable(statistics)
        return *values.unbind(), new.normaliser.entropy() if settings.entropy else None, statistics

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_ratio: Tensor,
        grad_regression: Tensor,
        grad_sampled: Tensor,
        grad_entropy: Tensor | None,
        _: Tensor,
    ) -> tuple[Tensor | None, ...]:
        from verl_troll.core.kernels import tokens_triton

        rows, ids, sampled, max_logit, sumexp, energy, ratio_gradient, regression_gradient, *tensors = ctx.saved_tensors
        corrections, level, slope = tokens_triton.combine(
            (grad_ratio, grad_regression, grad_sampled),
            grad_entropy if ctx.entropy else None,
            ratio_gradient,
            regression_gradient,
            sampled,
            sumexp,
            energy,
        )
        logits = VocabLogits(ctx.builder(*tensors), rows, ctx.shard)
        gradient = LogitGradient(max_logit, level, slope, ids, corrections)
        return (None,) * 3 + logits.gradients(gradient, ctx.needs_input_grad[3:])


def importance_ratio(
    log_ratio: Float[Tensor, "sequences tokens"],
    response_mask: Tensor,
    kind: ImportanceRatio,
    max_log_ratio: float = math.inf,
) -> Float[Tensor, "sequences tokens"]:
    """Importance ratios of response tokens.

    ``token``: ``pi(o_t) / q(o_t)``. ``sequence``: the GSPO form (arXiv 2507.18071)
    ``stop_gradient(exp(mean_t log_ratio_t)) * pi(o_t) / stop_gradient(pi(o_t))``.

    The trust region does not limit the ratio of a rare token: with log q(o) = -128 and log pi(o) = -9 the token adds
    .015 nats to KL(pi || q), and its ratio is e^119.

    Args:
        log_ratio: log pi(o) - log q(o).
        response_mask: of the same shape, bool or 0/1; masked tokens get ratio 1 and no gradient.
        max_log_ratio: each token's log-ratio is clamped to plus and minus this many nats; a clamped token has no
            gradient.

    Raises:
        ValueError: an unknown kind.
    """
    mask = response_mask.bool()
    log_ratio = torch.where(mask, log_ratio, 0.0).clamp(-max_log_ratio, max_log_ratio)
    if kind == "token":
        return log_ratio.exp()
    if kind == "sequence":
        lengths = mask.sum(-1, keepdim=True).clamp_min(1)
        mean = log_ratio.detach().sum(-1, keepdim=True) / lengths
        return torch.where(mask, (mean + log_ratio - log_ratio.detach()).exp(), 1.0)
    raise ValueError(f"importance_ratio must be one of {IMPORTANCE_RATIOS}, got {kind!r}")


def keep_corrective_ratios(
    log_ratio: Float[Tensor, "sequences tokens"],
    plain_log_ratio: Float[Tensor, "sequences tokens"],
    projected: Tensor,
    advantages: Float[Tensor, "sequences tokens"],
) -> Float[Tensor, "sequences tokens"]:
    """Log-ratios, with the plain one for tokens that left the region *against* their advantage.

    Such a token was pushed out by others: its probability fell although its advantage is positive, or rose although it
    is negative. Its projected ratio has little or no gradient; the plain one pulls it back, as PPO's minimum of clipped
    and unclipped does. Not in the paper; for study.

    Args:
        log_ratio: log pi(o) - log q(o).
        plain_log_ratio: log p(o) - log q(o).
        projected: of the same shape, nonzero outside the region.
    """
    against = projected.bool() & (advantages * plain_log_ratio.detach() < 0)
    return torch.where(against, plain_log_ratio, log_ratio)


def surrogate_losses(
    ratio: Float[Tensor, "*batch"], advantages: Float[Tensor, "*batch"], weights: Float[Tensor, "*batch"] | None = None
) -> Float[Tensor, "*batch"]:
    """Policy-gradient losses ``-ratio * A``, times the rollout-correction weights if there are any."""
    losses = -advantages * ratio
    return losses if weights is None else losses * weights


@dataclass(frozen=True)
class BatchTerms:
    """The terms of a batch of sequences, padded.

    Attributes:
        log_ratio: log pi(o) - log q(o).
        regression_kl: KL(p || stop_gradient(pi)) in nats.
        projected: nonzero outside the region.
    """

    log_ratio: Float[Tensor, "sequences tokens"]
    regression_kl: Float[Tensor, "sequences tokens"]
    projected: Tensor


@dataclass(frozen=True)
class BatchLosses:
    """The loss of a batch in its two parts, how far the policy moved, and tokens out of the ordinary.

    Attributes:
        policy: scalar, the policy-gradient part.
        regression: scalar, the regression part, times alpha.
        shift: mean of log q(o) - log p(o), and share of projected tokens; without gradient.
        unusual: number of tokens whose log-ratio was clamped, and of those whose losses are not finite.
    """

    policy: Float[Tensor, ""]
    regression: Float[Tensor, ""]
    shift: Float[Tensor, " 2"]
    unusual: Float[Tensor, " 2"]


def batch_losses(
    terms: BatchTerms,
    *,
    log_probs: Float[Tensor, "sequences tokens"],
    old_log_probs: Float[Tensor, "sequences tokens"],
    advantages: Float[Tensor, "sequences tokens"],
    response_mask: Tensor,
    aggregate: Callable[[Tensor, Tensor], Tensor],
    alpha: float,
    max_log_ratio: float,
    ratio: ImportanceRatio = "token",
    one_sided: bool = False,
    weights: Float[Tensor, "sequences tokens"] | None = None,
) -> BatchLosses:
    """The loss of a batch from its tokens' terms.

    Args:
        log_probs, old_log_probs: log p(o) and log q(o) over the full vocabulary.
        response_mask: bool or 0/1.
        aggregate: maps losses of this shape and the mask to a scalar, for example their mean.
        alpha: weight of the regression term.
        max_log_ratio, ratio: see :func:`importance_ratio`.
        one_sided: see :func:`keep_corrective_ratios`.
        weights: of rollout correction.
    """
    log_ratio = terms.log_ratio
    if one_sided:
        log_ratio = keep_corrective_ratios(log_ratio, log_probs - old_log_probs, terms.projected, advantages)
    losses = surrogate_losses(importance_ratio(log_ratio, response_mask, ratio, max_log_ratio), advantages, weights)
    with torch.no_grad():
        mask = response_mask.bool()
        tokens = mask.sum().clamp_min(1)
        shift = torch.where(mask, old_log_probs - log_probs, 0.0).sum() / tokens
        projected = torch.where(mask, terms.projected, 0.0).sum() / tokens
        limited = mask & (log_ratio.abs() > max_log_ratio)
        broken = mask & ~(losses.isfinite() & terms.regression_kl.isfinite())
    return BatchLosses(
        policy=aggregate(losses, response_mask),
        regression=alpha * aggregate(terms.regression_kl, response_mask),
        shift=torch.stack([shift, projected.to(shift.dtype)]),
        unusual=torch.stack([limited.sum(), broken.sum()]).to(shift.dtype),
    )
