"""The part of the study on a pretrained model: its stages in the order of importance, declared before they ran.

**Choice rule.** On the first task every arm trains at the rates of :data:`RATES` on :data:`SWEEP_SEED`, batches used
once and four times over apart. Its rate is the one with the highest :func:`reward`, the lowest in a tie; where that is
the lowest or the highest rate, the next one by a factor of two is trained too, up to :data:`LIMITS`. All other runs
train at that rate on other seeds: those on stale samples and with other support sizes at the rate of batches used once,
those on other tasks at the rate of the first task.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from benchmarks.study.cells import PRETRAINED_EVALUATIONS, PRETRAINED_PROMPTS, Cell
from benchmarks.study.grid import Section
from benchmarks.study.results import Record, Results

TASK, SECOND, TAKE_OFF = "sums", "divisors", "bare_sums"
TASKS = (TASK, SECOND, TAKE_OFF)

ARMS = (
    *("clip", "union", "anchored", "clip_regression", "dppo_kl", "dppo_kl_regression"),
    *("none", "clip_higher", "dppo_tv"),
)
FIVE_SEEDS = ("clip", "union", "anchored")
SEEDS = (0, 1, 2, 3, 4)
SWEEP_SEED = 100

RATES = (1e-5, 2e-5, 4e-5)
LIMITS = (2.5e-6, 1.6e-4)

ONCE: dict[str, Any] = {"prompts": PRETRAINED_PROMPTS, "mini_batches": 4, "epochs": 1, "steps": 12}
OVERUSED: dict[str, Any] = {**ONCE, "epochs": 4, "steps": 6}
LONG: dict[str, Any] = {**ONCE, "steps": 24}
"""For the take-off."""

STALENESS = 8
OTHER_K = (16, 256)

SECONDS = {"step": 30.0, "epoch": 57.0, "evaluation": 25.0, "start": 20.0}
"""Of one AVX2 core with the other busy, for regimes without runs: a step's sampling and old pass, an epoch over it."""


