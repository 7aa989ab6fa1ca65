"""The options of ``verl-troll report``."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from verl_troll.tools.report.errors import INSTALL, ReportError, short
from verl_troll.tools.report.read import read_runs, warn_on_stderr
from verl_troll.tools.report.runs import Run

if TYPE_CHECKING:
    from verl_troll.tools.report.comparison import TaskComparison

_NEEDED = ("scipy", "matplotlib", "jinja2")


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``verl-troll report``."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUNS",
        help="metrics.jsonl of verl's file logger, TensorBoard event files, files of collected runs, or folders that "
        "are searched for these; NAME=PATH names the arm of all that PATH holds",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="output page (default report.html); its pictures go to a folder beside it, e.g. report-figures",
    )
    parser.add_argument(
        "--baseline",
        metavar="ARM",
        help="arm to compare the others with (default: vanilla, else clip, else the first)",
    )
    parser.add_argument(
        "--threshold",
        type=_finite,
        metavar="X",
        help="held-out success for 'steps to threshold' (default: halfway from the start to the best arm's final)",
    )


def _command(arguments: argparse.Namespace) -> str:
    parts = ["verl-troll", "report", *arguments.runs, "--out", str(arguments.out)]
    parts += [] if arguments.baseline is None else ["--baseline", arguments.baseline]
    parts += [] if arguments.threshold is None else ["--threshold", f"{arguments.threshold:g}"]
    return shlex.join(parts)


def run(arguments: argparse.Namespace) -> int:
    """Write the report. Return 0; 1 if an input could not be read and is left out; 2 if there is no page."""
    notes: list[str] = []
    faults: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        warn_on_stderr(text)

    def fault(text: str) -> None:
        faults.append(text)
        warn_on_stderr(f"left out: {text}")

    try:
        missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise ReportError(f"{', '.join(missing)} not installed: {INSTALL}")
        if os.path.isdir(arguments.out):
            raise ReportError(f"--out {str(arguments.out)!r} is a folder: give the name of a file, e.g. report.html")
        if not os.path.isdir(arguments.out.parent):
            raise ReportError(f"--out: the folder {short(str(arguments.out.parent))} does not exist: make it first")
        from verl_troll.tools.report import comparison

        runs = read_runs(arguments.runs, note, fault)
        compared = comparison.compare(runs, arguments.baseline, arguments.threshold)
        pictures = _write(compared, runs, arguments, notes, faults)
    except ReportError as error:
        print(f"verl-troll report: {error}", file=sys.stderr)
        return 2
    counted = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    where = f" in {pictures[0].parent}" if pictures else ""
    missing_inputs = f"; {len(faults)} left out, see above" if faults else ""
    text = f"{arguments.out}: {counted}; {len(pictures)} pictures{where}{missing_inputs}"
    # A name need not be UTF-8.
    print(text.encode(errors="backslashreplace").decode())
    return 1 if faults else 0


def _write(
    compared: Sequence[TaskComparison],
    runs: Sequence[Run],
    arguments: argparse.Namespace,
    notes: Sequence[str],
    faults: Sequence[str],
) -> list[Path]:
    try:
        # matplotlib needs a folder to write to when it is imported.
        from verl_troll.tools.report import page

        return page.write(compared, runs, arguments.out, _command(arguments), notes, faults)
    except OSError as error:
        name = short(str(arguments.out if error.filename is None else error.filename))
        raise ReportError(f"--out: {name} cannot be written: {error.strerror or error}") from None
