"""TROLL's chain from the logits to the loss, as the plugin runs it."""

from __future__ import annotations

import torch
from torch import Tensor

from verl_troll.objective import TokenTerms, importance_ratio, surrogate_losses, token_terms
from verl_troll.plugin.metrics import token_statistics
from verl_troll.support import Comparison, SparsePolicy

KL_BOUND, DROPPED_MASS, ALPHA = 0.05, 1e-5, 1.0


def compact(policy: SparsePolicy) -> SparsePolicy:
    """The policy with as many places as its widest row uses, which is how it arrives in the update."""
    used = policy.ids >= 0
    order = used.int().sort(dim=-1, descending=True, stable=True).indices[:, : int(used.sum(-1).max())]
    ids = policy.ids.gather(-1, order)
    sampled_ids = policy.ids.gather(-1, policy.sampled.unsqueeze(-1))
    return SparsePolicy(ids, policy.log_probs.gather(-1, order), (ids == sampled_ids).int().argmax(-1))


def sampled_log_probs(policy: SparsePolicy) -> Tensor:
    """``[R]`` log-probabilities of the sampled ids."""
    return policy.log_probs.gather(-1, policy.sampled.unsqueeze(-1)).squeeze(-1)


def loss_from_terms(log_ratio: Tensor, regression_kl: Tensor, advantages: Tensor) -> Tensor:
    """The objective's negative, averaged over R tokens."""
    mask = torch.ones_like(log_ratio, dtype=torch.bool).unsqueeze(0)
    ratio = importance_ratio(log_ratio.unsqueeze(0), mask, "token").squeeze(0)
    return surrogate_losses(ratio, advantages).mean() + ALPHA * regression_kl.mean()


def projected_loss(comparison: Comparison, advantages: Tensor) -> tuple[Tensor, TokenTerms]:
    """The loss and its terms; the metrics are computed as well, as verl computes its own with its loss."""
    terms = token_terms(comparison, KL_BOUND)
    token_statistics(comparison, terms, KL_BOUND)
    return loss_from_terms(terms.log_ratio, terms.regression_kl, advantages), terms


def support_facts(old: SparsePolicy) -> dict[str, float]:
    """Mean and largest number of kept ids."""
    kept = (old.ids >= 0).sum(-1).float()
    return {"kept_ids": round(float(kept.mean()), 2), "kept_ids_max": int(kept.max())}


def projection_facts(terms: TokenTerms) -> dict[str, float]:
    """Share of projected tokens and the evaluations that one of them took."""
    projected = terms.projected
    spent = terms.projection.evaluations[projected].float()
    return {
        "projected_share": round(float(projected.float().mean()), 4),
        "evaluations": round(float(spent.mean()), 2) if spent.numel() else 0.0,
        "evaluations_max": int(spent.max()) if spent.numel() else 0,
    }
