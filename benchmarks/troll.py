"""TROLL from logits to loss, as the plugin runs it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from verl_troll.core.logits import LogitsSource
from verl_troll.core.loss import STATISTICS, PolicyTerms, importance_ratio, policy_terms, surrogate_losses
from verl_troll.core.support import SparsePolicy, SupportRule
from verl_troll.plugin.metrics import token_statistics

KL_BOUND, DROPPED_MASS, ALPHA = 0.05, 1e-5, 1.0


def compact(policy: SparsePolicy) -> SparsePolicy:
    """The policy, as wide as its widest row needs, which is how the update receives it."""
    used = policy.ids >= 0
    order = used.int().sort(dim=-1, descending=True, stable=True).indices[:, : int(used.sum(-1).max())]
    ids = policy.ids.gather(-1, order)
    sampled_ids = policy.ids.gather(-1, policy.sampled.unsqueeze(-1))
    return SparsePolicy(ids, policy.log_probs.gather(-1, order), (ids == sampled_ids).int().argmax(-1))


def sampled_log_probs(policy: SparsePolicy) -> Tensor:
    """``[R]`` log-probabilities of the sampled ids."""
    return policy.log_probs.gather(-1, policy.sampled.unsqueeze(-1)).squeeze(-1)


def loss_from_terms(log_ratio: Tensor, regression_kl: Tensor, advantages: Tensor) -> Tensor:
    """The negative objective, averaged over R tokens."""
    mask = torch.ones_like(log_ratio, dtype=torch.bool).unsqueeze(0)
    ratio = importance_ratio(log_ratio.unsqueeze(0), mask, "token").squeeze(0)
    return surrogate_losses(ratio, advantages).mean() + ALPHA * regression_kl.mean()


def projected_loss(
    rule: SupportRule,
    logits: Tensor | LogitsSource,
    rows: Tensor,
    old: SparsePolicy,
    advantages: Tensor,
    **options: Any,
) -> tuple[Tensor, PolicyTerms]:
    """The loss and its terms. Also computes the metrics, as verl does with its loss.

    ``options`` go to :func:`verl_troll.core.loss.policy_terms`.
    """
    terms = policy_terms(rule, logits, rows, old, kl_bound=KL_BOUND, dropped_mass=DROPPED_MASS, **options)
    token_statistics(terms)
    return loss_from_terms(terms.log_ratio, terms.regression_kl, advantages), terms


def support_facts(old: SparsePolicy) -> dict[str, float]:
    """Mean and largest number of kept ids."""
    kept = (old.ids >= 0).sum(-1).float()
    return {"kept_ids": round(float(kept.mean()), 2), "kept_ids_max": int(kept.max())}


def projection_facts(terms: PolicyTerms) -> dict[str, float]:
    """Share of projected tokens, and solver evaluations per projected token."""
    projected = terms.projected > 0
    spent = terms.statistics[STATISTICS.index("solver_evaluations")][projected]
    return {
        "projected_share": round(float(projected.float().mean()), 4),
        "evaluations": round(float(spent.mean()), 2) if spent.numel() else 0.0,
        "evaluations_max": int(spent.max()) if spent.numel() else 0,
    }
