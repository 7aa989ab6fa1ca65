"""Groups runs by task and arm, and computes the statistics of each arm at each learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from verl_troll.tools.report.errors import ReportError, short
from verl_troll.tools.report.runs import Run, Series
from verl_troll.tools.report.statistics import (
    Interval,
    PairedDifference,
    StableRange,
    area_under_curve,
    diverged,
    held_to,
    mean_interval,
    paired_difference,
    stable_range,
    steps_to,
    tail_mean,
)

BASELINES = ("vanilla", "clip")
MAX_CELLS = 500
"""Arms, counted once for each of their learning rates, on one page: tables and legends have a row for each."""

Measure = Callable[[Run], "float | None"]


@dataclass(frozen=True)
class Cell:
    """The runs of one arm at one learning rate; ``rate`` is None if unknown."""

    arm: str
    rate: float | None
    runs: tuple[Run, ...]

    def interval(self, measure: Measure) -> Interval | None:
        """Mean of ``measure`` over the runs that have it; None if no run does."""
        values = [value for run in self.runs if (value := measure(run)) is not None and math.isfinite(value)]
        return mean_interval(values) if values else None

    def diverged(self) -> int:
        """Number of diverged runs."""
        return sum(map(diverged, self.runs))

    def by_seed(self, measure: Measure) -> dict[int, float]:
        """``measure`` by seed, for the runs that have both."""
        values = {run.seed: measure(run) for run in self.runs if run.seed is not None}
        return {seed: value for seed, value in values.items() if value is not None and math.isfinite(value)}


@dataclass(frozen=True)
class Pairing:
    """One arm against the baseline, paired by seed; None if no seed in common has the measure."""

    cell: Cell
    baseline: Cell
    final: PairedDifference | None
    area: PairedDifference | None


@dataclass(frozen=True)
class TaskComparison:
    """All runs of one task (and one section of it).

    Attributes:
        task, section: empty if unknown.
        cells: every arm at every learning rate, baseline first, rates increasing.
        best: each arm's cell with the highest mean final success; its first cell if success was not measured.
        baseline: the arm that others are compared with; None if the task has no such arm.
        threshold: success for ``steps_to``; None if success was not measured.
        last_step: the last step at which any run measured success.
    """

    task: str
    section: str
    cells: tuple[Cell, ...]
    best: Mapping[str, Cell]
    baseline: str | None
    threshold: float | None
    last_step: int

    @property
    def runs(self) -> list[Run]:
        """Every run."""
        return [run for cell in self.cells for run in cell.runs]

    @property
    def several_rates(self) -> bool:
        """Whether runs differ in their learning rate."""
        return len({cell.rate for cell in self.cells}) > 1

    def area(self, run: Run) -> float | None:
        """Mean held-out success over all steps; a run that ended early keeps its last value."""
        series = held_to(run.held_out().finite(), self.last_step)
        return area_under_curve(series.steps, series.values) if series else None

    def steps_to_threshold(self, run: Run) -> float | None:
        """First step at which held-out success reaches the threshold; None if it never does."""
        series = run.held_out().finite()
        return None if self.threshold is None else steps_to(self.threshold, series.steps, series.values)

    def of_arm(self, arm: str) -> list[Cell]:
        """The cells of one arm, one per rate."""
        return [cell for cell in self.cells if cell.arm == arm]

    def at_best_rates(self) -> list[Pairing]:
        """Each arm against the baseline, each at its own best rate."""
        if self.baseline is None:
            return []
        reference = self.best[self.baseline]
        return [self._pairing(cell, reference) for arm, cell in self.best.items() if arm != self.baseline]

    def at_equal_rates(self) -> list[Pairing]:
        """Each arm against the baseline at every rate they share; empty if all runs have one rate."""
        if self.baseline is None or not self.several_rates:
            return []
        reference = {cell.rate: cell for cell in self.of_arm(self.baseline)}
        return [
            self._pairing(cell, reference[cell.rate])
            for cell in self.cells
            if cell.arm != self.baseline and cell.rate in reference
        ]

    def _pairing(self, cell: Cell, baseline: Cell) -> Pairing:
        return Pairing(cell, baseline, *(_pair(cell, baseline, measure) for measure in (final_success, self.area)))

    def stable_ranges(self) -> dict[str, StableRange]:
        """The stable range of each arm that was tried at two or more rates."""
        found = {}
        for arm in self.best:
            success = {
                cell.rate: interval.mean
                for cell in self.of_arm(arm)
                if cell.rate is not None and (interval := cell.interval(final_success))
            }
            if len(success) > 1:
                found[arm] = stable_range(success)
        return found

    def ended_early(self) -> list[Run]:
        """Runs whose last held-out evaluation is before ``last_step``."""
        return [run for run in self.runs if (series := run.held_out()) and series.steps[-1] < self.last_step]


def _pair(cell: Cell, baseline: Cell, measure: Measure) -> PairedDifference | None:
    a, b = cell.by_seed(measure), baseline.by_seed(measure)
    return paired_difference(a, b) if set(a) & set(b) else None


def final_success(run: Run) -> float | None:
    """The last held-out success."""
    series = run.held_out().finite()
    return series.values[-1] if series else None


def start_success(run: Run) -> float | None:
    """The first held-out success."""
    series = run.held_out().finite()
    return series.values[0] if series else None


def best_success(run: Run) -> float | None:
    """The highest held-out success at any step."""
    return max(run.held_out().finite().values, default=None)


def at_the_end(*metrics: str) -> Measure:
    """Mean of a metric over the last tenth of its logged steps."""
    return lambda run: tail_mean(series.values) if (series := run.metric(*metrics).finite()) else None


def mean_of(*metrics: str) -> Measure:
    """Mean of a metric over its logged steps."""
    return lambda run: fmean(series.values) if (series := run.metric(*metrics).finite()) else None


def median_of(*metrics: str) -> Measure:
    """Median of a metric over its logged steps."""
    return lambda run: median(series.values) if (series := run.metric(*metrics).finite()) else None


def largest_of(*metrics: str) -> Measure:
    """Largest value of a metric."""
    return lambda run: max(run.metric(*metrics).finite().values, default=None)


def compare(runs: Sequence[Run], baseline: str | None = None, threshold: float | None = None) -> list[TaskComparison]:
    """One comparison per task and section, in input order.

    Args:
        runs: from :func:`~verl_troll.tools.report.read.read_runs`.
        baseline: arm to compare the others with; by default ``vanilla``, else ``clip``, else the first.
        threshold: success to reach; by default halfway from the mean start to the best arm's final.

    Raises:
        ReportError: no run has the arm ``baseline``, or there are more than :data:`MAX_CELLS` arms and rates.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.task, run.section), []).append(run)
    labelled = {key: _labelled(group) for key, group in groups.items()}
    if (count := sum(map(len, labelled.values()))) > MAX_CELLS:
        raise ReportError(
            f"{count} arms, by learning rate, task and section, are more than the {MAX_CELLS} of a page: give fewer "
            "runs, or name their arms with NAME=PATH"
        )
    if baseline is not None and all(_named(baseline, cells) is None for cells in labelled.values()):
        arms = sorted({cell.arm for cells in labelled.values() for cell in cells})
        raise ReportError(
            f"--baseline {short(baseline)} is no arm of these runs: give one of {', '.join(map(short, arms))}"
        )
    return [_comparison(*key, cells, baseline, threshold) for key, cells in labelled.items()]


