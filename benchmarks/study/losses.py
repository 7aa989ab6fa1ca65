"""Arms that tell the projection from the regression: verl's own losses for the plain ratio p / q, plus TROLL's
regression term ``alpha KL(p || stop_gradient(pi))``.

They run on TROLL's engine, which projects each token and adds the regression; only the policy-gradient part is
another loss's. ``actor_rollout_ref.model.external_lib`` imports this module in verl's processes, which registers them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from verl.trainer.ppo.core_algos import get_policy_loss_fn, register_policy_loss
from verl.workers.config import FSDPActorConfig

from verl_troll.plugin.actor_config import TrollPolicyLossConfig
from verl_troll.plugin.policy_loss import troll_policy_loss

LOSSES = {"vanilla_regression": "vanilla", "dppo_kl_regression": "dppo_kl"}
"""verl's loss under each new name."""


PolicyLoss = Callable[..., tuple[Tensor, dict[str, Any]]]


def with_regression(inner: PolicyLoss) -> PolicyLoss:
    """``inner``, with TROLL's regression left for the engine, which adds it to what ``inner`` returns."""

    def loss(*args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
        # Leaves both parts of TROLL's loss with the engine; the policy part is not used.
        troll_policy_loss(*args, **kwargs)
        return inner(*args, **kwargs)

    return loss


@dataclass
class RegressionActorConfig(FSDPActorConfig):
    """verl's FSDP actor settings with TROLL's, but another ``loss_mode`` than ``troll``."""

    def __post_init__(self) -> None:
        """Raise :class:`ValueError` if the loss has no regression."""
        super().__post_init__()
        if not isinstance(self.policy_loss, TrollPolicyLossConfig) or self.policy_loss.loss_mode not in LOSSES:
            raise ValueError(f"loss_mode={self.policy_loss.loss_mode!r}: must be one of {', '.join(LOSSES)}")
        self.policy_loss.troll.host.check()
        object.__setattr__(self.engine, "troll", self.policy_loss.troll)


for _name, _inner in LOSSES.items():
    register_policy_loss(_name)(with_regression(get_policy_loss_fn(_inner)))
