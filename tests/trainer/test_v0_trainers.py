"""verl's trainers of the older generation: ``trainer.use_v1=False`` and the two experimental ones built on it.

They pad their batches and pass on a fixed choice of columns; the support reaches the update all the same.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.checks import (
    assert_every_update_has_the_rollouts_support,
    assert_projected_within_bound,
    assert_side_channel_exact,
)
from tests.trainer.run import make_assets, run_trainer, trainer

pytestmark = pytest.mark.trainer

ROLLOUT = "actor_rollout_ref.rollout"
ONE_STEP = "verl.experimental.one_step_off_policy.main_ppo"
FULLY = "verl.experimental.fully_async_policy.fully_async_main"
# Both train and sample on devices of their own, and set bypass mode.
SEPARATE = (
    # In place of one_step_off_policy's own, which is relative to a clone of verl.
    "hydra.searchpath=[pkg://verl.trainer.config]",
    "actor_rollout_ref.hybrid_engine=False",
    f"{ROLLOUT}.checkpoint_engine.backend=ray_object_store",
    f"{ROLLOUT}.checkpoint_engine.custom_backend_module=verl_troll.cpu.checkpoint_engine",
    "rollout.nnodes=1",
    "rollout.n_gpus_per_node=1",
    "ray_kwargs.ray_init.num_gpus=2",
    "ray_kwargs.ray_init.num_cpus=60",
)
# Six batches of 16 samples, and new weights for the rollout after every second.
FULLY_ASYNC = (
    *SEPARATE,
    "data.train_batch_size=0",
    "data.gen_batch_size=1",
    "rollout.total_rollout_steps=24",
    "rollout.n=4",
    "async_training.trigger_parameter_sync_step=2",
    "async_training.staleness_threshold=1",
    "trainer.total_epochs=10",
    "trainer.test_freq=1000",
)
RESCORED = ("+troll=default", "algorithm.rollout_correction.bypass_mode=False")
SAMPLED = ("+troll=rollout_support",)


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    make_assets(folder)
    return folder


def trained(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of updates; the fully asynchronous trainer logs others besides, and its process loads no plugin."""
    named = [{name.replace("actor/troll/", "troll/"): value for name, value in row.items()} for row in rows]
    return [row for row in named if "troll/kl_before" in row]


def test_the_v0_trainer_on_two_ranks(assets: Path, tmp_path: Path) -> None:
    rows = run_trainer(
        assets,
        tmp_path / "run",
        [
            *RESCORED,
            "trainer.use_v1=False",
            "actor_rollout_ref.actor.ppo_epochs=2",
            "actor_rollout_ref.actor.shuffle=True",
            "trainer.total_training_steps=2",
        ],
        ranks=2,
        probe=True,
    )
    assert_side_channel_exact(tmp_path / "run", steps=2, samples=32, epochs=2)
    assert_projected_within_bound(trained(rows))
    assert len(trained(rows)) == 2


@pytest.mark.slow
def test_the_v0_trainer_with_the_policy_that_sampled(assets: Path, tmp_path: Path) -> None:
    rows = run_trainer(
        assets,
        tmp_path / "run",
        [*SAMPLED, "trainer.use_v1=False", "trainer.total_training_steps=2"],
        probe=True,
    )
    assert_every_update_has_the_rollouts_support(tmp_path / "run", steps=2, samples=32)
    assert_projected_within_bound(trained(rows))


@pytest.mark.slow
def test_one_step_off_policy(assets: Path, tmp_path: Path) -> None:
    rows = run_trainer(
        assets, tmp_path / "run", [*RESCORED, *SEPARATE, "trainer.total_training_steps=3"], probe=True, module=ONE_STEP
    )
    assert_side_channel_exact(tmp_path / "run", steps=3, samples=32, epochs=1)
    assert_projected_within_bound(trained(rows))


@pytest.mark.slow
def test_one_step_off_policy_with_the_policy_that_sampled(assets: Path, tmp_path: Path) -> None:
    rows = run_trainer(
        assets, tmp_path / "run", [*SAMPLED, *SEPARATE, "trainer.total_training_steps=3"], probe=True, module=ONE_STEP
    )
    assert_every_update_has_the_rollouts_support(tmp_path / "run", steps=3, samples=32)
    assert_projected_within_bound(trained(rows))
    # Samples are a step old: the first of a step's two mini-batches leaves the region as well.
    assert max(row["troll/projected_share"] for row in trained(rows)) > 0.5


@pytest.mark.slow
def test_fully_asynchronous(assets: Path, tmp_path: Path) -> None:
    rows = run_trainer(
        assets,
        tmp_path / "run",
        [*RESCORED, *FULLY_ASYNC],
        probe=True,
        module=FULLY,
    )
    assert_side_channel_exact(tmp_path / "run", steps=6, samples=16, epochs=1)
    assert_projected_within_bound(trained(rows))
    # One update per batch: with the current weights as the old policy, nothing would be projected.
    assert max(row["troll/kl_before_max"] for row in trained(rows)) > 1e-3


def test_fully_asynchronous_with_the_policy_that_sampled(assets: Path, tmp_path: Path) -> None:
    """That trainer names the agent loop itself, ``single_turn_agent``."""
    rows = run_trainer(
        assets,
        tmp_path / "run",
        [*SAMPLED, *FULLY_ASYNC],
        probe=True,
        module=FULLY,
    )
    assert_every_update_has_the_rollouts_support(tmp_path / "run", steps=6, samples=16)
    assert_projected_within_bound(trained(rows))
    assert max(row["fully_async/count/stale_trajectory_processed"] for row in trained(rows)) > 0


@pytest.mark.parametrize(
    "module", [FULLY, *(pytest.param(name, marks=pytest.mark.slow) for name in ("verl.trainer.main_ppo", ONE_STEP))]
)
def test_a_setting_is_refused_before_ray_starts(module: str, tmp_path: Path) -> None:
    command, environment = trainer(
        tmp_path,
        tmp_path / "run",
        ["+troll=default", *SEPARATE[:1], "algorithm.rollout_correction.bypass_mode=True"],
        module=module,
    )
    run = subprocess.run(command, cwd=tmp_path / "run", env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "TrollConfigError: algorithm.rollout_correction.bypass_mode=True is not supported" in run.stderr
    assert "write +troll=rollout_support" in run.stderr
    assert "Started a local Ray instance" not in run.stdout + run.stderr