def _labelled(runs: Sequence[Run]) -> list[Cell]:
    """Cells by arm and rate. An arm whose runs differ in a setting is split, one arm per value."""
    by_arm: dict[str, list[Run]] = {}
    for run in runs:
        by_arm.setdefault(run.arm, []).append(run)
    cells: dict[tuple[str, float | None], list[Run]] = {}
    for arm, members in by_arm.items():
        names = _varied(members)
        for run in members:
            label = ", ".join([arm, *(f"{name}={run.settings.get(name)}" for name in names)])
            cells.setdefault((label, run.lr), []).append(run)
    return [Cell(arm, rate, tuple(found)) for (arm, rate), found in cells.items()]


def _varied(runs: Sequence[Run]) -> list[str]:
    names = {name: None for run in runs for name in run.settings if name.split(".")[-1] not in ("seed", "lr")}
    return [name for name in names if len({str(run.settings.get(name)) for run in runs}) > 1]


def _named(baseline: str, cells: Sequence[Cell]) -> str | None:
    exact = [cell.arm for cell in cells if cell.arm == baseline]
    return next(iter(exact or [cell.arm for cell in cells if cell.runs[0].arm == baseline]), None)


def _comparison(
    task: str, section: str, cells: Sequence[Cell], baseline: str | None, threshold: float | None
) -> TaskComparison:
    wanted = BASELINES if baseline is None else (baseline,)
    found = next((name for name in (_named(arm, cells) for arm in wanted) if name is not None), None)
    if found is None and baseline is None:
        found = cells[0].arm
    order = {arm: number for number, arm in enumerate(dict.fromkeys(cell.arm for cell in cells))}
    ordered = sorted(
        cells, key=lambda cell: (cell.arm != found, order[cell.arm], math.inf if cell.rate is None else cell.rate)
    )
    best: dict[str, Cell] = {}
    for cell in ordered:
        if cell.arm not in best or _success(cell) > _success(best[cell.arm]):
            best[cell.arm] = cell
    runs = [run for cell in ordered for run in cell.runs]
    starts = [value for run in runs if (value := start_success(run)) is not None]
    if threshold is None and starts:
        threshold = (fmean(starts) + max(map(_success, ordered))) / 2
    last = max((series.steps[-1] for run in runs if (series := run.held_out())), default=0)
    return TaskComparison(task, section, tuple(ordered), best, found, threshold if starts else None, last)


def _success(cell: Cell) -> float:
    interval = cell.interval(final_success)
    return -math.inf if interval is None else interval.mean


def series_of(cell: Cell, *metrics: str) -> list[Series]:
    """One metric of each run of a cell."""
    return [run.metric(*metrics) for run in cell.runs]
