"""verl's actor configurations plus TROLL's settings, built on the driver before Ray starts and in each worker.

:func:`verl_troll.plugin.backends.actor_config` picks the backend's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from verl.workers.config import ActorConfig, FSDPActorConfig, McoreActorConfig, PolicyLossConfig

from verl_troll.plugin.settings import LOSS_MODE, TrollConfig, TrollConfigError, refusal


@dataclass
class TrollPolicyLossConfig(PolicyLossConfig):
    """verl's policy-loss settings plus the group ``troll``."""

    troll: TrollConfig = field(default_factory=TrollConfig)


def _check_actor(actor: ActorConfig) -> None:
    """Checks of the actor's own settings that hold for every strategy."""
    loss = actor.policy_loss
    if not isinstance(loss, TrollPolicyLossConfig):
        raise refusal("actor_rollout_ref.actor.policy_loss._target_", type(loss).__name__, "TrollPolicyLossConfig")
    loss.troll.host.check()
    if loss.loss_mode != LOSS_MODE:
        raise refusal(
            "actor_rollout_ref.actor.policy_loss.loss_mode",
            loss.loss_mode,
            LOSS_MODE,
            "For another loss leave out +troll=...",
        )
    if actor.loss_agg_mode == "seq-mean-token-sum-norm" and actor.loss_scale_factor is None:
        raise refusal(
            "actor_rollout_ref.actor.loss_scale_factor",
            None,
            "a number with loss_agg_mode=seq-mean-token-sum-norm",
            "Without one verl divides by each micro-batch's longest response, so that the loss depends on how the "
            "mini-batch is cut. Set it to data.max_response_length.",
        )


class _Announced(ActorConfig):
    """Says on the driver which loss trains: verl validates the settings there and nowhere else."""

    def validate(self, *args: Any, **kwargs: Any) -> None:
        """verl's checks of the actor against the run; if they hold, print one line."""
        super().validate(*args, **kwargs)
        print(self.policy_loss.troll.announcement, flush=True)


@dataclass
class TrollFSDPActorConfig(_Announced, FSDPActorConfig):
    """verl's FSDP actor settings; passes the TROLL settings to the engine, as verl passes ``strategy``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_actor(self)
        if self.pad_to_length or self.engine.pad_to_length:
            # verl's configuration passes the first on to the second.
            where = "" if self.pad_to_length else "fsdp_config."
            raise _padding_refused(f"actor_rollout_ref.actor.{where}pad_to_length")
        object.__setattr__(self.engine, "troll", self.policy_loss.troll)


@dataclass
class TrollMegatronActorConfig(_Announced, McoreActorConfig):
    """verl's Megatron actor settings; passes the TROLL settings to the engine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_actor(self)
        prefix = "actor_rollout_ref.actor.megatron"
        if self.engine.pad_to_length:
            raise _padding_refused(f"{prefix}.pad_to_length")
        if self.engine.dynamic_context_parallel:
            raise refusal(
                f"{prefix}.dynamic_context_parallel",
                True,
                "False",
                "verl does not show its logits under it. Use context_parallel_size.",
            )
        if self.policy_loss.troll.host.multi_token_prediction:
            raise refusal(
                "actor_rollout_ref.model.mtp.enable",
                True,
                "False with the Megatron actor",
                "The extra heads would be trained without a trust region.",
            )
        object.__setattr__(self.engine, "troll", self.policy_loss.troll)


def _padding_refused(key: str) -> TrollConfigError:
    return refusal(key, True, "False", "verl does not show the logits of sequences padded to a fixed length.")
