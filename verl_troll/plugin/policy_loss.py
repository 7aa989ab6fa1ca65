"""The registered policy loss ``troll``: the projected ratio in verl's own ``ppo_loss``.

``ppo_loss`` keeps the unprojected log-probs, so that the KL to the reference and the entropy bonus are verl's own. The
projected ratio reaches the registered loss beside them, through :func:`projected_terms`; a loss that is called without
it refuses to run, because the engine was then not TROLL's.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, agg_loss, register_policy_loss
from verl.workers.config import ActorConfig

from verl_troll.core.loss import importance_ratio, keep_corrective_ratios, surrogate_losses
from verl_troll.plugin.settings import LOSS_MODE, TrollConfig


@dataclass
class ProjectedTerms:
    """Projected terms of one micro-batch, ``[B, T]``, and what the policy loss leaves for the engine.

    Attributes:
        regression_loss: scalar, to be added to the loss.
        shift: ``[2]``, mean of log q(o) - log p(o) and share of projected tokens, over the micro-batch.
    """

    settings: TrollConfig
    log_ratio: Tensor
    regression_kl: Tensor
    projected: Tensor
    regression_loss: Tensor | None = None
    shift: Tensor | None = None


_terms: contextvars.ContextVar[ProjectedTerms | None] = contextvars.ContextVar("verl_troll_terms", default=None)


@contextlib.contextmanager
def projected_terms(terms: ProjectedTerms) -> Iterator[None]:
    """Hand ``terms`` to the policy loss that is called inside."""
    token = _terms.set(terms)
    try:
        yield
    finally:
        _terms.reset(token)


def troll_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Policy-gradient part of the TROLL objective, with the signature of verl's policy losses.

    Both parts go through verl's ``agg_loss`` on the padded ``[B, T]`` matrices with the mini-batch's global
    information, so that they do not depend on how the mini-batch is cut or spread. The regression part is left in
    the :class:`ProjectedTerms`, so that ``actor/pg_loss`` compares with other losses.

    Raises:
        RuntimeError: no projected terms were handed over.
    """
    terms = _terms.get()
    if terms is None or config is None:
        raise RuntimeError(
            "policy loss 'troll' was called without projected terms: the actor does not run on a TROLL engine. "
            "Switch TROLL on with 'hydra.searchpath=[pkg://verl_troll.configs]' +troll=default, and run "
            "'verl-troll doctor' on this host."
        )
    log_ratio = terms.log_ratio
    if terms.settings.one_sided:
        log_ratio = keep_corrective_ratios(log_ratio, log_prob - old_log_prob, terms.projected, advantages)
    ratio = importance_ratio(log_ratio, response_mask, terms.settings.importance_ratio)  # type: ignore[arg-type]
    losses = surrogate_losses(ratio, advantages, rollout_is_weights)
    pg_loss = agg_loss(losses, response_mask, loss_agg_mode, **config.global_batch_info)
    terms.regression_loss = terms.settings.alpha * agg_loss(
        terms.regression_kl, response_mask, loss_agg_mode, **config.global_batch_info
    )
    with torch.no_grad():
        mask = response_mask.bool()
        tokens = mask.sum().clamp_min(1)
        shift = torch.where(mask, old_log_prob - log_prob, 0.0).sum() / tokens
        projected = torch.where(mask, terms.projected, 0.0).sum() / tokens
        terms.shift = torch.stack([shift, projected.to(shift.dtype)])
    return pg_loss, {}


def register() -> None:
    """Register ``troll`` among verl's policy losses; once per process.

    Raises:
        RuntimeError: another package took the name.
    """
    present = POLICY_LOSS_REGISTRY.get(LOSS_MODE)
    if present is troll_policy_loss:
        return
    if present is not None:
        raise RuntimeError(f"verl already has a policy loss {LOSS_MODE!r} from {present.__module__}")
    register_policy_loss(LOSS_MODE)(troll_policy_loss)
