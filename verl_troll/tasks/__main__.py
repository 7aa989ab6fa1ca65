"""The command line of :mod:`verl_troll.tasks`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from verl_troll.tasks.catalog import TASKS
from verl_troll.tasks.prepare import TaskError, Written, prepare
from verl_troll.tasks.reasoning_gym import SPLITS, TAGS_INSTRUCTION, Problems, parse_settings, prepare_problems

GENERATED = "reasoning_gym"
COMMON = ("task", "out", "split", "local", "limit")
"""Arguments that the command line always has."""


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Write one data set and return the exit status."""
    about = {name: f"{task.about} ({', '.join(task.sources)})" for name, task in TASKS.items()}
    about[GENERATED] = f"problems of reasoning-gym's generators ({', '.join(SPLITS)})"
    parser = argparse.ArgumentParser(
        prog="python -m verl_troll.tasks",
        description="Write a data set as parquet files for verl.",
        epilog="tasks:\n" + "\n".join(f"  {name:<15} {text}" for name, text in about.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=about, metavar="TASK", help="one of the tasks below")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.parquet and test.parquet")
    parser.add_argument(
        "--split", choices=("train", "test"), help="only this split; required if --local is a single file"
    )
    stored = parser.add_argument_group(f"all tasks but {GENERATED}")
    stored.add_argument("--local", type=Path, help="read a local file or folder in the hub's format (parquet, jsonl)")
    stored.add_argument("--limit", type=_positive, help="maximum rows per split")
    made = parser.add_argument_group(GENERATED, argument_default=argparse.SUPPRESS)
    made.add_argument("--dataset", help="a data set of the library, such as chain_sum; required")
    made.add_argument(
        "--set", action="append", metavar="KEY=VALUE", help="a setting of the data set, as JSON or YAML; repeatable"
    )
    made.add_argument("--train-size", type=int, metavar="N", help=f"rows of train (default: {Problems.train_size})")
    made.add_argument(
        "--test-size", type=int, metavar="N", help=f"problems of test, never in train (default: {Problems.test_size})"
    )
    made.add_argument("--seed", type=int, metavar="N", help=f"which problems are drawn (default: {Problems.seed})")
    made.add_argument("--allow-repeats", action="store_true", help="train may repeat its own problems")
    made.add_argument(
        "--answer",
        metavar="WHERE",
        help="where the answer stands: tags (the last <answer></answer>, default), last-number, response (all of it)",
    )
    made.add_argument(
        "--instruction",
        metavar="TEXT",
        help=f'added to each question as a line of its own (default: for tags "{TAGS_INSTRUCTION}", else none)',
    )
    made.add_argument(
        "--strict",
        action="store_true",
        help="only full marks count; with last-number, only a response that is nothing but the number",
    )
    given = parser.parse_args(arguments)
    options = {name: value for name, value in vars(given).items() if name not in COMMON}
    try:
        if given.task == GENERATED:
            for name, instead in (
                ("local", "its problems are generated"),
                ("limit", "use --train-size and --test-size"),
            ):
                if getattr(given, name) is not None:
                    parser.error(f"--{name} is not for {GENERATED}: {instead}")
            if "dataset" not in options:
                parser.error(f"{GENERATED} needs --dataset, such as --dataset chain_sum")
            options["settings"] = parse_settings(options.pop("set", ()))
            if "answer" in options:
                options["answer_from"] = options.pop("answer")
            for written in prepare_problems(Problems(**options), [given.split] if given.split else SPLITS, given.out):
                _report(written)
        else:
            if options:
                parser.error(f"--{next(iter(options)).replace('_', '-')} is for {GENERATED} alone")
            _prepare_stored(parser, given)
    except TaskError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


def _prepare_stored(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    task = TASKS[given.task]
    splits = [given.split] if given.split else list(task.sources)
    if not set(splits) <= task.sources.keys():
        parser.error(f"{given.task} has no split {given.split}, only {', '.join(task.sources)}")
    if given.local and given.local.is_file() and len(splits) > 1:
        parser.error(f"--local {given.local} is one file: pass --split to say which of {', '.join(splits)} it is")
    for split in splits:
        _report(prepare(given.task, task, split, given.out, local=given.local, limit=given.limit))


def _report(written: Written) -> None:
    print(f"{written.path}: {written.rows} rows")
    for reason, count in written.left_out.items():
        first = f", the first: {written.firsts[reason]}" if reason in written.firsts else ""
        print(f"  left out: {count} ({reason}){first}")


if __name__ == "__main__":
    sys.exit(main())
