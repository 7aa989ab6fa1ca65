"""Defines every number in the report. Success is the share of right answers; steps are training steps.

Intervals are 95 % percentile bootstrap intervals of the mean over seeds (or over pairs with one seed), from
``scipy.stats.bootstrap`` with 9999 resamples and a fixed random state. With few seeds they are too narrow: with five
independent normal values they cover the mean in about 83 % of cases instead of 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from verl_troll.tools.report.metrics import ENTROPY, GRAD_NORM, PPO_KL, REWARDS
from verl_troll.tools.report.runs import Run, Series

CONFIDENCE = 0.95
RESAMPLES = 9999
RANDOM_STATE = 0
MIN_FOR_INTERVAL = 3
STABLE_SHARE = 0.9
COLLAPSED_SHARE = 0.5
TAIL_SHARE = 0.1
MAX_CURVE_STEPS = 1000
"""Of a curve with more steps, this many are drawn: a picture has fewer pixels."""
_MAX_RESAMPLED = 2**23
"""Values resampled at once."""


@dataclass(frozen=True)
class Interval:
    """Mean of ``count`` values with its interval; ``low`` and ``high`` are None for fewer than three."""

    mean: float
    low: float | None
    high: float | None
    count: int

    def excludes(self, value: float = 0.0) -> bool:
        """Whether there is an interval and ``value`` lies outside it."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high


@dataclass(frozen=True)
class PairedDifference:
    """Differences a - b between runs with the same seed."""

    interval: Interval
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True)
class StableRange:
    """Neighbouring learning rates around the best whose success is at least 90 % of the best rate's.

    Attributes:
        best_rate: rate with the highest success; the lowest in a tie.
        best_success: success at ``best_rate``.
        rates: the range, increasing; empty if no success is above 0.
        tested: number of rates tried.
    """

    best_rate: float
    best_success: float
    rates: tuple[float, ...]
    tested: int

    @property
    def ratio(self) -> float:
        """Highest rate over lowest: 1 for a single rate, 0 for an empty range."""
        return self.rates[-1] / self.rates[0] if self.rates and self.rates[0] > 0 else float(len(self.rates) > 0)


@dataclass(frozen=True)
class Curve:
    """Mean over runs at each step, with its interval (NaN where fewer than three runs have the step)."""

    steps: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def __bool__(self) -> bool:
        return bool(self.steps)


def _check(values: Sequence[float], of: str) -> None:
    if not values:
        raise ValueError(f"{of} needs at least one value, got none")
    wrong = [value for value in values if not math.isfinite(value)]
    if wrong:
        raise ValueError(f"{of} needs finite values, got {wrong[0]}: drop or count non-finite values")


def _means(sample: Any, axis: int) -> Any:
    return sample.mean(axis=axis)


