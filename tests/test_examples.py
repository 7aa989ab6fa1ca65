"""The example scripts give verl a command line that it accepts, for TROLL and for the baselines."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from verl.utils.config import omega_conf_to_dataclass

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def configuration(script: str, **variables: str) -> Any:
    """What verl would run: its own ``--cfg job`` prints the composed configuration and stops."""
    done = subprocess.run(
        ["bash", str(EXAMPLES / script), "--cfg", "job", "--resolve"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return OmegaConf.create(done.stdout)


@pytest.mark.parametrize(
    ("script", "variables", "parallel"),
    [
        ("run_qwen3_8b_megatron.sh", {"TP": "4", "CP": "2"}, (4, 1, 2, 1)),
        ("run_qwen3_30b_a3b_megatron.sh", {"PP": "2", "ROUTER_REPLAY": "R2"}, (1, 2, 1, 8)),
    ],
)
def test_megatron_script_switches_troll_on(script: str, variables: dict[str, str], parallel: tuple[int, ...]) -> None:
    config = configuration(script, **variables)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    engine = actor.engine
    assert actor.strategy == "megatron"
    assert engine.troll is actor.policy_loss.troll
    assert parallel == (
        engine.tensor_model_parallel_size,
        engine.pipeline_model_parallel_size,
        engine.context_parallel_size,
        engine.expert_model_parallel_size,
    )
    assert engine.router_replay.mode == variables.get("ROUTER_REPLAY", "disabled")
    reference = config.actor_rollout_ref.ref.megatron
    assert reference.tensor_model_parallel_size == engine.tensor_model_parallel_size


def test_baseline_switch_leaves_troll_out() -> None:
    config = configuration("run_qwen3_8b_megatron.sh", LOSS="gspo")
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert type(actor).__name__ == "McoreActorConfig"
    assert actor.policy_loss.loss_mode == "gspo"
