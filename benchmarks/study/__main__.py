"""The command line: ``python -m benchmarks.study run``, ``list``, ``cell``, ``export``, ``tables``."""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.study import grid, results
from benchmarks.study.cells import LOSSES, PROMPTS, TASKS_FOLDER, Cell
from benchmarks.study.pool import Pool
from benchmarks.study.tasks import TASKS
from verl_troll.tools import disk


def _prepare(names: Sequence[str]) -> None:
    from benchmarks.study.prepare import prepare

    for name in names:
        prepare(name, TASKS_FOLDER / name)


def _say(text: str) -> None:
    print(text, flush=True)


def _run(options: argparse.Namespace) -> int:
    tasks = options.task or grid.TASKS
    _prepare(tasks)

    sections = options.section or tuple(grid.SECTIONS)
    failed = Pool(lambda done: grid.in_order(done, sections, tasks), options.results, say=_say).run(
        options.workers, options.minutes
    )
    return 1 if failed else 0


def _list(options: argparse.Namespace) -> int:
    done = results.read(options.results)
    seen: set[str] = set()
    for name, section in grid.SECTIONS.items():
        keys = {cell.key for cell in section.cells(done)}
        print(f"{name:<12} {len(keys & done.keys()):>4} of {len(keys):>4} runs done   {section.about}")
        seen |= keys
    seconds = [line["run"]["seconds"] for line in done.values()]
    left = len(seen - done.keys())
    mean = sum(seconds) / len(seconds) if seconds else 60.0
    print(f"{left} known runs left, about {left * mean / 2 / 3600:.1f} h, two at a time ({mean:.0f} s each)")
    return 0


def _cell(options: argparse.Namespace) -> int:
    cell = Cell(
        options.task,
        options.loss,
        options.lr,
        options.seed,
        estimator=options.estimator,
        mini_batches=options.mini_batches,
        epochs=options.epochs,
        staleness=options.staleness,
        old_policy=options.old_policy,
        temperature=options.temperature,
        steps=options.steps,
        settings=tuple(options.set),
        prompts=options.prompts,
    )
    _prepare([cell.task])
    failed = Pool(lambda done: [cell], options.results, say=_say).run(1, math.inf)
    if failed:
        return 1
    line = results.read(options.results)[cell.key]
    for step, value in zip(line["metrics"]["step"], line["metrics"][results.held_out_key(cell.task)], strict=True):
        if value is not None:
            print(f"  step {step:>3}   held-out success {value:.3f}")
    published = results.read().get(cell.key)
    if published:
        print(f"  published: {results.final_success(published):.3f}, here: {results.final_success(line):.3f}")
    return 0


def _export(options: argparse.Namespace) -> int:
    done = results.read(options.results)
    lines = [done[cell.key] for cell in grid.SECTIONS[options.section].cells(done) if cell.key in done]
    if not lines:
        print(f"{options.results} holds no run of the section {options.section}", file=sys.stderr)
        return 1
    options.out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"{options.out}: {len(lines)} runs")
    return 0


def _tables(options: argparse.Namespace) -> int:
    from benchmarks.study import tables

    done = results.read(options.results)
    lines = [done[cell.key] for cell in grid.SECTIONS[options.section].cells(done) if cell.key in done]
    if options.entropy:
        text = tables.entropy_by_rate(lines)
    else:
        text = tables.by_rate(lines) if options.by_rate else tables.by_arm(lines, options.baseline)
    print("\n".join(text))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description="Compare TROLL with its rivals.")
    parser.set_defaults(results=results.FILE)
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="train the rest of the grid; safe to interrupt and restart")
    run.add_argument("--section", action="append", choices=grid.SECTIONS, help="only this section; may be repeated")
    run.add_argument("--task", action="append", choices=grid.TASKS, help="only this task; may be repeated")
    run.add_argument("--workers", type=int, default=2, help="parallel runs, one core each (default 2)")
    run.add_argument("--minutes", type=float, default=math.inf, help="start no run after this many minutes")
    run.add_argument("--results", type=Path, default=results.FILE, help="file to append runs to")
    run.set_defaults(act=_run)

    listed = commands.add_parser("list", help="list the grid's sections and their progress")
    listed.add_argument("--results", type=Path, default=results.FILE)
    listed.set_defaults(act=_list)

    cell = commands.add_parser("cell", help="train one run of the grid, or one of your own")
    cell.add_argument("--task", choices=TASKS, default="chain")
    cell.add_argument("--loss", choices=LOSSES, default="union")
    cell.add_argument("--lr", type=float, default=2e-4)
    cell.add_argument("--seed", type=int, default=0)
    cell.add_argument("--estimator", default="grpo")
    cell.add_argument("--prompts", type=int, default=PROMPTS, help="prompts per step")
    cell.add_argument("--mini-batches", type=int, default=8)
    cell.add_argument("--epochs", type=int, default=1)
    cell.add_argument("--staleness", type=int, default=0)
    cell.add_argument("--old-policy", choices=("rescored", "behaviour"), default="rescored")
    cell.add_argument("--temperature", type=float, default=1.0)
    cell.add_argument("--steps", type=int, default=grid.STEPS)
    cell.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a verl setting, or troll.NAME=VALUE"
    )
    cell.add_argument("--results", type=Path, default=TASKS_FOLDER.parent / "cell.jsonl")
    cell.set_defaults(act=_cell)

    export = commands.add_parser("export", help="export the runs of one section, for verl-troll report")
    export.add_argument("section", choices=grid.SECTIONS)
    export.add_argument("out", type=Path)
    export.add_argument("--results", type=Path, default=results.FILE)
    export.set_defaults(act=_export)

    shown = commands.add_parser("tables", help="print the tables of docs/study.md")
    shown.add_argument("section", choices=grid.SECTIONS)
    shown.add_argument("--by-rate", action="store_true", help="show final success at each rate")
    shown.add_argument("--entropy", action="store_true", help="show the last step's entropy at each rate")
    shown.add_argument("--baseline", choices=LOSSES, default="clip", help="loss to compare the others with")
    shown.add_argument("--results", type=Path, default=results.FILE)
    shown.set_defaults(act=_tables)

    options = parser.parse_args(arguments)
    # Background jobs ignore SIGINT, and SIGTERM would leave Ray's processes behind.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        return int(options.act(options))
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        place = disk.Place("results of the study", options.results, "--results FILE")
        print(f"{error}\n{disk.Watch([place]).complaint()}".rstrip(), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
