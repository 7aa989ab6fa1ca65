"""The registered policy loss ``troll``: the projected ratio in verl's own ``ppo_loss``.

``ppo_loss`` keeps the unprojected log-probs, so that the KL to the reference and the entropy bonus are verl's own. The
projected ratio reaches the registered loss beside them, through :func:`projected_terms`; a loss that is called without
it refuses to run, because the engine was then not TROLL's.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, agg_loss, register_policy_loss
from verl.workers.config import ActorConfig

from verl_troll.core.loss import BatchLosses, BatchTerms, batch_losses
from verl_troll.plugin.settings import LOSS_MODE, TrollConfig


@dataclass
class ProjectedTerms:
    """The terms of one micro-batch, and the losses that the policy loss leaves for the engine.

    Attributes:
        padded: returns the terms in the shape of verl's log-probs.
    """

    settings: TrollConfig
    padded: Callable[[torch.Size], BatchTerms]
    losses: BatchLosses | None = None


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
            "Switch TROLL on with +troll=default; 'verl-troll doctor -- <your overrides>' says what is wrong."
        )
    settings = terms.settings
    terms.losses = batch_losses(
        terms.padded(log_prob.shape),
        log_probs=log_prob,
        old_log_probs=old_log_prob,
        advantages=advantages,
        response_mask=response_mask,
        aggregate=partial(agg_loss, loss_agg_mode=loss_agg_mode, **config.global_batch_info),
        alpha=settings.alpha,
        max_log_ratio=settings.max_log_ratio,
        ratio=settings.importance_ratio,  # type: ignore[arg-type]
        one_sided=settings.one_sided,
        weights=rollout_is_weights,
    )
    return terms.losses.policy, {}


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
