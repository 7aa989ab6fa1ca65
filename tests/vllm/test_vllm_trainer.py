"""verl's real trainer with vLLM as the rollout engine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from pyarrow import parquet

from tests.trainer.checks import (
    assert_every_update_has_the_rollouts_support,
    assert_projected_within_bound,
    assert_side_channel_exact,
)
from tests.trainer.run import ASYNCHRONOUS, make_assets, probe_lines, run_trainer

pytestmark = pytest.mark.trainer

ROLLOUT = "actor_rollout_ref.rollout"


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    make_assets(folder, hidden_size=128)
    return folder


def test_troll_trains_with_vllm(assets: Path, tmp_path: Path) -> None:
    rows = run_trainer(
        assets,
        tmp_path / "run",
        [
            "+cpu/rollout=vllm",
            "+troll=default",
            f"{ROLLOUT}.calculate_log_probs=True",
            "trainer.total_training_steps=2",
        ],
        probe=True,
    )
    assert_projected_within_bound(rows)
    assert_side_channel_exact(tmp_path / "run", steps=2, samples=32, epochs=1)
    for row in rows:
        # vLLM samples from the actor's weights.
        assert row["training/rollout_probs_diff_max"] < 1e-5


def test_the_rollout_engine_gives_the_old_policy(assets: Path, tmp_path: Path) -> None:
    rows = run_trainer(
        assets,
        tmp_path / "run",
        [
            "+cpu/rollout=vllm",
            "+troll=rollout_support",
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


@pytest.mark.slow
def test_without_a_step_between_the_rollout_engine_and_the_actor_agree(assets: Path, tmp_path: Path) -> None:
    """With one mini-batch p is the policy that vLLM sampled from, so the KL is the two engines' discrepancy."""
    (row,) = run_trainer(
        assets,
        tmp_path / "run",
        [
            "+cpu/rollout=vllm",
            "+troll=rollout_support",
            "actor_rollout_ref.actor.ppo_mini_batch_size=8",
            "trainer.total_training_steps=1",
        ],
    )
    assert row["troll/kl_before_max"] < 1e-6
    assert row["troll/projected_share"] == 0


@pytest.mark.slow
def test_a_data_set_may_name_verls_agent_loops(tmp_path: Path) -> None:
    """Half of the samples go through the tool loop."""
    make_assets(tmp_path, hidden_size=128)
    table = parquet.read_table(tmp_path / "train.parquet")
    loops = ["single_turn_agent", "tool_agent"] * (len(table) // 2)
    parquet.write_table(table.append_column("agent_name", [loops]), tmp_path / "train.parquet")
    rows = run_trainer(
        tmp_path,
        tmp_path / "run",
        ["+cpu/rollout=vllm", "+troll=rollout_support", "trainer.total_training_steps=1"],
        probe=True,
    )
    assert_every_update_has_the_rollouts_support(tmp_path / "run", steps=1, samples=32)
    assert_projected_within_bound(rows)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ASYNCHRONOUS.values(), ids=ASYNCHRONOUS)
def test_the_policy_that_sampled_under_an_asynchronous_trainer(
    assets: Path, tmp_path: Path, trainer: tuple[str, ...]
) -> None:
    rows = run_trainer(
        assets,
        tmp_path / "run",
        ["+cpu/rollout=vllm", "+troll=rollout_support", *trainer, "trainer.total_training_steps=3"],
        probe=True,
    )
    assert_every_update_has_the_rollouts_support(tmp_path / "run", steps=3, samples=32)
    assert_projected_within_bound(rows)
    assert max(row["troll/age_max"] for row in rows) >= 1
