"""What the study compares, declared before it ran, and the rule by which rates are chosen.

**Choice rule.** Every arm is trained at the same four learning rates on the two sweep seeds. Its rate is the one with
the highest mean of :func:`benchmarks.study.results.final_success` over those seeds; of equal ones the lowest. The
headline then trains at that rate on other seeds, which took no part in the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from benchmarks.study.cells import Cell
from benchmarks.study.results import Results, final_success

SWEEP_SEEDS = (100, 101)
HEADLINE_SEEDS = (0, 1, 2, 3, 4)
SEEDS = (0, 1, 2)

TASKS = ("chain", "residues", "programs", "words")
RATES = {
    **dict.fromkeys(TASKS, (1e-4, 2e-4, 4e-4, 8e-4)),
    # Flat distributions take larger steps.
    "residues": (5e-4, 1e-3, 2e-3, 4e-3),
}

HEADLINE = ("clip", "none", "union", "anchored")
RIVALS = ("clip_higher", "gspo", "cispo", "sapo", "dppo_kl")

STEPS = 40


def _sweep(task: str, loss: str, **fields: object) -> Iterator[Cell]:
    for lr, seed in product(RATES[task], SWEEP_SEEDS):
        yield Cell(task, loss, lr, seed, steps=STEPS, **fields)  # type: ignore[arg-type]


def best_rate(results: Results, task: str, loss: str, **fields: object) -> float | None:
    """The rate of an arm by the choice rule, None until its sweep is complete."""
    means: dict[float, list[float]] = {}
    for cell in _sweep(task, loss, **fields):
        line = results.get(cell.key)
        if line is None:
            return None
        means.setdefault(cell.lr, []).append(final_success(line))
    return min(means, key=lambda lr: (-sum(means[lr]) / len(means[lr]), lr))


def _at_best(results: Results, task: str, loss: str, seeds: tuple[int, ...], **fields: object) -> Iterator[Cell]:
    lr = best_rate(results, task, loss, **fields)
    if lr is not None:
        for seed in seeds:
            yield Cell(task, loss, lr, seed, steps=STEPS, **fields)  # type: ignore[arg-type]


def sweep(results: Results) -> Iterator[Cell]:
    """Clip, none, union and anchored at every rate, on the sweep seeds."""
    for task, loss in product(TASKS, HEADLINE):
        yield from _sweep(task, loss)


def headline(results: Results) -> Iterator[Cell]:
    """The same at each arm's own rate, on five other seeds."""
    for task, loss in product(TASKS, HEADLINE):
        yield from _at_best(results, task, loss, HEADLINE_SEEDS)


def overused(results: Results) -> Iterator[Cell]:
    """Every batch used four times over, at every rate."""
    for task, loss in product(("chain", "programs"), HEADLINE):
        yield from _sweep(task, loss, mini_batches=4, epochs=4)


def rivals(results: Results) -> Iterator[Cell]:
    """verl's other losses: their sweep, then three seeds at their own rate."""
    for task in ("chain", "residues", "programs"):
        for loss in RIVALS:
            yield from _sweep(task, loss)
            yield from _at_best(results, task, loss, SEEDS)


def staleness(results: Results) -> Iterator[Cell]:
    """Samples 1, 2, 4 and 8 steps old, the old policy re-scored or the one that sampled."""
    for stale, old_policy, loss in product((1, 2, 4, 8), ("rescored", "behaviour"), ("clip", "union")):
        for seed in SEEDS:
            yield Cell("chain", loss, 2e-4, seed, staleness=stale, old_policy=old_policy, steps=STEPS)


def estimators(results: Results) -> Iterator[Cell]:
    """Other advantages, with clipping and with the projection."""
    pairs = [(e, loss) for e in ("dr_grpo", "reinforce_plus_plus", "ppo") for loss in ("clip", "union")]
    for estimator, loss in [*pairs, ("gspo", "gspo"), ("gspo", "union_sequence")]:
        for lr, seed in product((2e-4, 4e-4), SEEDS):
            yield Cell("chain", loss, lr, seed, estimator=estimator, steps=STEPS)


def variants(results: Results) -> Iterator[Cell]:
    """No gradient through the step size; the plain ratio for tokens pushed out against their advantage."""
    changed = ("troll.step_size_gradient=detached", "troll.one_sided=true")
    for task, loss, setting in product(("chain", "residues"), ("union", "anchored"), changed):
        for lr, seed in product(RATES[task][1:3], SEEDS):
            yield Cell(task, loss, lr, seed, steps=STEPS, settings=(setting,))


def ablations(results: Results) -> Iterator[Cell]:
    """The paper's: bound, size of the support, weight of the regression."""
    changed = [
        *((f"troll.kl_bound={bound}",) for bound in (0.01, 0.25)),
        *((f"troll.k={k}", f"troll.dropped_mass={mass}") for k, mass in ((16, 1e-4), (256, 1e-6))),
        *((f"troll.alpha={alpha}",) for alpha in (0, 0.1, 10)),
    ]
    for task, settings, seed in product(("chain", "residues"), changed, SEEDS):
        for lr in RATES[task][2:3]:
            yield Cell(task, "union", lr, seed, steps=STEPS, settings=settings)


def temperature(results: Results) -> Iterator[Cell]:
    """Sampling and training at another temperature."""
    for value, loss, seed in product((0.7, 1.3), ("clip", "union"), SEEDS):
        yield Cell("chain", loss, 2e-4, seed, temperature=value, steps=STEPS)


@dataclass(frozen=True)
class Section:
    """A part of the study; ``cells`` may depend on the results so far."""

    about: str
    cells: Callable[[Results], Iterator[Cell]]


SECTIONS: dict[str, Section] = {
    section.__name__: Section((section.__doc__ or "").strip(), section)
    for section in (sweep, headline, overused, rivals, staleness, estimators, variants, ablations, temperature)
}


def in_order(results: Results, sections: Sequence[str], tasks: Sequence[str]) -> Iterator[Cell]:
    """Cells of some sections and tasks in the order in which they run: sweep and headline task by task, then the rest.

    Cells that depend on results that are not there yet come later.
    """
    first = [name for name in ("sweep", "headline") if name in sections]
    for task, name in product(tasks, first):
        yield from (cell for cell in SECTIONS[name].cells(results) if cell.task == task)
    for name in sections:
        if name not in first:
            yield from (cell for cell in SECTIONS[name].cells(results) if cell.task in tasks)
