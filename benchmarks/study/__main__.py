"""The command line: ``python -m benchmarks.study --help`` lists the commands."""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.study import grid, pretrained, results
from benchmarks.study.cells import DEVICES, LOSSES, PRETRAINED_PROMPTS, PROMPTS, TASKS_FOLDER, TRAINERS, Cell
from benchmarks.study.pool import Pool
from benchmarks.study.tasks import NAMES, PRETRAINED
from verl_troll.tools import disk

SECTIONS = {**grid.SECTIONS, **pretrained.SECTIONS}


class _Part(NamedTuple):
    tasks: Sequence[str]
    sections: Mapping[str, grid.Section]
    in_order: Callable[[results.Results, Sequence[str], Sequence[str]], Iterator[Cell]]


PARTS = {
    False: _Part(grid.TASKS, grid.SECTIONS, grid.in_order),
    True: _Part(pretrained.TASKS, pretrained.SECTIONS, pretrained.in_order),
}
"""The parts of the study, by whether the model is a pretrained one."""


def _prepare(names: Sequence[str]) -> None:
    from benchmarks.study.prepare import prepare

    for name in names:
        prepare(name, TASKS_FOLDER / name)


def _say(text: str) -> None:
    print(text, flush=True)


def _run(options: argparse.Namespace) -> int:
    part = PARTS[options.pretrained]
    tasks, sections = options.task or part.tasks, options.section or tuple(part.sections)
    if strange := [name for name in sections if name not in part.sections]:
        print(f"--section {strange[0]}: must be one of {', '.join(part.sections)}", file=sys.stderr)
        return 2
    _prepare(tasks)

    losses = options.loss or tuple(LOSSES)

    def wanted(done: results.Results) -> Iterator[Cell]:
        return (cell for cell in part.in_order(done, sections, tasks) if cell.loss in losses)

    failed = Pool(wanted, options.results, say=_say, device=options.device).run(options.workers, options.minutes)
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


def _plan(options: argparse.Namespace) -> int:
    done = results.read(options.results)
    total = 0.0
    print(f"{'stage':<26} {'runs':>4} {'done':>4} {'hours':>6} {'so far':>6}   two cores, two runs at a time")
    for name, cells in pretrained.planned(done).items():
        left = [cell for cell in cells if cell.key not in done]
        hours = sum(pretrained.seconds(cell, done) for cell in left) / 2 / 3600
        total += hours
        about = SECTIONS[name].about
        print(f"{name:<26} {len(cells):>4} {len(cells) - len(left):>4} {hours:>6.1f} {total:>6.1f}   {about}")
    print("Arms whose best rate is at the end of the range take a run or two more.")
    return 0


def _survey(options: argparse.Namespace) -> int:
    from benchmarks.study import survey
    from benchmarks.study.prepare import MODEL, prepare_model

    prepare_model(model := TASKS_FOLDER / MODEL)
    survey.run(model, options.results, options.prompts, say=_say)
    print("\n".join(survey.table(survey.read(options.results))))
    return 0


def _cell(options: argparse.Namespace) -> int:
    cell = Cell(
        options.task,
        options.loss,
        options.lr,
        options.seed,
        estimator=options.estimator,
        mini_batches=options.mini_batches or (pretrained.ONCE["mini_batches"] if options.task in PRETRAINED else 8),
        epochs=options.epochs,
        staleness=options.staleness,
        old_policy=options.old_policy,
        temperature=options.temperature,
        steps=options.steps or (pretrained.ONCE["steps"] if options.task in PRETRAINED else grid.STEPS),
        settings=tuple(options.set),
        prompts=options.prompts or (PRETRAINED_PROMPTS if options.task in PRETRAINED else PROMPTS),
        trainer=options.trainer,
    )
    _prepare([cell.task])
    failed = Pool(lambda done: [cell], options.results, say=_say, device=options.device).run(1, math.inf)
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
    lines = [done[cell.key] for cell in SECTIONS[options.section].cells(done) if cell.key in done]
    if not lines:
        print(f"{options.results} holds no run of the section {options.section}", file=sys.stderr)
        return 1
    options.out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"{options.out}: {len(lines)} runs")
    return 0


