"""The points of metrics while a file is read, and the limit on how many are kept."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

from verl_troll.tools.report.errors import ReportError, short, shown_path
from verl_troll.tools.report.runs import Series
from verl_troll.tools.report.values import as_float

MAX_VALUES = 20_000_000
"""Values kept of one file, at about 40 bytes each."""


class Kept:
    """Counts what is kept of one file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values = 0

    def more(self, values: int) -> None:
        """Count values.

        Raises:
            ReportError: they are too many.
        """
        self._values += values
        if self._values > MAX_VALUES:
            raise ReportError(
                f"{shown_path(self._path)} has more than {MAX_VALUES:,} values of the metrics shown: keep fewer steps"
            )


class Points:
    """The points of one metric in the order read; a later one of the same step counts."""

    def __init__(self) -> None:
        self.steps = array("q")
        self.values = array("d")
        self.increase = True

    def add(self, step: int, value: float) -> None:
        """Append a point."""
        if self.steps and step <= self.steps[-1]:
            self.increase = False
        self.steps.append(step)
        self.values.append(value)

    def without(self, first: int) -> Points:
        """Those of steps before ``first``."""
        kept = Points()
        for step, value in zip(self.steps, self.values, strict=True):
            if step < first:
                kept.add(step, value)
        return kept


def add(points: dict[str, Points], kept: Kept, where: str, key: str, step: int, value: Any) -> None:
    """Append a point to the metric ``key``.

    Raises:
        ReportError: the value is no number, or too many are kept; the message begins with ``where``.
    """
    number = as_float(value)
    if number is None:
        raise ReportError(f"{where}: {shown_path(key)} must be a number, got {short(value)}")
    kept.more(1)
    if key not in points:
        points[key] = Points()
    points[key].add(step, number)


def drop_from(points: dict[str, Points], first: int) -> None:
    """Drop the points of step ``first`` and later."""
    for key, one in points.items():
        if one.steps and max(one.steps) >= first:
            points[key] = one.without(first)


def as_series(points: dict[str, Points]) -> dict[str, Series]:
    """The series of each metric; takes the points, which are large, one by one."""
    known: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    found = {}
    for key in list(points):
        one = points.pop(key)
        if one.increase:
            steps, values = tuple(one.steps), tuple(one.values)
        else:
            by_step = dict(sorted(dict(zip(one.steps, one.values, strict=True)).items()))
            steps, values = tuple(by_step), tuple(by_step.values())
        # Most metrics are logged at the same steps.
        alike = known.setdefault((len(steps), sum(steps)), [])
        if (same := next((other for other in alike if other == steps), None)) is None:
            alike.append(steps)
        found[key] = Series(same or steps, values)
    return {key: series for key, series in found.items() if series}
