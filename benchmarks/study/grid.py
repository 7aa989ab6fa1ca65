"""What the study compares, with each section declared before it ran, and how rates are selected.

**Choice rule.** Every arm trains at the same learning rates, at least four, on the two sweep seeds. Its rate is the
one with the highest mean :func:`benchmarks.study.results.final_success` over those seeds, the lowest in a tie. The
headline then trains at that rate on other seeds, which were not used for the selection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from benchmarks.study.cells import PROMPTS, Cell
from benchmarks.study.results import Results, final_success

SWEEP_SEEDS = (100, 101)
HEADLINE_SEEDS = (0, 1, 2, 3, 4)
SEEDS = (0, 1, 2)

TASKS = ("chain", "residues", "programs")
RATES = {
    **dict.fromkeys(TASKS, (1e-4, 2e-4, 4e-4, 8e-4)),
    # Flat distributions need larger steps.
    "residues": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
}
"""The lowest rates of ``residues`` and :data:`OVERUSED_RATES` were added because the lowest of the first four won."""

OVERUSED: dict[str, Any] = {"mini_batches": 4, "epochs": 4}
OVERUSED_RATES = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)

STRESSED: dict[str, Any] = {"task": "chain", "lr": 4e-4, **OVERUSED}
"""Where TROLL's settings are compared: the bound is active on more than one token in twenty."""

HEADLINE = ("clip", "none", "union", "anchored")
RIVALS = ("clip_higher", "gspo", "cispo", "sapo", "dppo_kl")

STEPS = 40


def _sweep(task: str, loss: str, **fields: Any) -> Iterator[Cell]:
    rates = OVERUSED_RATES if fields.get("epochs", 1) > 1 else RATES[task]
    for lr, seed in product(rates, SWEEP_SEEDS):
        yield Cell(task, loss, lr, seed, steps=STEPS, **fields)


def best_rate(results: Results, task: str, loss: str, **fields: Any) -> float | None:
    """An arm's rate by the choice rule; None until its sweep is complete."""
    means: dict[float, list[float]] = {}
    for cell in _sweep(task, loss, **fields):
        line = results.get(cell.key)
        if line is None:
            return None
        means.setdefault(cell.lr, []).append(final_success(line))
    return min(means, key=lambda lr: (-sum(means[lr]) / len(means[lr]), lr))


def _at_best(results: Results, task: str, loss: str, seeds: tuple[int, ...], **fields: Any) -> Iterator[Cell]:
    lr = best_rate(results, task, loss, **fields)
    if lr is not None:
        for seed in seeds:
            yield Cell(task, loss, lr, seed, steps=STEPS, **fields)


def sweep(results: Results) -> Iterator[Cell]:
    """Clip, none, union and anchored at every rate, on the sweep seeds."""
    for task, loss in product(TASKS, HEADLINE):
        yield from _sweep(task, loss)


def headline(results: Results) -> Iterator[Cell]:
    """The same arms at their selected rates, on five other seeds."""
    for task, loss in product(TASKS, HEADLINE):
        yield from _at_best(results, task, loss, HEADLINE_SEEDS)


def overused(results: Results) -> Iterator[Cell]:
    """The sweep with four epochs per batch."""
    for task, loss in product(("chain", "programs"), HEADLINE):
        yield from _sweep(task, loss, **OVERUSED)


def overused_headline(results: Results) -> Iterator[Cell]:
    """The headline with four epochs per batch."""
    for task, loss in product(("chain", "programs"), HEADLINE):
        yield from _at_best(results, task, loss, HEADLINE_SEEDS, **OVERUSED)


def rivals(results: Results) -> Iterator[Cell]:
    """verl's other losses beside clip and union at every rate, with four epochs per batch."""
    for loss in ("clip", "union", *RIVALS):
        yield from _sweep("chain", loss, **OVERUSED)


def rivals_headline(results: Results) -> Iterator[Cell]:
    """The same losses at their selected rates, on three other seeds."""
    for loss in ("clip", "union", *RIVALS):
        yield from _at_best(results, "chain", loss, SEEDS, **OVERUSED)


def staleness(results: Results) -> Iterator[Cell]:
    """Samples 2 and 8 steps old, with a re-scored old policy or the behaviour policy."""
    for stale, old_policy, loss in product((2, 8), ("rescored", "behaviour"), ("clip", "union")):
        for seed in SEEDS:
            yield Cell("chain", loss, 2e-4, seed, staleness=stale, old_policy=old_policy, steps=STEPS)


