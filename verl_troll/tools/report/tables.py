"""The report's tables, as rows of text; the page escapes and renders them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from verl_troll.tools.report import metrics
from verl_troll.tools.report.comparison import (
    Cell,
    Measure,
    Pairing,
    TaskComparison,
    at_the_end,
    best_success,
    final_success,
    largest_of,
    mean_of,
    median_of,
)
from verl_troll.tools.report.figures import number, rate_text, share
from verl_troll.tools.report.statistics import MIN_FOR_INTERVAL, Interval, PairedDifference, why_diverged

Form = Callable[[float], str]


@dataclass(frozen=True)
class Entry:
    """One entry: ``text``, with ``below`` in small print under it; ``strong`` if the interval excludes 0."""

    text: str
    below: str = ""
    strong: bool = False


@dataclass(frozen=True)
class TextTable:
    """A table; the first entry of each row is its heading."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Entry]]
    notes: Sequence[str] = ()


_NOTHING = Entry("-")


def _entry(interval: Interval | None, form: Form) -> Entry:
    if interval is None:
        return _NOTHING
    if interval.low is None or interval.high is None:
        return Entry(form(interval.mean))
    return Entry(form(interval.mean), f"{form(interval.low)} to {form(interval.high)}")


def _rate(rate: float | None) -> Entry:
    return _NOTHING if rate is None else Entry(rate_text(rate))


def _steps(value: float) -> str:
    return f"{value:.1f}"


def _columns(columns: Sequence[tuple[str, Measure, Form]], cells: Sequence[Cell]) -> list[tuple[str, Measure, Form]]:
    """The columns for which some cell has a value."""
    return [column for column in columns if any(cell.interval(column[1]) for cell in cells)]


def _heading(cell: Cell, comparison: TaskComparison) -> list[Entry]:
    rate = [_rate(cell.rate)] if any(other.rate is not None for other in comparison.cells) else []
    return [Entry(cell.arm), *rate, Entry(str(len(cell.runs)))]


def _heading_names(comparison: TaskComparison) -> list[str]:
    rate = ["Learning rate"] if any(cell.rate is not None for cell in comparison.cells) else []
    return ["Arm", *rate, "Runs"]


def _few(cells: Sequence[Cell]) -> list[str]:
    few = [cell.arm for cell in cells if len(cell.runs) < MIN_FOR_INTERVAL]
    return [f"No interval for fewer than three runs: {', '.join(dict.fromkeys(few))}."] if few else []


def success(comparison: TaskComparison) -> TextTable | None:
    """Held-out success by arm; None if it was not measured."""
    cells = list(comparison.best.values())
    if comparison.threshold is None:
        return None
    rows = []
    for cell in cells:
        reached = sum(comparison.steps_to_threshold(run) is not None for run in cell.runs)
        rows.append(
            [
                *_heading(cell, comparison),
                _entry(cell.interval(final_success), share),
                _entry(cell.interval(best_success), share),
                _entry(cell.interval(comparison.area), share),
                _entry(cell.interval(comparison.steps_to_threshold), _steps),
                Entry(f"{reached} of {len(cell.runs)}"),
                Entry(f"{cell.diverged()} of {len(cell.runs)}"),
            ]
        )
    names = ["Final", "Best", "Mean over steps", f"Steps to {comparison.threshold:.3f}", "Reached it", "Diverged"]
    rate = ", each arm at the learning rate with its highest final success" if comparison.several_rates else ""
    chosen = (
        ["The rate was selected on the runs shown, which flatters every arm; Stability has all rates."]
        if comparison.several_rates
        else []
    )
    return TextTable(
        f"Held-out success by arm{rate}: mean over runs, with the 95 % interval below.",
        [*_heading_names(comparison), *names],
        rows,
        [*chosen, *_few(cells)],
    )


def policy(comparison: TaskComparison) -> TextTable | None:
    """Policy metrics and cost by arm; columns without data are left out."""
    cells = list(comparison.best.values())
    columns = _columns(
        (
            ("Entropy at the end, nats", at_the_end(metrics.ENTROPY), number),
            ("Distinct answers at the end", at_the_end(metrics.DISTINCT_ANSWERS), share),
            ("Mean ppo_kl, nats", mean_of(metrics.PPO_KL), number),
            ("Mean KL before, nats", mean_of(metrics.KL_BEFORE), number),
            ("Mean KL after, nats", mean_of(metrics.KL_AFTER), number),
            ("Largest KL after, nats", largest_of(metrics.KL_AFTER_MAX), number),
            ("Projected share", mean_of(metrics.PROJECTED_SHARE), number),
            ("Seconds per step", median_of(metrics.STEP_SECONDS), number),
        ),
        cells,
    )
    if not columns:
        return None
    # The success table, if there is one, already shows rates and runs.
    shown = 1 if comparison.threshold is not None else None
    rows = [
        [*_heading(cell, comparison)[:shown], *(_entry(cell.interval(measure), form) for _, measure, form in columns)]
        for cell in cells
    ]
    return TextTable(
        f"Policy and cost by arm{', same runs' if shown else ''}: mean over runs, with the 95 % interval below.",
        [*_heading_names(comparison)[:shown], *(name for name, _, _ in columns)],
        rows,
        _few(cells),
    )


