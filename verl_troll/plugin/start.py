"""Refuses settings that TROLL does not support before any trainer of verl starts Ray.

``main_ppo`` checks the actor's settings on the driver; verl's other trainers do so once their processes run, or in the
workers alone. So the group ``troll`` registers :class:`CheckAtStart` with Hydra, which every one of them uses.
"""

from __future__ import annotations

from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class CheckAtStart(Callback):
    """Builds the actor's settings before the trainer's own code runs."""

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Exit with the message of the first setting of the actor that verl or TROLL refuses.

        Raises:
            SystemExit: Hydra makes a warning of every other exception in a callback.
        """
        from verl.utils.config import omega_conf_to_dataclass

        try:
            omega_conf_to_dataclass(config.actor_rollout_ref.actor)
        except Exception as error:
            cause = error.__cause__ or error
            raise SystemExit(f"{type(cause).__name__}: {cause}") from error
