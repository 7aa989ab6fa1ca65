"""Patch: keep the names of metrics under ``troll/``, which verl's trainer would prefix with ``actor/``."""

from __future__ import annotations

import functools
import sys
from typing import Any

from verl_troll.patches.registry import Patch
from verl_troll.versions import TESTED_VERL

NAMESPACE = "troll/"
_TRAINERS = ("verl.trainer.ppo.v1.trainer_base", "verl.trainer.ppo.ray_trainer")


def _install() -> None:
    from verl.utils import py_functional

    original = py_functional.rename_dict

    @functools.wraps(original)
    def rename_dict(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        renamed = original({key: value for key, value in data.items() if not key.startswith(NAMESPACE)}, prefix)
        return {**renamed, **{key: value for key, value in data.items() if key.startswith(NAMESPACE)}}

    py_functional.rename_dict = rename_dict
    # A trainer may already have imported the name.
    for name in _TRAINERS:
        if (trainer := sys.modules.get(name)) is not None:
            trainer.rename_dict = rename_dict  # type: ignore[attr-defined]


PATCH = Patch(
    name="verl-metric-names",
    host="verl",
    versions=TESTED_VERL,
    why="PPOTrainer and RayPPOTrainer rename troll/... to actor/troll/...",
    upstream="verl/trainer/ppo/v1/trainer_base.py and ray_trainer.py, _update_actor: rename only keys without a '/'",
    install=_install,
    replaces={
        "verl.utils.py_functional:rename_dict": "380084057251157e",
        "verl.trainer.ppo.v1.trainer_base:PPOTrainer._update_actor": "82879aeff227214b",
        "verl.trainer.ppo.ray_trainer:RayPPOTrainer._update_actor": "601a6fa2029023d0",
    },
)