def _tables(options: argparse.Namespace) -> int:
    from benchmarks.study import tables

    done = results.read(options.results)
    lines = [done[cell.key] for cell in SECTIONS[options.section].cells(done) if cell.key in done]
    if options.entropy:
        text = tables.entropy_by_rate(lines)
    elif options.by_rate:
        text = tables.by_rate(lines)
    elif options.section in pretrained.SECTIONS:
        text = tables.pretrained(lines, options.baseline)
    else:
        text = tables.by_arm(lines, options.baseline)
    print("\n".join(text))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description="Compare TROLL with its rivals.")
    parser.set_defaults(results=results.FILE)
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="train the rest of the grid; safe to interrupt and restart")
    run.add_argument("--section", action="append", choices=SECTIONS, help="only this section; may be repeated")
    run.add_argument("--task", action="append", choices=NAMES, help="only this task; may be repeated")
    run.add_argument("--loss", action="append", choices=LOSSES, help="only this loss; may be repeated")
    run.add_argument("--pretrained", action="store_true", help="the part on the pretrained model")
    run.add_argument("--workers", type=int, default=2, help="parallel runs, one core each (default 2)")
    run.add_argument("--minutes", type=float, default=math.inf, help="start no run after this many minutes")
    run.add_argument("--results", type=Path, default=results.FILE, help="file to append runs to")
    run.add_argument("--device", choices=DEVICES, default=DEVICES[0], help="cuda: all workers share one GPU")
    run.set_defaults(act=_run)

    listed = commands.add_parser("list", help="list the grid's sections and their progress")
    listed.add_argument("--results", type=Path, default=results.FILE)
    listed.set_defaults(act=_list)

    plan = commands.add_parser("plan", help="what the part on the pretrained model will take")
    plan.add_argument("--results", type=Path, default=results.FILE)
    plan.set_defaults(act=_plan)

    survey = commands.add_parser("survey", help="how the pretrained model does on candidate tasks, about a minute each")
    survey.add_argument("--prompts", type=int, default=32)
    survey.add_argument("--results", type=Path, default=results.FILE.with_name("survey.jsonl"))
    survey.set_defaults(act=_survey)

    cell = commands.add_parser("cell", help="train one run of the grid, or one of your own")
    cell.add_argument("--task", choices=NAMES, default="chain")
    cell.add_argument("--loss", choices=LOSSES, default="union")
    cell.add_argument("--lr", type=float, default=2e-4)
    cell.add_argument("--seed", type=int, default=0)
    cell.add_argument("--estimator", default="grpo")
    cell.add_argument("--prompts", type=int, help="prompts per step; default 16, with a pretrained model 8")
    cell.add_argument("--mini-batches", type=int, help="default 8, with a pretrained model 4")
    cell.add_argument("--epochs", type=int, default=1)
    cell.add_argument("--staleness", type=int, default=0)
    cell.add_argument("--old-policy", choices=("rescored", "behaviour"), default="rescored")
    cell.add_argument("--temperature", type=float, default=1.0)
    cell.add_argument("--trainer", choices=TRAINERS, default=TRAINERS[0])
    cell.add_argument("--steps", type=int, help="default 40, with a pretrained model 12")
    cell.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a verl setting, or troll.NAME=VALUE"
    )
    cell.add_argument("--device", choices=DEVICES, default=DEVICES[0])
    cell.add_argument("--results", type=Path, default=TASKS_FOLDER.parent / "cell.jsonl")
    cell.set_defaults(act=_cell)

    export = commands.add_parser("export", help="export the runs of one section, for verl-troll report")
    export.add_argument("section", choices=SECTIONS)
    export.add_argument("out", type=Path)
    export.add_argument("--results", type=Path, default=results.FILE)
    export.set_defaults(act=_export)

    shown = commands.add_parser("tables", help="print the tables of docs/study.md")
    shown.add_argument("section", choices=SECTIONS)
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
