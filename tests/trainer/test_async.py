"""verl's asynchronous trainers: samples come from an older policy, and the old policy is the re-scored one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.checks import (
    assert_ages_are_those_of_the_tokens,
    assert_every_update_has_the_rollouts_support,
    assert_projected_within_bound,
    assert_side_channel_exact,
)
from tests.trainer.run import SEPARATE_ASYNC, make_assets, run_trainer

pytestmark = pytest.mark.trainer

ROLLOUT = "actor_rollout_ref.rollout"
CORRECTION = "algorithm.rollout_correction"


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    make_assets(folder)
    return folder


def test_rollout_on_its_own_devices_and_two_updates_per_weight_transfer(assets: Path, tmp_path: Path) -> None:
    rows = run_trainer(
        assets,
        tmp_path / "run",
        [
            "+troll=default",
            *SEPARATE_ASYNC,
            f"{ROLLOUT}.calculate_log_probs=True",
            f"{CORRECTION}.rollout_is=token",
            f"{CORRECTION}.rollout_rs=seq_mean_k3",
            f"{CORRECTION}.rollout_rs_threshold=5.0",
            "trainer.total_training_steps=3",
        ],
        probe=True,
    )
    assert_side_channel_exact(tmp_path / "run", steps=3, samples=32, epochs=1)
    # In each step's second update the old policy is that of the step's start: with the current policy instead, nothing
    # would ever be projected.
    assert_projected_within_bound(rows)
    assert all(row["troll/kl_before_max"] > 1e-3 for row in rows)
    assert max(row["training/off_policy/trajectory_staleness/max"] for row in rows) >= 1
    assert all(row["rollout_corr/rollout_is_mean"] > 0 for row in rows)


def test_the_policy_that_sampled_is_the_old_policy_of_stale_samples(assets: Path, tmp_path: Path) -> None:
    """Weights reach the rollout every second step, so that samples are older than the policy that trains on them."""
    rows = run_trainer(
        assets,
        tmp_path / "run",
        [
            "+troll=rollout_support",
            *SEPARATE_ASYNC,
            "trainer.total_training_steps=3",
        ],
        probe=True,
    )
    assert_every_update_has_the_rollouts_support(tmp_path / "run", steps=3, samples=32)
    assert_projected_within_bound(rows)
    assert max(row["training/off_policy/trajectory_staleness/max"] for row in rows) >= 1
    assert max(row["troll/kl_before_max"] for row in rows) > 1e-3
    assert_ages_are_those_of_the_tokens(tmp_path / "run", rows, samples=32, updates=2)


@pytest.mark.slow
def test_the_policy_that_sampled_after_a_checkpoint(assets: Path, tmp_path: Path) -> None:
    """The checkpoint has the samples that were ready, with their supports; those in flight are sampled again."""
    settings = [
        "+troll=rollout_support",
        *SEPARATE_ASYNC,
        "trainer.save_freq=2",
        "trainer.resume_mode=auto",
        f"trainer.default_local_dir={tmp_path}/checkpoints",
    ]
    for out, last in ((tmp_path / "first", 2), (tmp_path / "second", 4)):
        rows = run_trainer(assets, out, [*settings, f"trainer.total_training_steps={last}"], probe=True)
        assert [row["step"] for row in rows] == [last - 1, last]
        assert (tmp_path / "checkpoints" / f"global_step_{last}" / "transfer_queue").exists()
        assert_every_update_has_the_rollouts_support(out, steps=2, samples=32)
        assert_projected_within_bound(rows)
        assert_ages_are_those_of_the_tokens(out, rows, samples=32, updates=2)


@pytest.mark.slow
def test_rollout_on_the_trainers_devices_ahead_of_it(assets: Path, tmp_path: Path) -> None:
    rows = run_trainer(
        assets,
        tmp_path / "run",
        [
            "+troll=default",
            "trainer.v1.trainer_mode=colocate_async",
            f"{ROLLOUT}.calculate_log_probs=True",
            f"{CORRECTION}.rollout_is=sequence",
            "trainer.total_training_steps=3",
        ],
        probe=True,
    )
    assert_side_channel_exact(tmp_path / "run", steps=3, samples=32, epochs=1)
    assert_projected_within_bound(rows)
    assert max(row["training/off_policy/trajectory_staleness/max"] for row in rows) >= 1


@pytest.mark.slow
def test_the_policy_that_sampled_ahead_on_the_trainers_devices(assets: Path, tmp_path: Path) -> None:
    rows = run_trainer(
        assets,
        tmp_path / "run",
        ["+troll=rollout_support", "trainer.v1.trainer_mode=colocate_async", "trainer.total_training_steps=3"],
        probe=True,
    )
    assert_every_update_has_the_rollouts_support(tmp_path / "run", steps=3, samples=32)
    assert_projected_within_bound(rows)
    assert max(row["training/off_policy/trajectory_staleness/max"] for row in rows) >= 1
    assert_ages_are_those_of_the_tokens(tmp_path / "run", rows, samples=32, updates=2)