def paired(comparison: TaskComparison) -> TextTable | None:
    """Differences from the baseline by seed, each arm at its best rate; None if nothing can be paired."""
    rate = ", each arm at its best learning rate" if comparison.several_rates else ""
    return _paired(comparison, comparison.at_best_rates(), rate)


def paired_at_equal_rates(comparison: TaskComparison) -> TextTable | None:
    """Differences from the baseline by seed at each shared rate; None if nothing can be paired."""
    return _paired(comparison, comparison.at_equal_rates(), ", both arms at the same learning rate")


def _paired(comparison: TaskComparison, pairings: Sequence[Pairing], rate: str) -> TextTable | None:
    found = [(pairing, pairing.final) for pairing in pairings if pairing.final is not None]
    if not found:
        return None
    rows = [
        [
            Entry(pairing.cell.arm),
            *([_rates(pairing)] if comparison.several_rates else []),
            Entry(str(final.interval.count)),
            *_difference(final),
            *_difference(pairing.area),
        ]
        for pairing, final in found
    ]
    names = ["Pairs", "Final", "Wins / ties / losses", "Mean over steps", "Wins / ties / losses"]
    notes = ["Bold and “excludes 0” mark intervals without 0. There is no correction for multiple comparisons."]
    smallest = min(final.interval.count for _, final in found)
    if smallest < MIN_FOR_INTERVAL:
        notes.append("No interval for fewer than three pairs.")
    if smallest < 6:
        notes.append(
            "With few pairs an interval excludes 0 whenever all differences have the same sign, which happens by "
            "chance in 1 of 16 cases for five pairs."
        )
    return TextTable(
        f"Held-out success, difference from {comparison.baseline} between runs with the same seed{rate}: mean over "
        "pairs, with the 95 % interval below.",
        ["Arm", *(["Learning rate"] if comparison.several_rates else []), *names],
        rows,
        notes,
    )


def _rates(pairing: Pairing) -> Entry:
    own, baseline = (_rate(cell.rate).text for cell in (pairing.cell, pairing.baseline))
    return Entry(own) if own == baseline else Entry(own, f"baseline {baseline}")


def _difference(difference: PairedDifference | None) -> list[Entry]:
    if difference is None:
        return [_NOTHING, _NOTHING]
    strong = difference.interval.excludes(0.0)
    entry = _entry(difference.interval, lambda value: f"{value:+.3f}")
    return [
        Entry(entry.text, f"{entry.below}\nexcludes 0" if strong else entry.below, strong),
        Entry(f"{difference.wins} / {difference.ties} / {difference.losses}"),
    ]


def rates(comparison: TaskComparison) -> TextTable | None:
    """Success of every arm at every learning rate; None if there is only one rate."""
    if not comparison.several_rates or comparison.threshold is None:
        return None
    rows = [
        [
            *_heading(cell, comparison),
            _entry(cell.interval(final_success), share),
            _entry(cell.interval(comparison.area), share),
            Entry(f"{cell.diverged()} of {len(cell.runs)}"),
        ]
        for cell in comparison.cells
    ]
    return TextTable(
        "Held-out success at every learning rate: mean over runs, with the 95 % interval below.",
        [*_heading_names(comparison), "Final", "Mean over steps", "Diverged"],
        rows,
        _few(comparison.cells),
    )


def stable(comparison: TaskComparison) -> TextTable | None:
    """The range of learning rates in which each arm works; None if there is only one rate."""
    ranges = comparison.stable_ranges()
    if not ranges:
        return None
    rows = []
    for arm, found in ranges.items():
        width = [_NOTHING, Entry(f"0 of {found.tested}"), _NOTHING]
        if found.rates:
            ends = " to ".join(map(rate_text, dict.fromkeys((found.rates[0], found.rates[-1]))))
            width = [Entry(ends), Entry(f"{len(found.rates)} of {found.tested}"), Entry(f"{found.ratio:.3g}")]
        rows.append([Entry(arm), Entry(rate_text(found.best_rate)), Entry(share(found.best_success)), *width])
    return TextTable(
        "Stable range: neighbouring learning rates around the best with at least 90 % of its final success.",
        ["Arm", "Best rate", "Final success there", "Stable range", "Rates in it", "Highest / lowest"],
        rows,
        ["A range that reaches the lowest or highest rate tried may be wider than shown."],
    )


def divergences(comparison: TaskComparison) -> list[str]:
    """One line per arm and rate with diverged runs: their seeds and reasons."""
    lines = []
    for cell in comparison.cells:
        reasons = [
            f"{'no seed' if run.seed is None else f'seed {run.seed}'} ({reason})"
            for run in cell.runs
            if (reason := why_diverged(run))
        ]
        if reasons:
            rate = "" if cell.rate is None else f", learning rate {rate_text(cell.rate)}"
            lines.append(f"{cell.arm}{rate}: {', '.join(reasons)}")
    return lines
