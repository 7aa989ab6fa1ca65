"""Show held-out problems with the policy's answers before and after training, from verl's dumps of its evaluations."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd


def _answers(dump: Path) -> dict[str, dict[str, Any]]:
    """The first answer to each prompt."""
    found: dict[str, dict[str, Any]] = {}
    with dump.open(encoding="utf-8") as lines:
        for answer in map(json.loads, lines):
            found.setdefault(answer["input"], answer)
    return found


def _shown(answer: dict[str, Any]) -> str:
    mark = "right" if answer["score"] == 1 else "wrong"
    return f"{mark}  {' '.join(answer['output'].split())}"


def before_and_after(folder: Path, held_out: Path, count: int) -> str:
    """The first ``count`` evaluated problems, each with one sampled answer before training and one at the end.

    Args:
        folder: verl's dumps, ``STEP.jsonl``.
        held_out: the problems, verl's parquet file.
        count: number of problems.
    """
    dumps = sorted(folder.glob("*.jsonl"), key=lambda dump: int(dump.stem))
    if len(dumps) < 2:
        return "  no answers: the policy was not evaluated before training and at the end"
    first, last = (_answers(dump) for dump in (dumps[0], dumps[-1]))
    questions = [messages[-1]["content"] for messages in pd.read_parquet(held_out)["prompt"]]
    lines = []
    for prompt in [prompt for prompt in first if prompt in last][:count]:
        question = next(question for question in questions if question in prompt)
        lines += [f"    {question}", f"      before  {_shown(first[prompt])}", f"      after   {_shown(last[prompt])}"]
    lines.insert(0, f"  the first {len(lines) // 3} held-out problems, each with one sampled answer:")
    return "\n".join(lines)


def main() -> None:
    """Show the answers of a finished run again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run, with answers/")
    parser.add_argument("held_out", type=Path, help="held_out.parquet of its data")
    parser.add_argument("--count", type=int, default=5, help="number of problems (default 5)")
    args = parser.parse_args()
    print(before_and_after(args.run / "answers", args.held_out, args.count))


if __name__ == "__main__":
    main()
