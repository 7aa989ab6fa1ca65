"""verl's real trainer with SGLang as the rollout engine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.sglang.replica import ON_CPU, ROLLOUT, SUPPORT, TROLL
from tests.trainer.checks import (
    assert_every_update_has_the_rollouts_support,
    assert_projected_within_bound,
    assert_side_channel_exact,
)
from tests.trainer.run import ASYNCHRONOUS, make_assets, probe_lines, run_trainer

pytestmark = pytest.mark.trainer


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    make_assets(folder)
    return folder


def test_troll_trains_with_sglang(assets: Path, tmp_path: Path) -> None:
    rows = run_trainer(
        assets,
        tmp_path / "run",
        [*ON_CPU, "+troll=default", TROLL, f"{ROLLOUT}.calculate_log_probs=True", "trainer.total_training_steps=2"],
        probe=True,
    )
    assert_projected_within_bound(rows)
    assert_side_channel_exact(tmp_path / "run", steps=2, samples=32, epochs=1)
    for row in rows:
        # SGLang samples from the actor's weights.
        assert row["training/rollout_probs_diff_max"] < 1e-5


def test_the_rollout_engine_gives_the_old_policy(assets: Path, tmp_path: Path) -> None:
    rows = run_trainer(
        assets,
        tmp_path / "run",
        [
            *ON_CPU,
            "+troll=rollout_support",
            SUPPORT,
            f"{ROLLOUT}.temperature=0.9",
            "actor_rollout_ref.actor.ppo_epochs=2",
            "trainer.total_training_steps=2",
            "trainer.val_before_train=True",
        ],
        probe=True,
    )
    assert any(name.startswith("val-") for name in rows[0])
    steps = [row for row in rows if "troll/kl_before" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert_projected_within_bound(steps)
    # There is no old-log-prob pass; every sample enters both epochs with the same support.
    updates = Counter(line["digest"] for line in probe_lines(tmp_path / "run") if line["pass"] == "update")
    assert {line["pass"] for line in probe_lines(tmp_path / "run")} == {"update"}
    assert sum(updates.values()) == 2 * 32 * 2
    assert all(count % 2 == 0 for count in updates.values())


@pytest.mark.parametrize("trainer", ASYNCHRONOUS.values(), ids=ASYNCHRONOUS)
def test_the_policy_that_sampled_under_an_asynchronous_trainer(
    assets: Path, tmp_path: Path, trainer: tuple[str, ...]
) -> None:
    rows = run_trainer(
        assets,
        tmp_path / "run",
        [*ON_CPU, "+troll=rollout_support", SUPPORT, *trainer, "trainer.total_training_steps=3"],
        probe=True,
    )
    assert_every_update_has_the_rollouts_support(tmp_path / "run", steps=3, samples=32)
    assert_projected_within_bound(rows)
    assert max(row["troll/age_max"] for row in rows) >= 1
