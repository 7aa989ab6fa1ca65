"""The per-token terms of the TROLL objective (arXiv 2510.03817), to be maximised::

    J = mean_t [ ratio_t A_t  -  alpha KL(p_t || stop_gradient(pi_t)) ],      ratio_t = pi(o_t) / q(o_t)

Only log pi(o) carries the policy gradient; the regression term pulls the network itself into the region. Numerator
and denominator of the ratio come from the same comparison, so that the ratio is exactly 1 where p = q.

Shapes: R response tokens, B sequences of at most T response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from verl_troll.core import kernels
from verl_troll.core.logits import LogitsSource, as_source, fused
from verl_troll.core.projection import TOLERANCE, Projection, StepSizeGradient, check_projection_settings, project
from verl_troll.core.support import (
    Comparison,
    SparsePolicy,
    SupportRule,
    at,
    check_support_settings,
    compare,
    mass_to_keep,
    select_with_normaliser,
)
from verl_troll.core.vocab import VocabShard, values_at

ImportanceRatio = Literal["token", "sequence"]
IMPORTANCE_RATIOS: tuple[str, ...] = get_args(ImportanceRatio)


@dataclass(frozen=True)
class TokenTerms:
    """What one response token contributes.

    Attributes:
        log_ratio: ``[R]`` log pi(o) - log q(o), differentiable.
        regression_kl: ``[R]`` KL(p || stop_gradient(pi)) in nats, differentiable; 0 inside the region.
        projected: ``[R]`` bool, p lies outside the region.
        projection: the projection itself.
    """

    log_ratio: Tensor
    regression_kl: Tensor
    projected: Tensor
    projection: Projection


def token_terms(
    comparison: Comparison, kl_bound: float, step_size_gradient: StepSizeGradient = "implicit"
) -> TokenTerms:
    """Project the new policy and read off the two terms of the objective.

    Raises:
        ValueError: ``kl_bound`` or ``step_size_gradient`` out of range.
    """
    projection = project(
        comparison.new_log_probs, comparison.old_log_probs, kl_bound, step_size_gradient=step_size_gradient
    )
    place = comparison.sampled.unsqueeze(-1)
    log_ratio = (projection.log_probs.gather(-1, place) - comparison.old_log_probs.gather(-1, place)).squeeze(-1)
    projected = ~(projection.kl_before <= kl_bound)
    new = comparison.new_log_probs
    target = projection.log_probs.detach()
    # Rows inside the region have p = pi; unused places have no mass. Neither may meet -inf - (-inf).
    live = projected.unsqueeze(-1) & (new.detach() > -torch.inf)
    gap = torch.where(live, new, 0.0) - torch.where(live, target, 0.0)
    regression_kl = (torch.where(live, new, -torch.inf).exp() * gap).sum(-1)
    return TokenTerms(log_ratio, regression_kl, projected, projection)


# What :class:`PolicyTerms` keeps of each token for the metrics; the meaning of each is in ``plugin/metrics.py``.
STATISTICS = (
    "kl_before",
    "kl_after",
    "projected_share",
    "fixed_share",
    "step_size",
    "regression_kl",
    "support_size",
    "old_kept_mass",
    "new_kept_mass",
    "cap_hit_share",
    "solver_evaluations",
    "unconverged",
)


@dataclass(frozen=True)
class PolicyTerms:
    """What R response tokens contribute to the loss and to the metrics; all float32, or the logits' float64.

    Attributes:
        log_ratio: ``[R]`` log pi(o) - log q(o), differentiable down to the logits.
        regression_kl: ``[R]`` KL(p || stop_gradient(pi)) in nats, differentiable; 0 inside the region.
        sampled_log_probs: ``[R]`` log p(o) over the full vocabulary, differentiable.
        entropy: ``[R]`` of the whole new policy in nats, differentiable, where it was asked for.
        statistics: ``[12, R]``, the rows of :data:`STATISTICS`.
    """

    log_ratio: Tensor
    regression_kl: Tensor
    sampled_log_probs: Tensor
    entropy: Tensor | None
    statistics: Tensor

    @property
    def projected(self) -> Tensor:
        """``[R]``, 1 where p lies outside the region, 0 elsewhere."""
        return self.statistics[STATISTICS.index("projected_share")]


def policy_terms(
    rule: SupportRule,
    logits: Tensor | LogitsSource,
    rows: Tensor,
    old: SparsePolicy,
    *,
    kl_bound: float,
    k: int,
    dropped_mass: float,
    step_size_gradient: StepSizeGradient = "implicit",
    shard: VocabShard | None = None,
    entropy: bool = False,
    reuse_logits: bool = False,
) -> PolicyTerms:
    """The whole chain of one token, from the new policy's logits to the two terms of the objective.

    The same as :func:`verl_troll.core.support.compare` followed by :func:`token_terms`, which is its torch form. On a
    GPU it takes three kernels forward (``anchored``: two) and two backward, and the host waits for nothing. Collectives
    as in :func:`~verl_troll.core.support.compare`.

    Args:
        rule, logits, rows, old, k, dropped_mass, shard, entropy, reuse_logits: as in
            :func:`~verl_troll.core.support.compare`.
        kl_bound, step_size_gradient: as in :func:`~verl_troll.core.projection.project`.

    Raises:
        ValueError: a setting out of range.
    """
    check_support_settings(k, dropped_mass, rule)
    check_projection_settings(kl_bound, step_size_gradient)
    source = as_source(logits, reuse=reuse_logits)
    shard = shard or VocabShard.whole(source.columns)
    if fused(source) and k <= kernels.MAX_K_OF_TERMS:
        settings = _Settings(rule, kl_bound, k, dropped_mass, step_size_gradient == "implicit", entropy)
        return PolicyTerms(*_PolicyTerms.apply(source, shard, rows, old, settings, *source.tensors))  # type: ignore[no-untyped-call]
    comparison = compare(rule, source, rows, old, k=k, dropped_mass=dropped_mass, shard=shard, entropy=entropy)
    terms = token_terms(comparison, kl_bound, step_size_gradient)
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
    columns = (
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
    return torch.stack([column.to(terms.log_ratio.dtype) for column in columns])


class _Settings(NamedTuple):
    rule: str
    kl_bound: float
    k: int
    dropped_mass: float
    implicit: bool
    entropy: bool


class _PolicyTerms(torch.autograd.Function):
    """The fields of :class:`PolicyTerms` through the kernels; gradients to the tensors of the source."""

    @staticmethod
    def forward(
        ctx: Any,
        source: LogitsSource,
        shard: VocabShard,
        rows: Tensor,
        old: SparsePolicy,
        settings: _Settings,
        *tensors: Tensor,
    ) -> tuple[Tensor | None, ...]:
        new_ids = None
        if settings.rule == "anchored":
            normaliser, new_values = values_at(source, rows, old.ids, shard, entropy=True)
        else:
            new, normaliser = select_with_normaliser(
                source, rows, at(old.ids, old.sampled), settings.k, settings.dropped_mass, shard, True
            )
            new_ids, new_values = new.ids, new.log_probs
        peak, mass, energy = normaliser
        values, statistics, ids, *gradients = kernels.terms(
            old.ids,
            old.log_probs,
            old.sampled,
            new_ids,
            new_values,
            peak,
            mass,
            kl_bound=settings.kl_bound,
            tolerance=TOLERANCE,
            implicit=settings.implicit,
            vocab_size=shard.vocab_size,
            k=settings.k,
            mass_to_keep=mass_to_keep(settings.dropped_mass),
        )
        ctx.save_for_backward(rows, ids, old.sampled, peak, mass, energy, *gradients, *tensors)
        ctx.builder, ctx.shard, ctx.entropy = source.builder, shard, settings.entropy
        ctx.mark_non_differentiable(statistics)
        return *values.unbind(), normaliser.entropy() if settings.entropy else None, statistics

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_ratio: Tensor, grad_regression: Tensor, grad_sampled: Tensor, grad_entropy: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        rows, ids, sampled, peak, mass, energy, ratio_gradient, regression_gradient, *tensors = ctx.saved_tensors
        corrections, level, slope = kernels.combine(
            (grad_ratio, grad_regression, grad_sampled),
            grad_entropy if ctx.entropy else None,
            ratio_gradient,
            regression_gradient,
            sampled,
            mass,
            energy,
        )
        source = ctx.builder(*tensors)
        columns = ctx.shard.columns_of(ids, source)
        gradients: tuple[Tensor | None, ...] = source.gradients(
            rows, ctx.shard.columns, peak, level, slope, columns, corrections, ctx.needs_input_grad[5:]
        )
        return (None,) * 5 + gradients


def importance_ratio(log_ratio: Tensor, response_mask: Tensor, kind: ImportanceRatio) -> Tensor:
    """Importance ratios of response tokens, unclipped.

    ``token``: ``pi(o_t) / q(o_t)``. ``sequence``: the GSPO form (arXiv 2507.18071)
    ``stop_gradient(exp(mean_t log_ratio_t)) * pi(o_t) / stop_gradient(pi(o_t))``.

    Args:
        log_ratio: ``[B, T]`` log pi(o) - log q(o).
        response_mask: ``[B, T]`` bool or 0/1; masked tokens get ratio 1 and no gradient.

    Raises:
        ValueError: an unknown kind.
    """
    mask = response_mask.bool()
    log_ratio = torch.where(mask, log_ratio, 0.0)
    if kind == "token":
        return log_ratio.exp()
    if kind == "sequence":
        lengths = mask.sum(-1, keepdim=True).clamp_min(1)
        mean = log_ratio.detach().sum(-1, keepdim=True) / lengths
        return torch.where(mask, (mean + log_ratio - log_ratio.detach()).exp(), 1.0)
    raise ValueError(f"importance_ratio must be one of {IMPORTANCE_RATIOS}, got {kind!r}")


def keep_corrective_ratios(log_ratio: Tensor, plain_log_ratio: Tensor, projected: Tensor, advantages: Tensor) -> Tensor:
    """Log-ratios in which tokens that left the region *against* their advantage are not projected.

    Such a token was pushed out by others: its probability fell although its advantage is positive, or rose although
    it is negative. Its projected ratio has little or no gradient; the plain one pulls it back, as PPO's minimum of
    clipped and unclipped does. Not in the paper; for study.

    Args:
        log_ratio: ``[B, T]`` log pi(o) - log q(o).
        plain_log_ratio: ``[B, T]`` log p(o) - log q(o).
        projected: ``[B, T]``, nonzero outside the region.
        advantages: ``[B, T]``.
    """
    against = projected.bool() & (advantages * plain_log_ratio.detach() < 0)
    return torch.where(against, plain_log_ratio, log_ratio)


def surrogate_losses(ratio: Tensor, advantages: Tensor, weights: Tensor | None = None) -> Tensor:
    """``[B, T]`` policy-gradient losses ``-ratio * A``, times the rollout-correction weights where there are any."""
    losses = -advantages * ratio
    return losses if weights is None else losses * weights
