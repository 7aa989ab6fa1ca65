"""The suites' benchmark counts what is paid, and finds a reward that pays too little or too much."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from benchmarks import rewards
from verl_troll.tasks.rewards import math

ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k_train": [
        {"question": "How many?", "answer": "Thus.\n#### 1,234"},
        {"question": "How many?", "answer": "#### -3"},
    ],
    "minerva_math": [{"solution": "So $\\boxed{1.6e-19} \\mathrm{~C}$."}, {"solution": "\\boxed{\\frac{a}{2}}."}],
    "amc23": [{"problem": "How many?", "answer": 27.0}],
    "aime24": [{"problem": "How many?", "answer": "025"}],
    "olympiadbench": [
        {"question": "How many?", "final_answer": ["$\\frac{1}{2 n+2}$"]},
        {"question": "How many?", "final_answer": ["1,3"]},
    ],
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def table(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(("| right", "| wrong"))]


def test_all_right_answers_are_paid_and_no_wrong_one(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rewards.main(["--data", str(data)]) == 0
    printed = capsys.readouterr().out
    assert "gsm8k_test: no " in printed
    rows = table(printed)
    assert {name.split(": ")[0] for name, *_ in rows} == {"right", "wrong"}
    for name, tried, paid, _, alone in rows:
        assert (paid, alone) == (tried if name.startswith("right") else "0", "0"), name


@pytest.mark.parametrize(("score", "fault"), [(0.0, "right, boxed"), (1.0, "wrong, last place + 1")])
def test_other_reward_falls(score: float, fault: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def compute_score(*given: Any, **named: Any) -> dict[str, float]:
        return {"score": score}

    with mock.patch.object(math, "compute_score", compute_score):
        assert rewards.main(["--data", str(data), "--suite", "minerva_math", "--limit", "1"]) == 1
    assert fault in capsys.readouterr().out


def test_notations_are_of_the_truth_and_its_neighbours() -> None:
    texts = {response.removeprefix("So \\boxed{").removesuffix("}.") for _, response in rewards.right("1.6e-19")}
    assert {"1.6e-19", "1.6\\times 10^{-19}", "1.6E-19", "1.6e-19\\%"} <= texts
    assert "So \\boxed{1{,}234}." in dict(rewards.right("1234")).values()
    for truth in ("1.6e-19", "4e33", "0.49", "7", "0"):
        for name, response in rewards.wrong(truth):
            if "10^" not in response:
                number = Decimal(response.removeprefix("#### ").removeprefix("So \\boxed{").removesuffix("}."))
                assert number != Decimal(truth), name
