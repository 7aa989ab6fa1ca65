"""The command line of :mod:`verl_troll.tasks`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from verl_troll.tasks.catalog import TASKS
from verl_troll.tasks.prepare import TaskError, prepare


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Write one data set and return the exit status."""
    listed = "\n".join(f"  {name:<15} {task.about} ({', '.join(task.sources)})" for name, task in TASKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m verl_troll.tasks",
        description="Write a data set as parquet files for verl.",
        epilog=f"tasks:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=TASKS, metavar="TASK", help="one of the tasks below")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.parquet and test.parquet")
    parser.add_argument("--local", type=Path, help="read a local file or folder in the hub's format (parquet, jsonl)")
    parser.add_argument(
        "--split", choices=("train", "test"), help="only this split; required if --local is a single file"
    )
    parser.add_argument("--limit", type=_positive, help="maximum rows per split")
    given = parser.parse_args(arguments)
    task = TASKS[given.task]
    splits = [given.split] if given.split else list(task.sources)
    if not set(splits) <= task.sources.keys():
        parser.error(f"{given.task} has no split {given.split}, only {', '.join(task.sources)}")
    if given.local and given.local.is_file() and len(splits) > 1:
        parser.error(f"--local {given.local} is one file: pass --split to say which of {', '.join(splits)} it is")
    try:
        for split in splits:
            written = prepare(given.task, task, split, given.out, local=given.local, limit=given.limit)
            print(f"{written.path}: {written.rows} rows")
            for reason, count in written.left_out.items():
                print(f"  left out: {count} ({reason})")
    except TaskError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
