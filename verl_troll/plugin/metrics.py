"""Metrics under ``troll/``, reduced on the device and read by the host once per micro-batch.

Means are over all response tokens of the mini-batch, however it is cut: each micro-batch contributes its sum divided by
the mini-batch's number of tokens; verl adds these up and averages over data-parallel ranks.

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
    ratio_limited               tokens per mini-batch whose log-ratio was clamped
    nonfinite                   tokens per mini-batch whose loss is infinite or NaN; above 0 the mini-batch is skipped
"""

from __future__ import annotations

import torch
from torch import Tensor
from verl.utils.metric import AggregationType, Metric

from verl_troll.core.kernels.constants import STATISTICS
from verl_troll.core.loss import PolicyTerms

_MAXIMA = ("kl_before", "kl_after")
_UNUSUAL = ("ratio_limited", "nonfinite")


@torch.no_grad()
def token_statistics(terms: PolicyTerms) -> tuple[Tensor, Tensor]:
    """Sums ``[12]`` over the tokens, in the order of :data:`STATISTICS`, and maxima ``[2]``."""
    statistics = terms.statistics
    if statistics.shape[1] == 0:
        return statistics.sum(-1), statistics.new_zeros(len(_MAXIMA))
    return statistics.sum(-1), statistics[: len(_MAXIMA)].amax(-1)


def as_metrics(
    values: list[float], unusual: list[float], batch_num_tokens: int, dp_size: int, kl_bound: float
) -> dict[str, Metric]:
    """verl metrics of one micro-batch.

    Args:
        values: the sums and maxima of :func:`token_statistics`, in one list.
        unusual: as in :class:`~verl_troll.core.loss.BatchLosses`.
    """
    scale = dp_size / max(batch_num_tokens, 1)
    metrics = {
        f"troll/{name}": Metric(AggregationType.SUM, value * (dp_size if name == "unconverged" else scale))
        for name, value in zip(STATISTICS, values, strict=False)
    }
    for name, value in zip(_MAXIMA, values[len(STATISTICS) :], strict=True):
        metrics[f"troll/{name}_max"] = Metric(AggregationType.MAX, value)
    violation = values[-1] / kl_bound - 1
    for name, count in zip(_UNUSUAL, unusual, strict=True):
        metrics[f"troll/{name}"] = Metric(AggregationType.SUM, count * dp_size)
    # NaN compares as False, so that it stays visible.
    metrics["troll/violation_max"] = Metric(AggregationType.MAX, 0.0 if violation < 0 else violation)
    return metrics