def reward(line: Record) -> float:
    """Mean reward of the samples over the second half of training: more samples than held-out success has."""
    values: list[float] = [value for value in line["metrics"]["critic/score/mean"] if value is not None]
    half = values[len(values) // 2 :]
    return sum(half) / len(half)


def _sweep(results: Results, loss: str, regime: dict[str, Any]) -> dict[float, Cell]:
    """The arm's cells by rate, with those that the results so far ask for."""
    cells = {lr: Cell(TASK, loss, lr, SWEEP_SEED, **regime) for lr in RATES}
    while (best := _best(results, cells)) is not None:
        more = best / 2 if best == min(cells) else best * 2 if best == max(cells) else None
        if more is None or not LIMITS[0] <= more <= LIMITS[1]:
            break
        cells[more] = Cell(TASK, loss, more, SWEEP_SEED, **regime)
    return cells


def _best(results: Results, cells: dict[float, Cell]) -> float | None:
    if any(cell.key not in results for cell in cells.values()):
        return None
    return min(cells, key=lambda lr: (-reward(results[cells[lr].key]), lr))


def best_rate(results: Results, loss: str, regime: dict[str, Any]) -> float | None:
    """An arm's rate by the choice rule; None until its sweep is complete."""
    return _best(results, _sweep(results, loss, regime))


class Stages:
    """The stages.

    Args:
        results: so far.
        assumed: rate of the arms whose sweep is not complete; None leaves their cells out.
    """

    def __init__(self, results: Results, assumed: float | None = None) -> None:
        self._results = results
        self._assumed = assumed

    def _rate(self, loss: str, regime: dict[str, Any]) -> float | None:
        return best_rate(self._results, loss, regime) or self._assumed

    def _rates(self, regime: dict[str, Any]) -> Iterator[Cell]:
        for loss in ARMS:
            yield from _sweep(self._results, loss, regime).values()

    def _arms(self, regime: dict[str, Any]) -> Iterator[Cell]:
        for seed, loss in product(SEEDS, ARMS):
            if seed < 3 or loss in FIVE_SEEDS:
                yield from self._runs(TASK, loss, (seed,), regime)

    def _runs(
        self, task: str, loss: str, seeds: Sequence[int], regime: dict[str, Any], **fields: Any
    ) -> Iterator[Cell]:
        lr = self._rate(loss, OVERUSED if regime["epochs"] > 1 else ONCE)
        if lr is not None:
            for seed in seeds:
                yield Cell(task, loss, lr, seed, **regime, **fields)

    def rates(self) -> Iterator[Cell]:
        """Every arm at three rates, batches used once."""
        yield from self._rates(ONCE)

    def once(self) -> Iterator[Cell]:
        """Every arm at its rate, batches used once; three seeds, five for clip, union and anchored."""
        yield from self._arms(ONCE)

    def overused_rates(self) -> Iterator[Cell]:
        """Every arm at three rates, batches used four times over."""
        yield from self._rates(OVERUSED)

    def overused(self) -> Iterator[Cell]:
        """Every arm at its rate, batches used four times over; three seeds, five for clip, union and anchored."""
        yield from self._arms(OVERUSED)

    def stale(self) -> Iterator[Cell]:
        """Samples 8 steps old, with the policy that sampled and with the re-scored one."""
        for seed, old_policy, loss in product(SEEDS[:3], ("behaviour", "rescored"), ("clip", "union")):
            yield from self._runs(TASK, loss, (seed,), ONCE, staleness=STALENESS, old_policy=old_policy)

    def support(self) -> Iterator[Cell]:
        """Union with 16 and 256 ids."""
        for seed, k in product(SEEDS[:3], OTHER_K):
            yield from self._runs(TASK, "union", (seed,), ONCE, settings=(f"troll.k={k}",))

    def take_off(self) -> Iterator[Cell]:
        """From rare success in a strict form: steps until it is common."""
        for seed, loss in product(SEEDS[:3], ("clip", "union", "clip_regression", "anchored")):
            yield from self._runs(TAKE_OFF, loss, (seed,), LONG)

    def second(self) -> Iterator[Cell]:
        """A second task, batches used once."""
        for seed, loss in product(SEEDS[:3], ("clip", "union", "anchored", "clip_regression", "dppo_kl", "none")):
            yield from self._runs(SECOND, loss, (seed,), ONCE)


STAGES = ("rates", "once", "overused_rates", "overused", "stale", "support", "take_off", "second")


def _section(name: str) -> Section:
    return Section(
        (getattr(Stages, name).__doc__ or "").strip(), lambda results: iter(getattr(Stages(results), name)())
    )


SECTIONS: dict[str, Section] = {f"pretrained_{name}": _section(name) for name in STAGES}
"""The stages as sections of the grid, for ``run``, ``list``, ``export`` and ``tables``."""


def in_order(results: Results, sections: Sequence[str], tasks: Sequence[str]) -> Iterator[Cell]:
    """Cells of some stages and tasks in running order."""
    for name in sections:
        yield from (cell for cell in SECTIONS[name].cells(results) if cell.task in tasks)


def planned(results: Results) -> dict[str, list[Cell]]:
    """The cells of each stage, with the middle rate for arms that have none yet."""
    stages = Stages(results, assumed=RATES[1])
    return {f"pretrained_{name}": list(getattr(stages, name)()) for name in STAGES}


def seconds(cell: Cell, results: Results) -> float:
    """Expected seconds of one core: the mean of the runs of this regime and length, else from :data:`SECONDS`."""
    known: list[float] = [
        line["run"]["seconds"]
        for line in results.values()
        if all(line["run"]["cell"].get(name) == getattr(cell, name) for name in ("task", "epochs", "steps"))
    ]
    if known:
        return sum(known) / len(known)
    return (
        cell.steps * (SECONDS["step"] + cell.epochs * SECONDS["epoch"])
        + (1 + PRETRAINED_EVALUATIONS) * SECONDS["evaluation"]
        + cell.staleness * SECONDS["step"]
        + SECONDS["start"]
    )
