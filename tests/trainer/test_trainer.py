"""verl's real trainer (Ray, v1, FSDP2, TransferQueue) end to end, with and without TROLL, on one and two ranks."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.trainer.checks import assert_projected_within_bound, assert_side_channel_exact
from tests.trainer.run import make_assets, probe_lines, run_trainer

pytestmark = pytest.mark.trainer

ACTOR = "actor_rollout_ref.actor"


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    make_assets(folder)
    return folder


def test_troll_trains_saves_and_resumes_on_one_rank(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It resumes with the Triton kernels, in Triton's interpreter, where Triton is installed."""
    settings = [
        "+troll=default",
        f"{ACTOR}.ppo_epochs=2",
        f"{ACTOR}.shuffle=True",
        f"{ACTOR}.use_dynamic_bsz=True",
        f"{ACTOR}.ppo_max_token_len_per_gpu=256",
        "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True",
        "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=256",
        "actor_rollout_ref.rollout.temperature=0.9",
        "actor_rollout_ref.model.use_fused_kernels=True",
        "trainer.save_freq=2",
        "trainer.resume_mode=auto",
        f"trainer.default_local_dir={tmp_path}/checkpoints",
    ]
    first = tmp_path / "first"
    rows = run_trainer(assets, first, [*settings, "trainer.total_training_steps=2"], probe=True)
    assert [row["step"] for row in rows] == [1, 2]
    assert_projected_within_bound(rows)
    assert_side_channel_exact(first, steps=2, samples=32, epochs=2)
    assert not any(name.startswith("actor/troll") for name in rows[0])
    for name in ("actor/pg_loss", "actor/ppo_kl", "actor/pg_clipfrac", "actor/entropy", "actor/grad_norm"):
        assert name in rows[0]
    assert (tmp_path / "checkpoints" / "global_step_2" / "actor").is_dir()

    assert not any(line["kernels"] for line in probe_lines(first))

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    second = tmp_path / "second"
    # The interpreter is slow: few ids, one epoch.
    short = [f"{ACTOR}.policy_loss.troll.k=8", f"{ACTOR}.ppo_epochs=1", "trainer.total_training_steps=3"]
    resumed = run_trainer(assets, second, [*settings, *short], probe=True)
    assert [row["step"] for row in resumed] == [3]
    assert_projected_within_bound(resumed)
    assert_side_channel_exact(second, steps=1, samples=32, epochs=1)
    installed = importlib.util.find_spec("triton") is not None
    assert all(line["kernels"] == installed for line in probe_lines(second))


def test_troll_trains_on_two_ranks(assets: Path, tmp_path: Path) -> None:
    rows = run_trainer(
        assets,
        tmp_path / "run",
        [
            "+troll=default",
            f"{ACTOR}.policy_loss.troll.support=anchored",
            f"{ACTOR}.policy_loss.troll.importance_ratio=sequence",
            f"{ACTOR}.use_kl_loss=True",
            f"{ACTOR}.entropy_coeff=0.001",
            f"{ACTOR}.loss_agg_mode=seq-mean-token-mean",
            "algorithm.rollout_correction.rollout_is=token",
            "actor_rollout_ref.rollout.calculate_log_probs=True",
            f"{ACTOR}.ppo_micro_batch_size_per_gpu=2",
            "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4",
            "actor_rollout_ref.model.use_remove_padding=False",
            "trainer.total_training_steps=2",
            "trainer.val_before_train=True",
        ],
        ranks=2,
        probe=True,
    )
    assert any(name.startswith("val-") for name in rows[0])
    steps = [row for row in rows if "troll/kl_before" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert_projected_within_bound(steps)
    assert_side_channel_exact(tmp_path / "run", steps=2, samples=32, epochs=1)
    assert all(row["actor/kl_loss"] >= 0 for row in steps)
    assert all(any(name.startswith("rollout_corr/") for name in row) for row in steps)


def test_lora_with_the_reference_inside_the_actor(assets: Path, tmp_path: Path) -> None:
    rows = run_trainer(
        assets,
        tmp_path / "run",
        [
            "+troll=default",
            "actor_rollout_ref.model.lora_rank=4",
            "actor_rollout_ref.model.lora.merge=True",
            f"{ACTOR}.use_kl_loss=True",
            f"{ACTOR}.optim.lr=2e-2",
            "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4",
            "trainer.total_training_steps=2",
        ],
        probe=True,
    )
    assert_projected_within_bound(rows)
    # The reference pass uses the same engine, and must not count as an old pass.
    assert_side_channel_exact(tmp_path / "run", steps=2, samples=32, epochs=1)
    assert all(row["actor/kl_loss"] > 0 for row in rows)


def test_vanilla_runs_unchanged_beside_the_plugin(assets: Path, tmp_path: Path) -> None:
    rows = run_trainer(assets, tmp_path / "run", ["trainer.total_training_steps=2"], ranks=2)
    assert [row["step"] for row in rows] == [1, 2]
    assert not any("troll" in name for row in rows for name in row)
    assert all(row["actor/grad_norm"] > 0 for row in rows)
