"""Show held-out problems with the policy's answers before and after training, from verl's dumps of its evaluations."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd


def _answers(dump: Path) -> list[dict[str, Any]]:
    with dump.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _shown(answer: dict[str, Any]) -> str:
    mark = "right" if answer["score"] == 1 else "wrong"
    return f"{mark}  {' '.join(answer['output'].split())}"


def before_and_after(folder: Path, held_out: Path, count: int) -> str:
    """The first ``count`` held-out problems, each with one sampled answer before training and one at the end.

    Args:
        folder: verl's dumps, ``STEP.jsonl``.
        held_out: the problems, verl's parquet file.
        count: number of problems.
    """
    dumps = sorted(folder.glob("*.jsonl"), key=lambda dump: int(dump.stem))
    if len(dumps) < 2:
        return "  no answers: the policy was not evaluated before training and at the end"
    first, last = _answers(dumps[0]), _answers(dumps[-1])
    lines = []
    for messages in pd.read_parquet(held_out)["prompt"][:count]:
        question = messages[-1]["content"]
        before, after = (next((a for a in part if question in a["input"]), None) for part in (first, last))
        # Fewer problems may have been evaluated.
        if before is not None and after is not None:
            lines += [f"    {question}", f"      before  {_shown(before)}", f"      after   {_shown(after)}"]
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
