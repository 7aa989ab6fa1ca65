"""verl's replay buffer, polling for finished samples often enough for steps of about a second.

Enabled by ``trainer.v1.sampler.custom_sampler.path=pkg://verl_troll.embedded.replay_buffer`` and
``custom_sampler.name=frequent_replay_buffer``.
"""

from __future__ import annotations

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

__all__ = ["POLL_SECONDS", "frequent_replay_buffer"]

POLL_SECONDS = 0.05
"""Poll interval in seconds; verl's default is 2."""


def frequent_replay_buffer(trainer_mode: str, **kwargs: Any) -> ReplayBuffer:
    """verl's own replay buffer for ``trainer_mode`` with a short poll interval.

    verl passes neither ``algorithm.filter_groups`` nor ``sampler.sync_refill_failed_groups`` to a custom sampler: set
    ``trainer.v1.sampler.custom_sampler.path=null`` to use those.

    Args:
        trainer_mode: verl's ``trainer.v1.trainer_mode``, for example ``"sync"``.
        kwargs: what verl passes to a custom sampler.
    """
    buffer = ReplayBuffer if trainer_mode == "sync" else ReplayBufferAsync
    return buffer(trainer_mode=trainer_mode, poll_interval=POLL_SECONDS, **kwargs)
