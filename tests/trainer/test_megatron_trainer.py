"""verl's real trainer (Ray, v1, TransferQueue) with the Megatron actor on two tensor-parallel ranks, with TROLL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.checks import assert_projected_within_bound, assert_side_channel_exact
from tests.trainer.run import make_assets, run_trainer

pytestmark = pytest.mark.trainer

ACTOR = "actor_rollout_ref.actor"


def test_troll_trains_saves_and_resumes(tmp_path: Path) -> None:
    assets = tmp_path / "assets"
    assets.mkdir()
    make_assets(assets)
    settings = [
        "+megatron=dense",
        "+troll=default",
        f"{ACTOR}.megatron.tensor_model_parallel_size=2",
        f"{ACTOR}.ppo_epochs=2",
        f"{ACTOR}.ppo_max_token_len_per_gpu=256",
        f"{ACTOR}.use_kl_loss=True",
        "actor_rollout_ref.rollout.calculate_log_probs=True",
        "trainer.save_freq=2",
        "trainer.resume_mode=auto",
        f"trainer.default_local_dir={tmp_path}/checkpoints",
    ]
    first = tmp_path / "first"
    rows = run_trainer(
        assets, first, [*settings, "trainer.total_training_steps=2"], ranks=2, group="megatron", probe=True
    )
    assert_side_channel_exact(first, steps=2, samples=32, epochs=2, copies=2)
    resumed = run_trainer(
        assets, tmp_path / "second", [*settings, "trainer.total_training_steps=3"], ranks=2, group="megatron"
    )
    assert [row["step"] for row in rows + resumed] == [1, 2, 3]
    assert_projected_within_bound(rows)
    assert_projected_within_bound(resumed)
    for row in rows + resumed:
        assert row["actor/grad_norm"] > 0
        assert row["actor/kl_loss"] > 0
        # The rollout samples with transformers, from weights that the engine exports after each step.
        assert row["training/rollout_probs_diff_max"] < 1e-5
    before = load_file(assets / "model" / "model.safetensors")
    after = load_file(tmp_path / "checkpoints/global_step_2/actor/model/huggingface/model.safetensors")
    assert before.keys() == after.keys()
    assert max((after[name] - weight).abs().max().item() for name, weight in before.items()) > 1e-2
    assert all(torch.isfinite(weight).all() for weight in after.values())
