"""verl's actor configuration with TROLL's settings in it; built on the driver before Ray starts, and in each worker.

``configs/troll/default.yaml`` points ``actor_rollout_ref.actor._target_`` at :func:`actor_config`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from verl.workers.config import ActorConfig, FSDPActorConfig, PolicyLossConfig

from verl_troll.plugin.engines import check_engine
from verl_troll.plugin.settings import LOSS_MODE, TrollConfig, refusal


@dataclass
class TrollPolicyLossConfig(PolicyLossConfig):
    """verl's policy-loss settings with the group ``troll`` beside them."""

    troll: TrollConfig = field(default_factory=TrollConfig)


def _check_actor(actor: ActorConfig, pad_to_length: bool) -> None:
    """Checks that need the actor's own settings."""
    loss = actor.policy_loss
    if not isinstance(loss, TrollPolicyLossConfig):
        raise refusal("actor_rollout_ref.actor.policy_loss._target_", type(loss).__name__, "TrollPolicyLossConfig")
    if loss.loss_mode != LOSS_MODE:
        raise refusal(
            "actor_rollout_ref.actor.policy_loss.loss_mode",
            loss.loss_mode,
            LOSS_MODE,
            "For another loss leave out +troll=default.",
        )
    loss.troll.host.check()
    if actor.use_fused_kernels:
        raise refusal("actor_rollout_ref.actor.use_fused_kernels", True, "False")
    if pad_to_length:
        raise refusal(
            "actor_rollout_ref.actor.pad_to_length",
            True,
            "False",
            "Padded tokens would have no place in the old policy's support.",
        )
    if actor.loss_agg_mode == "seq-mean-token-sum-norm" and actor.loss_scale_factor is None:
        raise refusal(
            "actor_rollout_ref.actor.loss_scale_factor",
            None,
            "a number with loss_agg_mode=seq-mean-token-sum-norm",
            "Without one verl divides by each micro-batch's longest response, so that the loss depends on how the "
            "mini-batch is cut. Set it to data.max_response_length.",
        )
    check_engine(actor.strategy)


@dataclass
class TrollFSDPActorConfig(FSDPActorConfig):
    """verl's FSDP actor settings; hands the TROLL settings to the engine, as verl hands over ``strategy``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_actor(self, self.pad_to_length or self.engine.pad_to_length)
        object.__setattr__(self.engine, "troll", self.policy_loss.troll)


_ACTOR_CONFIGS: dict[str, type[ActorConfig]] = {"fsdp": TrollFSDPActorConfig, "fsdp2": TrollFSDPActorConfig}


def actor_config(**settings: Any) -> ActorConfig:
    """Actor settings of the strategy in use; the ``_target_`` of ``actor_rollout_ref.actor`` under ``+troll=default``.

    Raises:
        TrollConfigError: the strategy is not supported, or a setting is refused.
    """
    strategy = settings.get("strategy")
    config = _ACTOR_CONFIGS.get(str(strategy))
    if config is None:
        raise refusal("actor_rollout_ref.actor.strategy", strategy, " or ".join(_ACTOR_CONFIGS))
    return config(**settings)
