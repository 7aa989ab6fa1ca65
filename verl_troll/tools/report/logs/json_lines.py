"""Reads verl's file logger, and files of collected runs, one per line."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_troll.tools.report.errors import ForeignError, ReportError, Warn, short, shown_path
from verl_troll.tools.report.logs.description import described, earlier_name, several_runs
from verl_troll.tools.report.logs.files import opened
from verl_troll.tools.report.logs.points import Kept, Points, add, as_series
from verl_troll.tools.report.metrics import is_shown
from verl_troll.tools.report.runs import Run, Series, series_of
from verl_troll.tools.report.values import MAX_STEP, as_float, as_rate, as_setting, is_step, is_whole

MAX_LINE_BYTES = 32 * 2**20
"""A longer line is refused: parsed, it may take twenty times as much memory."""
MAX_RUNS = 100_000
"""Runs of one file of collected runs."""
HEAD_BYTES = 64 * 2**10
HEAD_LINES = 100
"""What a file is looked at to tell whether it is a log at all: bytes of a line, lines."""
MIN_LINES_BETWEEN_RESTARTS = 3
"""Fewer, on average, are no resumed run: two runs wrote to the file at once."""


def runs_in_lines(path: Path, warn: Warn) -> Iterator[Run]:
    """The runs of a file of either format, told by its first line.

    Raises:
        ForeignError: the file has neither format.
        ReportError: it is damaged, or has more runs, values or bytes per line than are read.
    """
    lines = _json_lines(path, warn)
    number, first = next(lines, (0, None))
    if not number:
        warn(f"{shown_path(path)} holds no step: the run ended before its first one")
        return
    line = first if isinstance(first, dict) else {}
    if isinstance(line.get("run"), dict) and isinstance(line.get("metrics"), dict):
        kept = Kept(path)
        yield _collected(first, f"{shown_path(path)}:{number}", path, kept)
        for count, (number, line) in enumerate(lines, 2):
            if count > MAX_RUNS:
                raise ReportError(f"{shown_path(path)} has more than {MAX_RUNS:,} runs: split it")
            yield _collected(line, f"{shown_path(path)}:{number}", path, kept)
    elif isinstance(line.get("data"), dict) and (is_step(line.get("step")) or any(map(is_shown, line["data"]))):
        yield from _file_logger(number, first, lines, path, warn)
    else:
        raise _foreign(path, number, first)


def _foreign(path: Path, number: int, line: Any) -> ForeignError:
    got = short(sorted(line)) if isinstance(line, dict) else type(line).__name__
    return ForeignError(
        path,
        f":{number}: a line has either 'step' and 'data' with metrics (verl's file logger) or 'run' and 'metrics' "
        f"(collected runs), got {got}",
    )


def _may_be_a_log(*lines: bytes) -> bool:
    """Whether lines that cannot be read begin as a log does, in whatever encoding."""
    head = b"".join(line[:HEAD_BYTES].replace(b"\0", b"") for line in lines)
    return any(all(name in head for name in names) for names in ((b'"step"', b'"data"'), (b'"run"', b'"metrics"')))


def _json_lines(path: Path, warn: Warn) -> Iterator[tuple[int, Any]]:
    """Number and content of each line that is not blank."""
    damaged: tuple[int, Exception, bytes] | None = None
    sound = False
    for number, line in _lines(path):
        if damaged and not sound and not _may_be_a_log(damaged[2], line):
            raise ForeignError(path, f":{damaged[0]}: not JSON ({damaged[1]})")
        if damaged:
            raise ReportError(
                f"{shown_path(path)}:{damaged[0]}: not JSON ({damaged[1]}): only the last line of an interrupted run "
                "may be damaged; fix or remove the line"
            )
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            damaged = number, error, line
            continue
        except (ValueError, RecursionError) as error:
            raise ReportError(f"{shown_path(path)}:{number}: not JSON that can be read ({error})") from None
        sound = True
        yield number, value
    if damaged:
        warn(
            f"{shown_path(path)}:{damaged[0]}: the last line is damaged and was skipped, as an interrupted run "
            "leaves it"
        )


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    with opened(path) as stream:
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                reason = f":{number}: a line of more than {MAX_LINE_BYTES / 2**20:g} MiB is not read"
                if number == 1 and not _may_be_a_log(line):
                    raise ForeignError(path, reason)
                raise ReportError(f"{shown_path(path)}{reason}")
            if line.strip():
                yield number, line


@dataclass
class _Logged:
    """What one run logged, from step ``first`` on."""

    first: int
    points: dict[str, Points] = field(default_factory=dict)

    def has(self, step: int, names: Iterable[str]) -> bool:
        """Whether one of the metrics was just logged at ``step``."""
        return any(name in self.points and self.points[name].steps[-1] == step for name in names)


def _file_logger(number: int, line: Any, rest: Iterator[tuple[int, Any]], path: Path, warn: Warn) -> Iterator[Run]:
    """The runs of one log: more than one if logs were joined."""
    runs: list[_Logged] = []
    kept = Kept(path)
    first, start, read, restarts, named = line, number, 0, 0, False
    latest = -1
    while number:
        where = f"{shown_path(path)}:{number}"
        if not isinstance(line, dict) or not isinstance(line.get("data"), dict) or not is_step(line.get("step")):
            raise ReportError(
                f"{where}: expected {{'step': whole number, 'data': {{metric: number}}}}, with a step of at most "
                f"{MAX_STEP:,}"
            )
        step, data = line["step"], {key: value for key, value in line["data"].items() if is_shown(key)}
        read += 1
        named = named or not line["data"] or bool(data) or any("/" in key for key in line["data"])
        if not named and read == HEAD_LINES:
            break
        if not runs or step < latest or (step == latest and runs[-1].has(step, data)):
            restarts += 1
            if not runs or step <= runs[-1].first:
                runs.append(_Logged(step))
        latest = step
        for key, value in data.items():
            # verl's logger writes non-finite values as null.
            add(runs[-1].points, kept, where, key, step, math.nan if value is None else value)
        number, line = next(rest, (0, None))
    if not named:
        raise _foreign(path, start, first["data"])
    if restarts > 3 and read < MIN_LINES_BETWEEN_RESTARTS * restarts:
        raise ReportError(
            f"{shown_path(path)}: its steps start again {restarts - 1} times in {read} lines: two runs wrote to it at "
            "once; give each run a file of its own"
        )
    found = [metrics for run in runs if (metrics := as_series(run.points))]
    if not found:
        warn(f"{shown_path(path)} holds no metric that the report shows")
    if len(found) > 1:
        warn(several_runs(path, len(found), "its steps start again at or before the first one"))
    for index, metrics in enumerate(found):
        yield dataclasses.replace(
            described(metrics, path, "verl's file logger"), earlier=earlier_name(index, len(found))
        )


def _collected(line: Any, where: str, path: Path, kept: Kept) -> Run:
    if not isinstance(line, dict) or not isinstance(line.get("run"), dict) or not isinstance(line.get("metrics"), dict):
        raise ReportError(f"{where}: expected {{'run': {{...}}, 'metrics': {{...}}}}")
    run, columns = line["run"], line["metrics"]
    if not isinstance(run.get("arm"), str) or not run["arm"]:
        raise ReportError(f"{where}: run.arm must be a string, got {short(run.get('arm'))}")
    for key in ("task", "section", "status"):
        if not isinstance(run.get(key, ""), str):
            raise ReportError(f"{where}: run.{key} must be a string, got {short(run[key])}")
    if run.get("seed") is not None and not is_whole(run["seed"]):
        raise ReportError(f"{where}: run.seed must be a whole number below 2^64, got {short(run['seed'])}")
    settings = run.get("settings", {})
    if not isinstance(settings, dict):
        raise ReportError(f"{where}: run.settings must be a mapping, got {short(settings)}")
    steps = columns.get("step")
    if not isinstance(steps, list) or not all(map(is_step, steps)) or sorted(set(steps)) != steps:
        raise ReportError(f"{where}: metrics.step must be a list of increasing whole numbers from 0 to {MAX_STEP:,}")
    metrics = {name: _column(name, column, steps, where) for name, column in columns.items() if name != "step"}
    shown = {name: series for name, series in metrics.items() if is_shown(name)}
    kept.more(sum(len(series.steps) for series in shown.values()))
    return Run(
        task=run.get("task", ""),
        arm=run["arm"],
        seed=run.get("seed"),
        lr=as_rate(run.get("lr"), f"{where}: run.lr"),
        status=run.get("status", ""),
        settings={name: as_setting(value, where) for name, value in _flat(settings)},
        metrics=shown,
        section=run.get("section", ""),
        source=str(path),
        kind="collected runs",
    )


def _column(name: str, column: Any, steps: list[int], where: str) -> Series:
    if not isinstance(column, list) or len(column) != len(steps):
        got = f"{len(column)} values" if isinstance(column, list) else type(column).__name__
        raise ReportError(
            f"{where}: metrics[{short(name)}] must be a list of {len(steps)} values, one per step, got {got}"
        )
    points: dict[int, float] = {}
    for step, value in zip(steps, column, strict=True):
        if value is not None:
            number = as_float(value)
            if number is None:
                raise ReportError(
                    f"{where}: metrics[{short(name)}] at step {step} must be a number or null, got {short(value)}"
                )
            points[step] = number
    return series_of(points)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
