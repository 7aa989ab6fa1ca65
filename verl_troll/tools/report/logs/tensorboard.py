"""Reads runs from TensorBoard's event files: which files are one run, resumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from verl_troll.tools.report.errors import INSTALL, ReportError, Warn, shown_path
from verl_troll.tools.report.logs import events
from verl_troll.tools.report.logs.description import described, earlier_name, several_runs
from verl_troll.tools.report.logs.files import opened
from verl_troll.tools.report.logs.points import Kept, Points, add, as_series, drop_from
from verl_troll.tools.report.metrics import is_shown
from verl_troll.tools.report.runs import Run
from verl_troll.tools.report.values import MAX_STEP, is_step


@dataclass
class EventFile:
    """What one event file holds; ``restart`` is the first step of earlier files that it replaces."""

    path: Path
    points: dict[str, Points]
    restart: int
    extent: events.Extent


class _Events:
    """One run, in one or more event files."""

    def __init__(self, file: EventFile):
        self.first, self.last = file.extent.first, file.extent.last
        self.begun, self.ended = file.extent.begun, file.extent.ended
        self.points = file.points
        self.files = [file.path]

    def may_continue_in(self, file: EventFile) -> bool:
        """Whether ``file`` may be a resumption: it begins after this run's first step, and after its last event."""
        return file.extent.first > self.first and file.extent.begun >= self.ended

    def add(self, file: EventFile) -> None:
        """Add a resumption."""
        drop_from(self.points, file.restart)
        for key, more in file.points.items():
            points = self.points.setdefault(key, Points())
            for step, value in zip(more.steps, more.values, strict=True):
                points.add(step, value)
        self.last, self.ended = max(self.last, file.extent.last), max(self.ended, file.extent.ended)
        self.files.append(file.path)


def runs_in_events(path: Path, files: Sequence[EventFile], warn: Warn) -> Iterator[Run]:
    """The runs of one folder's event files.

    Raises:
        ReportError: a file may be the resumption of either of two runs.
    """
    runs: list[_Events] = []
    for file in sorted(files, key=lambda file: (file.extent.begun, file.path.name)):
        if not file.extent:
            continue
        former = [run for run in runs if run.may_continue_in(file)]
        former = [run for run in former if file.extent.first <= run.last + 1] or former
        # Of runs one after the other, a checkpoint is the last one's.
        former = [run for run in former if all(other.begun <= run.ended for other in former if other is not run)]
        if len(former) > 1:
            names = " or ".join(shown_path(run.files[-1].name) for run in former)
            raise ReportError(
                f"{shown_path(file.path)} may resume the run of {names}: give each run a folder of its own"
            )
        if not former:
            runs.append(_Events(file))
            continue
        if file.extent.first > former[0].last + 1:
            warn(
                f"{shown_path(file.path)} begins at step {file.extent.first}, and {former[0].files[-1].name} ends at "
                f"step {former[0].last}: read as one resumed run, without the steps between them"
            )
        former[0].add(file)
    found = [(metrics, run.files) for run in runs if (metrics := as_series(run.points))]
    if not found and files:
        warn(f"{shown_path(path)} holds no scalar that the report shows: the run ended before its first step")
    if len(found) > 1:
        names = "; ".join(shown_path(", ".join(file.name for file in run)) for _, run in found)
        warn(several_runs(path, len(found), names))
    for index, (metrics, run) in enumerate(found):
        one = described(metrics, path, "TensorBoard")
        source = one.source if len(found) == 1 else str(run[0])
        yield dataclasses.replace(one, earlier=earlier_name(index, len(found)), source=source)


def read_event_file(file: Path, warn: Warn) -> EventFile:
    """What an event file holds."""
    shown = shown_path(file)

    def cut() -> None:
        warn(f"{shown}: the last record is incomplete and was skipped, as an interrupted run leaves it")

    points: dict[str, Points] = {}
    kept = Kept(file)
    restart = MAX_STEP + 1
    extent = events.Extent()
    with opened(file) as stream:
        try:
            for key, step, value in events.scalars(stream, is_shown, cut, extent):
                if not key:
                    restart = min(restart, step)
                    drop_from(points, step)
                elif not is_step(step):
                    raise ReportError(
                        f"{shown}: the step of {shown_path(key)} must be from 0 to {MAX_STEP:,}, got {step}"
                    )
                else:
                    add(points, kept, shown, key, step, value)
        except events.DamagedError as error:
            raise ReportError(f"{shown}: {error}") from None
        except ImportError:
            raise ReportError(
                f"{shown} holds TensorBoard events, and tensorboard is not installed: {INSTALL}"
            ) from None
    return EventFile(file, points, restart, extent)
