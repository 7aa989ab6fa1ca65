"""verl's real trainer on answers that try to kill it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tasks.hostile_reward import RIGHT
from tests.trainer.run import make_assets, run_trainer


@pytest.mark.trainer
@pytest.mark.slow
def test_trainer_completes_its_steps_over_hostile_answers(tmp_path: Path) -> None:
    make_assets(tmp_path)
    rows = run_trainer(
        tmp_path,
        tmp_path / "run",
        [
            "+troll=default",
            "reward.custom_reward_function.path=pkg://tests.tasks.hostile_reward",
            "reward.num_workers=2",
            "trainer.total_training_steps=3",
            "trainer.val_before_train=True",
        ],
    )
    steps = [row for row in rows if "critic/score/mean" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert all(row["critic/score/min"] == 0 and row["critic/score/max"] == 1 for row in steps)
    validated = {name for row in rows for name in row if name.startswith("val-")}
    assert all(any(key in name for name in validated) for key in ("/acc/", "/answered/", "/stopped/")), validated
    lines = [json.loads(line) for path in (tmp_path / "run").glob("scores-*.jsonl") for line in path.open()]
    assert len(lines) >= 3 * 32
    assert all(line["score"] == (line["case"] in RIGHT) for line in lines)
    hostile = {line["case"] for line in lines} - set(RIGHT)
    assert len(hostile) > 10
