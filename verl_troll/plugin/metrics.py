"""Metrics under ``troll/``, reduced on the device and read by the host once per micro-batch.

Means are over all response tokens of the mini-batch, however it is cut: each micro-batch contributes its sum over the
mini-batch's token count, verl adds those up and averages over data-parallel ranks.

    kl_before, kl_before_max    KL(p || q) in nats
    kl_after, kl_after_max      KL(pi || q) in nats
    violation_max               largest relative excess of KL(pi || q) over the bound
    projected_share             share of tokens outside the region before projection
    fixed_share                 share of tokens with an active bound and two outcomes: pi then depends on q alone,
                                so that the implicit policy gradient is zero
    step_size                   t in (0, 1], 1 inside the region
    regression_kl               KL(p || pi) in nats
    support_size                ids kept of the old policy
    old_kept_mass               mass of the old policy on the ids kept of it
    new_kept_mass               mass of the new policy on the ids kept of it (union) or of the old one (anchored)
    cap_hit_share               share of tokens where the cap k ended the old policy's selection
    solver_evaluations          evaluations of KL(pi_t || q) per token
    unconverged                 tokens per mini-batch whose step size was not found to tolerance
"""

from __future__ import annotations

import torch
from torch import Tensor
from verl.utils.metric import AggregationType, Metric

from verl_troll.objective import TokenTerms
from verl_troll.support import Comparison

_MEANS = (
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
)
_MAXIMA = ("kl_before_max", "kl_after_max", "violation_max")


@torch.no_grad()
def token_statistics(comparison: Comparison, terms: TokenTerms, kl_bound: float) -> tuple[Tensor, Tensor]:
    """Sums ``[12]`` over the given tokens (means in the order above, then unconverged) and maxima ``[3]``."""
    projection = terms.projection
    fixed = terms.projected & (comparison.outcomes == 2)
    columns = (
        projection.kl_before,
        projection.kl,
        terms.projected,
        fixed,
        projection.step_size,
        terms.regression_kl,
        comparison.support_size,
        comparison.old_kept_mass,
        comparison.new_kept_mass,
        comparison.cap_hit,
        projection.evaluations,
        ~projection.converged,
    )
    sums = torch.stack([column.float().sum() for column in columns])
    extremes = torch.stack([projection.kl_before, projection.kl, projection.kl / kl_bound - 1]).float()
    floor = extremes.new_zeros(3, 1)
    return sums, torch.cat([extremes, floor], dim=-1).amax(-1)


def as_metrics(sums: Tensor, maxima: Tensor, batch_num_tokens: int, dp_size: int) -> dict[str, Metric]:
    """verl metrics of one micro-batch from :func:`token_statistics`."""
    values = torch.cat([sums, maxima]).tolist()
    scale = dp_size / max(batch_num_tokens, 1)
    metrics = {
        f"troll/{name}": Metric(AggregationType.SUM, value * scale) for name, value in zip(_MEANS, values, strict=False)
    }
    metrics["troll/unconverged"] = Metric(AggregationType.SUM, values[len(_MEANS)] * dp_size)
    for name, value in zip(_MAXIMA, values[len(_MEANS) + 1 :], strict=True):
        metrics[f"troll/{name}"] = Metric(AggregationType.MAX, value)
    return metrics