def _interval_ends(columns: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Intervals of several means at once; all ``columns`` have the same length."""
    from scipy.stats import bootstrap

    low, high = list[float](), list[float]()
    count = len(columns[0])
    # Each call draws the same resamples, so the parts make no difference.
    part = max(1, _MAX_RESAMPLED // (RESAMPLES * count))
    for start in range(0, len(columns), part):
        result = bootstrap(
            ([list(column) for column in columns[start : start + part]],),
            _means,
            axis=-1,
            n_resamples=RESAMPLES,
            batch=min(RESAMPLES, max(1, _MAX_RESAMPLED // count)),
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=RANDOM_STATE,
        ).confidence_interval
        low += map(float, result.low)
        high += map(float, result.high)
    return low, high


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean with its 95 % bootstrap interval; no interval for fewer than three values.

    Raises:
        ValueError: there is no value, or a non-finite one.
    """
    _check(values, "a mean")
    mean = math.fsum(values) / len(values)
    if len(values) < MIN_FOR_INTERVAL:
        return Interval(mean, None, None, len(values))
    if min(values) == max(values):
        return Interval(values[0], values[0], values[0], len(values))
    (low,), (high,) = _interval_ends([values])
    return Interval(mean, low, high, len(values))


def paired_difference(a_by_seed: Mapping[int, float], b_by_seed: Mapping[int, float]) -> PairedDifference:
    """Mean of a - b over the seeds they share, with its interval over the pairs.

    Raises:
        ValueError: they share no seed, or a value is not finite.
    """
    common = sorted(set(a_by_seed) & set(b_by_seed))
    if not common:
        raise ValueError(f"no seed is common: {sorted(a_by_seed)} and {sorted(b_by_seed)}; runs pair by equal seeds")
    differences = [a_by_seed[seed] - b_by_seed[seed] for seed in common]
    interval = mean_interval(differences)
    wins, losses = sum(value > 0 for value in differences), sum(value < 0 for value in differences)
    return PairedDifference(interval, wins, len(differences) - wins - losses, losses)


def area_under_curve(steps: Sequence[int], values: Sequence[float]) -> float:
    """Mean of a curve: its area by the trapezoid rule, divided by the distance from first to last step.

    Raises:
        ValueError: no point, different lengths, steps that do not increase, or a non-finite value.
    """
    _check(values, "the area under a curve")
    if len(steps) != len(values):
        raise ValueError(f"steps and values must have the same length, got {len(steps)} and {len(values)}")
    widths = [right - left for left, right in pairwise(steps)]
    if any(width <= 0 for width in widths):
        raise ValueError(f"steps must increase, got {list(steps)}")
    if not widths:
        return float(values[0])
    heights = [(left + right) / 2 for left, right in pairwise(values)]
    return math.fsum(width * height for width, height in zip(widths, heights, strict=True)) / (steps[-1] - steps[0])


def steps_to(threshold: float, steps: Sequence[int], values: Sequence[float]) -> int | None:
    """The first step whose value is at least ``threshold``, without interpolation; None if there is none."""
    return next((step for step, value in zip(steps, values, strict=True) if value >= threshold), None)


def why_diverged(run: Run) -> str:
    """Why a run counts as diverged; empty if it does not.

    A run has diverged if its status is ``diverged``; if it logged a non-finite held-out success, training reward,
    entropy, gradient norm or ppo_kl; or if its last held-out success is below half of its first.
    """
    if run.status == "diverged":
        return "status diverged"
    watched = {
        "held-out success": run.held_out(),
        "training reward": run.metric(*REWARDS),
        **{name: run.metric(name) for name in (ENTROPY, GRAD_NORM, PPO_KL)},
    }
    for name, series in watched.items():
        for step, value in zip(series.steps, series.values, strict=True):
            if not math.isfinite(value):
                return f"{name} not finite at step {step}"
    success = run.held_out().values
    if success and success[-1] < COLLAPSED_SHARE * success[0]:
        return f"held-out success fell from {success[0]:.3f} to {success[-1]:.3f}"
    return ""


def diverged(run: Run) -> bool:
    """Whether a run has diverged, by :func:`why_diverged`."""
    return bool(why_diverged(run))


def stable_range(success_by_rate: Mapping[float, float]) -> StableRange:
    """The range of learning rates around the best in which success stays at least 90 % of the best.

    Args:
        success_by_rate: final success (mean over seeds) of one arm at each learning rate tried.

    Raises:
        ValueError: there is no rate, or a non-finite success.
    """
    _check(list(success_by_rate.values()), "a stable range")
    rates = sorted(success_by_rate)
    best = max(rates, key=lambda rate: (success_by_rate[rate], -rate))
    highest = success_by_rate[best]
    first = last = rates.index(best)
    # In floating point, 0.72 is not 90 % of 0.80.
    minimum = STABLE_SHARE * highest * (1 - 1e-9)
    enough = [highest > 0 and success_by_rate[rate] >= minimum for rate in rates]
    while first > 0 and enough[first - 1]:
        first -= 1
    while last + 1 < len(rates) and enough[last + 1]:
        last += 1
    return StableRange(best, highest, tuple(rates[first : last + 1]) if highest > 0 else (), len(rates))


def held_to(series: Series, last_step: int) -> Series:
    """The series, extended to ``last_step`` with its last value if it ends earlier."""
    if not series or series.steps[-1] >= last_step:
        return series
    return Series((*series.steps, last_step), (*series.values, series.values[-1]))


def tail_mean(values: Sequence[float]) -> float:
    """Mean of the last tenth of the values, at least one."""
    _check(values, "a mean at the end")
    tail = values[-max(1, math.ceil(TAIL_SHARE * len(values))) :]
    return math.fsum(tail) / len(tail)


def spread(steps: Sequence[int]) -> list[int]:
    """The steps; of more than :data:`MAX_CURVE_STEPS` that many, evenly spaced, first and last included."""
    last = len(steps) - 1
    if last < MAX_CURVE_STEPS:
        return list(steps)
    return [steps[last * number // (MAX_CURVE_STEPS - 1)] for number in range(MAX_CURVE_STEPS)]


def mean_curve(runs: Sequence[Series], hold: bool = False) -> Curve:
    """Mean and interval at each step (:func:`spread`), over the runs that have a finite value there.

    Args:
        runs: one metric of each run.
        hold: runs that ended early keep their last value at later steps.
    """
    tables = [dict(zip(run.steps, run.values, strict=True)) for run in map(Series.finite, runs) if run]
    steps = spread(sorted(set().union(*tables)))
    ends = [(last, table[last]) for table in tables for last in [max(table)]] if hold else []
    columns: list[list[float]] = []
    for step in steps:
        column = [table[step] for table in tables if step in table]
        columns.append(column + [value for last, value in ends if last < step])
    low, high = [math.nan] * len(steps), [math.nan] * len(steps)
    for count in {len(column) for column in columns if len(column) >= MIN_FOR_INTERVAL}:
        alike = [index for index, column in enumerate(columns) if len(column) == count]
        for index, start, end in zip(alike, *_interval_ends([columns[index] for index in alike]), strict=True):
            low[index], high[index] = start, end
    means = tuple(math.fsum(column) / len(column) for column in columns)
    return Curve(tuple(steps), means, tuple(low), tuple(high))