def estimators(results: Results) -> Iterator[Cell]:
    """Other advantage estimators, with clipping and with projection, with four epochs per batch."""
    sequence = [("gspo", "gspo"), ("gspo", "union_sequence")]
    token = list(product(("grpo", "dr_grpo", "reinforce_plus_plus", "ppo"), ("clip", "union")))
    for lr, arms in ((1e-4, sequence + token), (2e-4, sequence)):
        for (estimator, loss), seed in product(arms, SEEDS):
            yield Cell("chain", loss, lr, seed, estimator=estimator, steps=STEPS, **OVERUSED)


def _stressed(loss: str, *settings: str) -> Iterator[Cell]:
    for seed in SEEDS:
        yield Cell(loss=loss, seed=seed, steps=STEPS, settings=settings, **STRESSED)


def variants(results: Results) -> Iterator[Cell]:
    """No gradient through the step size; the plain ratio for tokens that moved against their advantage."""
    yield from _stressed("clip")
    for loss in ("union", "anchored"):
        yield from _stressed(loss)
        yield from _stressed(loss, "troll.step_size_gradient=detached")
        yield from _stressed(loss, "troll.one_sided=true")


def ablations(results: Results) -> Iterator[Cell]:
    """The paper's ablations: bound, support size, regression weight."""
    yield from _stressed("union")
    for alpha in (0, 0.1, 10):
        yield from _stressed("union", f"troll.alpha={alpha}")
    for bound in (0.01, 0.25):
        yield from _stressed("union", f"troll.kl_bound={bound}")
    for k, mass in ((16, 1e-4), (256, 1e-6)):
        yield from _stressed("union", f"troll.k={k}", f"troll.dropped_mass={mass}")


def temperature(results: Results) -> Iterator[Cell]:
    """Sampling and training at other temperatures."""
    for value, loss, seed in product((0.7, 1.3), ("clip", "union"), SEEDS):
        yield Cell("chain", loss, 2e-4, seed, temperature=value, steps=STEPS)


def batch_size(results: Results) -> Iterator[Cell]:
    """16, 64 and 128 prompts per step in mini-batches of 2: as many optimizer steps, on ever fewer batches."""
    for seed, loss, times in product(SEEDS, ("clip", "union", "anchored"), (1, 4, 8)):
        prompts, steps = times * PROMPTS, STEPS // times
        yield Cell("chain", loss, 2e-4, seed, mini_batches=prompts // 2, steps=steps, prompts=prompts)


def gspo_clip(results: Results) -> Iterator[Cell]:
    """GSPO for 200 steps, with its own narrow clipping and with the 0.2 of TROLL's authors."""
    for seed, loss in product(SWEEP_SEEDS, ("gspo_wide", "gspo")):
        yield Cell("chain", loss, 2e-4, seed, steps=200)


def separate_async(results: Results) -> Iterator[Cell]:
    """verl's asynchronous trainer, 1, 2, 4 and 8 batches ahead, with both old policies."""
    for ahead, seed in product((8, 1, 4, 2), SEEDS):
        for old_policy, loss in product(("rescored", "behaviour"), ("clip", "union", "anchored")):
            yield Cell(
                "chain", loss, 2e-4, seed, staleness=ahead, old_policy=old_policy, steps=STEPS, trainer="separate_async"
            )


@dataclass(frozen=True)
class Section:
    """A section of the study; ``cells`` may depend on the results so far."""

    about: str
    cells: Callable[[Results], Iterator[Cell]]


SECTIONS: dict[str, Section] = {
    section.__name__: Section((section.__doc__ or "").strip(), section)
    for section in (
        sweep,
        headline,
        overused,
        overused_headline,
        estimators,
        variants,
        ablations,
        rivals,
        rivals_headline,
        staleness,
        temperature,
        batch_size,
        gspo_clip,
        separate_async,
    )
}


def in_order(results: Results, sections: Sequence[str], tasks: Sequence[str]) -> Iterator[Cell]:
    """Cells of some sections and tasks in running order: sweep and headline task by task, then the rest.

    Cells that depend on missing results come later.
    """
    first = [name for name in ("sweep", "headline") if name in sections]
    for task, name in product(tasks, first):
        yield from (cell for cell in SECTIONS[name].cells(results) if cell.task == task)
    for name in sections:
        if name not in first:
            yield from (cell for cell in SECTIONS[name].cells(results) if cell.task in tasks)
