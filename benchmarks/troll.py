"""TROLL from logits to loss, as the plugin runs it."""

from __future__ import annotations

import torch
from torch import Tensor

from verl_troll.core.kernels.constants import STATISTICS
from verl_troll.core.loss import BatchTerms, PolicyTerms, batch_losses, policy_terms
from verl_troll.core.support import Selection, SparsePolicy
from verl_troll.core.vocab import VocabLogits
from verl_troll.plugin.metrics import token_statistics
from verl_troll.plugin.settings import TrollConfig

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
    terms = BatchTerms(log_ratio.unsqueeze(0), regression_kl.unsqueeze(0), torch.zeros_like(log_ratio).unsqueeze(0))
    losses = batch_losses(
        terms,
        log_probs=terms.log_ratio,
        old_log_probs=terms.projected,
        advantages=advantages.unsqueeze(0),
        response_mask=torch.ones_like(terms.projected, dtype=torch.bool),
        aggregate=lambda losses, _: losses.mean(),
        alpha=ALPHA,
        max_log_ratio=TrollConfig.max_log_ratio,
    )
    return losses.policy + losses.regression


def projected_loss(
    rule: str, logits: VocabLogits, old: SparsePolicy, advantages: Tensor, *, k: int
) -> tuple[Tensor, PolicyTerms]:
    """The loss and its terms. Also computes the metrics, as verl does with its loss."""
    terms = policy_terms(rule, logits, old, Selection(k, DROPPED_MASS), kl_bound=KL_BOUND)
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
