"""The per-token terms of the TROLL objective (arXiv 2510.03817), to be maximised::

    J = mean_t [ ratio_t A_t  -  alpha KL(p_t || stop_gradient(pi_t)) ],      ratio_t = pi(o_t) / q(o_t)

Only log pi(o) carries the policy gradient; the regression term pulls the network itself into the region. Numerator
and denominator of the ratio come from the same comparison, so that the ratio is exactly 1 where p = q.

Shapes: R response tokens, B sequences of at most T response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from verl_troll.projection import Projection, StepSizeGradient, project
from verl_troll.support import Comparison

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
