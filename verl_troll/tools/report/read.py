"""Finds the runs under files and folders, and leaves out duplicates and what cannot be read."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from verl_troll.tools.report.errors import ForeignError, ReportError, Warn, short, shown_path
from verl_troll.tools.report.logs.files import EVENT_FILE, status
from verl_troll.tools.report.logs.json_lines import runs_in_lines
from verl_troll.tools.report.logs.tensorboard import EventFile, read_event_file, runs_in_events
from verl_troll.tools.report.runs import Run

MAX_FOREIGN_NAMED = 3
"""Files of other kinds in one folder that are named; of more, the others are counted."""
_MAX_FAULTS_SHOWN = 20
_Note = Callable[["str | ForeignError"], None]


def warn_on_stderr(text: str) -> None:
    """Print a warning."""
    print(f"verl-troll report: {text}", file=sys.stderr)


def read_runs(paths: Sequence[str | Path], warn: Warn = warn_on_stderr, fault: Warn | None = None) -> list[Run]:
    """Every run under ``paths``, in order; of duplicates the later one.

    A file that is damaged or cannot be read is left out as a whole; the others are read.

    Args:
        paths: files, or folders to search; ``NAME=PATH`` sets the arm of every run under PATH.
        warn: called with what is as expected and yet left out, and with what is assumed: incomplete last lines,
            duplicates, files without a run or of another kind, several runs in one place.
        fault: called once for each file that is damaged or cannot be read, with the reason; ``warn`` by default.

    Raises:
        ReportError: there is no run; the message has the faults.
    """
    faults: list[str] = []
    notes: list[str | ForeignError] = []
    runs = [run for argument in paths for run in _under(str(argument), notes.append, faults.append)]
    for note in notes:
        if isinstance(note, str):
            warn(note)
        elif runs:
            warn(note.note)
    if not runs:
        raise ReportError(_no_run(paths, [*faults, *(str(note) for note in notes if isinstance(note, ForeignError))]))
    for text in faults:
        (fault or warn)(text)
    kept: dict[object, Run] = {}
    for number, run in enumerate(runs):
        key = number if run.seed is None else _description(run)
        if key in kept:
            former = kept.pop(key).source
            differ = (
                "the fields that tell them apart, such as run.settings"
                if former == run.source
                else "their arms different names with NAME=PATH"
            )
            warn(
                f"{shown_path(run.source)}: {_words(run)} was read before, from {shown_path(former)}; the later one "
                f"counts. If the runs differ, give {differ}"
            )
        kept[key] = run
    return list(kept.values())


def _no_run(paths: Sequence[str | Path], faults: Sequence[str]) -> str:
    if not faults:
        return (
            f"no run in {', '.join(map(shown_path, paths)) or 'no path'}: give metrics.jsonl of verl's file logger, "
            "TensorBoard event files, a file of collected runs, or a folder that holds any of them"
        )
    more = len(faults) - _MAX_FAULTS_SHOWN
    return "\n".join([*faults[:_MAX_FAULTS_SHOWN], *([f"and {more} more"] if more > 0 else [])])


def _description(run: Run) -> tuple[object, ...]:
    settings = json.dumps(run.settings, sort_keys=True, default=str)
    return run.task, run.section, run.arm, run.seed, run.lr, settings


def _words(run: Run) -> str:
    rate = "" if run.lr is None else f", learning rate {run.lr:g}"
    return f"arm {short(run.arm)}, seed {run.seed}{rate}{f', task {short(run.task)}' if run.task else ''}"


def _under(argument: str, note: _Note, fault: Warn) -> Iterator[Run]:
    name, path = None, Path(argument)
    try:
        if not argument:
            raise ReportError("'' is no path: give a file or a folder of a run")
        if not os.path.lexists(argument) and "=" in argument:
            name, _, rest = argument.partition("=")
            path = Path(rest)
            if not name or not rest:
                raise ReportError(f"{short(argument)}: an arm is named as NAME=PATH, with neither left out")
        folder = stat.S_ISDIR(status(path, short(str(path))).st_mode)
    except ReportError as error:
        fault(str(error))
        return
    for run in _in_folder(path, note, fault) if folder else _in_file(path, note, fault):
        yield dataclasses.replace(run, argument=argument, arm=(run.arm if name is None else name) + run.earlier)


def _in_folder(folder: Path, note: _Note, fault: Warn) -> Iterator[Run]:
    def unreadable(error: OSError) -> None:
        fault(f"{shown_path(error.filename)} cannot be searched: {error.strerror}")

    for parent, folders, files in os.walk(folder, onerror=unreadable):
        folders.sort()
        if found := sorted(name for name in files if EVENT_FILE in name):
            yield from _tensorboard(Path(parent), [Path(parent) / name for name in found], note, fault)
        foreign: list[ForeignError] = []

        def noted(what: str | ForeignError, foreign: list[ForeignError] = foreign) -> None:
            if isinstance(what, str):
                note(what)
            else:
                foreign.append(what)

        for name in sorted(files):
            if name.endswith(".jsonl"):
                yield from _in_file(Path(parent) / name, noted, fault)
        for error in foreign if len(foreign) <= MAX_FOREIGN_NAMED else [_several_foreign(Path(parent), foreign)]:
            note(error)


def _several_foreign(folder: Path, errors: Sequence[ForeignError]) -> ForeignError:
    """One error for many foreign files of a folder, such as rollouts dumped at each step."""
    names = ", ".join(shown_path(error.path.name) for error in errors[:MAX_FOREIGN_NAMED])
    which = f": {names} and {len(errors) - MAX_FOREIGN_NAMED} more"
    told = ForeignError(folder, f"{which} are of another kind; the first: {errors[0]}")
    told.note = (
        f"{shown_path(folder)}{which} are left out: they are neither logs of verl's file logger nor files of "
        "collected runs"
    )
    return told


def _in_file(path: Path, note: _Note, fault: Warn) -> Iterator[Run]:
    if EVENT_FILE in path.name:
        yield from _tensorboard(path, [path], note, fault)
    else:
        yield from _all_or_none(lambda: runs_in_lines(path, note), path, note, fault)


def _tensorboard(path: Path, files: Sequence[Path], note: _Note, fault: Warn) -> Iterator[Run]:
    """The runs whose event files are ``files``, all in or at ``path``."""
    read: list[EventFile] = []
    for file in files:
        try:
            read.append(read_event_file(file, note))
        except ReportError as error:
            fault(str(error))
        except OSError as error:
            fault(f"{shown_path(file)} cannot be read: {error.strerror}")
    yield from _all_or_none(lambda: runs_in_events(path, read, note), path, note, fault)


def _all_or_none(read: Callable[[], Iterable[Run]], path: Path, note: _Note, fault: Warn) -> list[Run]:
    """The runs, or none and a fault; a note if the file is of another kind."""
    try:
        return list(read())
    except ForeignError as error:
        note(error)
    except ReportError as error:
        fault(str(error))
    except OSError as error:
        fault(f"{shown_path(path)} cannot be read: {error.strerror}")
    except RecursionError:
        fault(f"{shown_path(path)} is nested too deeply")
    return []
