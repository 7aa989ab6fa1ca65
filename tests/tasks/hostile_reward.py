"""A reward for the trainer that substitutes hostile answers for the model's, and records their scores."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tests.tasks.hostile import ANSWERS, PROGRAMS, response
from verl_troll.tasks.rewards import code, math

CODE_TRUTH = json.dumps({"inputs": [""], "outputs": ["right"]})
RIGHT = {"code: right": "```python\nprint('right')\n```", "math: right": "\\boxed{14/2}"}
CASES = [*RIGHT, *(f"code: {name}" for name in PROGRAMS), *(f"math: {name}" for name in ANSWERS)]


def compute_score(data_source: str, solution_str: str, ground_truth: str, **given: Any) -> dict[str, float]:
    """The score of a case picked by the response; half of the cases are right, so there is something to learn."""
    number = int.from_bytes(hashlib.sha256(solution_str.encode()).digest()[:4], "big")
    case = CASES[number % 2] if number % 4 < 2 else CASES[2 + number // 4 % (len(CASES) - 2)]
    kind, _, name = case.partition(": ")
    if kind == "code":
        text = RIGHT.get(case) or response(name)
        result = code.compute_score(data_source, text, CODE_TRUTH, processor_seconds=1, **given)
    else:
        text = RIGHT.get(case) or ANSWERS[name]
        result = math.compute_score(data_source, text, "7", seconds=1.0, **given)
    with Path(os.environ["TROLL_TEST_PROBE"], f"scores-{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps({"case": case, **result}) + "\n")
    return result
