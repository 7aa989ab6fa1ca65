"""verl's real trainer with every estimator, under TROLL and its clipped loss, and with every rival loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.test_configs import ESTIMATORS, RIVALS
from tests.trainer.checks import assert_projected_within_bound
from tests.trainer.run import make_assets, run_trainer

pytestmark = pytest.mark.trainer

IN_CI = {("ppo", "troll=default"), ("reinforce_plus_plus", "troll=default")}
CASES = [(name, loss) for name, estimator in ESTIMATORS.items() for loss in (estimator.troll, estimator.clipped)]
CASES += [("grpo", f"baseline={name}") for name in RIVALS if ("grpo", f"baseline={name}") not in CASES]
# kl_cov does not clip, and verl logs no clipped share for it.
WITHOUT_CLIPFRAC = {"baseline=kl_cov"}


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    make_assets(folder)
    return folder


@pytest.mark.parametrize(
    ("estimator", "loss"),
    [pytest.param(*case, marks=() if case in IN_CI else pytest.mark.slow) for case in CASES],
)
def test_trains(assets: Path, tmp_path: Path, estimator: str, loss: str) -> None:
    rows = run_trainer(
        assets,
        tmp_path / "run",
        [
            f"+estimator={estimator}",
            f"+{loss}",
            # Replaces the estimator that run_trainer sets.
            f"algorithm.adv_estimator={ESTIMATORS[estimator].adv_estimator}",
            "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=8",
            "trainer.total_training_steps=2",
        ],
    )
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert math.isfinite(row["actor/pg_loss"])
        assert math.isfinite(row["actor/grad_norm"]) and row["actor/grad_norm"] > 0
        assert_advantages(estimator, row)
        # A step's second mini-batch meets a policy that the first one has changed.
        assert row["actor/ppo_kl"] != 0
        assert ("actor/pg_clipfrac" in row) == (loss not in WITHOUT_CLIPFRAC)
    if loss.startswith("troll="):
        assert_projected_within_bound(rows)
    else:
        assert not any("troll" in name for row in rows for name in row)


def assert_advantages(estimator: str, row: dict[str, Any]) -> None:
    """Each estimator's own signature, with rewards in [0, 1] and four responses per prompt."""
    largest = row["critic/advantages/max"]
    if estimator in ("grpo", "gspo"):
        # One response better than three equal ones, in standard deviations: 3 / sqrt(4).
        assert 1 < largest <= 1.5 + 1e-3
    elif estimator in ("dr_grpo", "rloo"):
        assert 0 < largest <= 1
    else:
        assert abs(row["critic/advantages/mean"]) < 1e-4
        assert largest > 1
    assert ("actor/reward_kl_penalty" in row) == (estimator in ("rloo", "reinforce_plus_plus"))
    assert ("critic/vf_loss" in row) == (estimator == "ppo")
    if estimator == "ppo":
        assert math.isfinite(row["critic/vf_loss"]) and row["critic/vf_loss"] > 0
        assert math.isfinite(row["critic/grad_norm"]) and row["critic/grad_norm"] > 0
