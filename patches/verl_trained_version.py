"""Patch: tell the update which version of the weights it trains, so that it can log how old its samples are.

A version is the number that verl gives the weights when it sends them to the rollout, and that the rollout's servers
return with each response: the training step that ended before. verl's trainer knows it, its workers do not.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from verl_troll.patches.registry import Patch
from verl_troll.versions import TESTED_VERL

TRAINER = "verl.trainer.ppo.v1.trainer_base"


def _install(item: str) -> None:
    trainer: Any = sys.modules[TRAINER].PPOTrainer
    original = trainer._update_actor

    @functools.wraps(original)
    def _update_actor(self: Any, batch: Any, metrics: dict[str, Any]) -> Any:
        batch.extra_info[item] = self.global_steps - 1
        return original(self, batch, metrics=metrics)

    trainer._update_actor = _update_actor


PATCH = Patch(
    name="verl-trained-version",
    host="verl",
    versions=TESTED_VERL,
    why="PPOTrainer._update_actor does not tell the workers which version of the weights they train.",
    upstream="verl/trainer/ppo/v1/trainer_base.py, _update_actor: 'global_steps' in extra_info",
    install=_install,
    replaces={
        f"{TRAINER}:PPOTrainer._update_actor": "82879aeff227214b",
        # Computes trajectory_staleness in the same unit.
        f"{TRAINER}:PPOTrainer._compute_metrics": "610f09e74f42ef49",
    },
)
