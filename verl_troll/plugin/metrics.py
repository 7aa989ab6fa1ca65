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

Where the rollout engine supplies the old policy, and the trainer names the version of its weights:

    age, age_max                how many versions before the trained weights those were that sampled a token
    age_0_share, age_1_share, age_2_share, age_3_4_share, age_5_8_share  share of tokens of that age
    age_above_8_share           share of older tokens
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from verl.utils.metric import AggregationType, Metric

from verl_troll.core.kernels.constants import STATISTICS
from verl_troll.core.loss import PolicyTerms

_MAXIMA = ("kl_before", "kl_after")
_UNUSUAL = ("ratio_limited", "nonfinite")
# Shares of tokens by age: up to 0, 1, 2, 4, 8, and older.
_AGES = ("0", "1", "2", "3_4", "5_8", "above_8")


@torch.no_grad()
def token_statistics(terms: PolicyTerms) -> tuple[Tensor, Tensor]:
    """Sums ``[12]`` over the tokens, in the order of :data:`STATISTICS`, and maxima ``[2]``."""
    statistics = terms.statistics
    if statistics.shape[1] == 0:
        return statistics.sum(-1), statistics.new_zeros(len(_MAXIMA))
    return statistics.sum(-1), statistics[: len(_MAXIMA)].amax(-1)


@torch.no_grad()
def age_statistics(ages: Tensor) -> tuple[Tensor, Tensor]:
    """Sums ``[7]`` and maxima ``[1]`` of ``ages [M]``, which are NaN where unknown; they follow those of the tokens.

    Sums are that of the ages, and the numbers of tokens of known age and of tokens older than 0, 1, 2, 4 and 8.
    """
    oldest = (1 << torch.arange(len(_AGES) - 1, device=ages.device)) >> 1
    older = (ages.unsqueeze(-1) > oldest).sum(0)
    known = ages.isfinite().sum(0, keepdim=True)
    sums = torch.cat([ages.sum(0, keepdim=True), known, older])
    return sums, ages.new_zeros(1) if ages.shape[0] == 0 else ages.amax(0, keepdim=True)


def as_metrics(
    sums: list[float],
    maxima: list[float],
    unusual: list[float],
    batch_num_tokens: int,
    dp_size: int,
    kl_bound: float,
) -> dict[str, Metric]:
    """verl metrics of one micro-batch.

    Args:
        sums, maxima: those of :func:`token_statistics`, and after them those of :func:`age_statistics`, if any.
        unusual: as in :class:`~verl_troll.core.loss.BatchLosses`.
    """
    scale = dp_size / max(batch_num_tokens, 1)
    metrics = {
        f"troll/{name}": Metric(AggregationType.SUM, value * (dp_size if name == "unconverged" else scale))
        for name, value in zip(STATISTICS, sums, strict=False)
    }
    for name, value in zip(_MAXIMA, maxima, strict=False):
        metrics[f"troll/{name}_max"] = Metric(AggregationType.MAX, value)
    if len(maxima) > len(_MAXIMA):
        age, *older = sums[len(STATISTICS) :]
        metrics["troll/age"] = Metric(AggregationType.SUM, age * scale)
        metrics["troll/age_max"] = Metric(AggregationType.MAX, maxima[-1])
        for name, (more, fewer) in zip(_AGES, itertools.pairwise([*older, 0.0]), strict=True):
            metrics[f"troll/age_{name}_share"] = Metric(AggregationType.SUM, (more - fewer) * scale)
    violation = maxima[_MAXIMA.index("kl_after")] / kl_bound - 1
    for name, count in zip(_UNUSUAL, unusual, strict=True):
        metrics[f"troll/{name}"] = Metric(AggregationType.SUM, count * dp_size)
    # NaN compares as False, so that it stays visible.
    metrics["troll/violation_max"] = Metric(AggregationType.MAX, 0.0 if violation < 0 else violation)
    return metrics
