"""The Markdown tables of ``docs/study.md``: ``python -m benchmarks.study tables SECTION``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeAlias, TypeVar

from benchmarks.study import names, results
from benchmarks.study.cells import PROBED_K
from benchmarks.study.names import of_k
from benchmarks.study.results import Record
from verl_troll.tools.report.figures import rate_text
from verl_troll.tools.report.statistics import (
    Interval,
    area_under_curve,
    mean_interval,
    paired_difference,
    stable_range,
)

BASELINE = "clip"
SEQUENCE_BASELINE = "gspo"

Key = TypeVar("Key", bound=Hashable)
Arms: TypeAlias = dict[tuple[str, float], list[Record]]
"""Runs by arm and rate."""


def _number(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1)


def _interval(interval: Interval, signed: bool = False) -> str:
    form = (lambda value: f"{value:+.3f}") if signed else _number
    text = form(interval.mean)
    if interval.low is not None and interval.high is not None:
        text += f" ({form(interval.low)} to {form(interval.high)})"
    return f"**{text}**" if signed and interval.excludes() else text


def _mean_over_steps(line: Record) -> float:
    values = line["metrics"][results.held_out_key(line["run"]["task"])]
    points = [(step, value) for step, value in zip(line["metrics"]["step"], values, strict=True) if value is not None]
    return area_under_curve([step for step, _ in points], [value for _, value in points])


def _last(name: str) -> Callable[[Record], float | None]:
    return lambda line: next((v for v in reversed(line["metrics"].get(name, [])) if v is not None), None)


def _over_steps(name: str) -> Callable[[Record], float | None]:
    def mean(line: Record) -> float | None:
        values = [value for value in line["metrics"].get(name, []) if value is not None]
        return sum(values) / len(values) if values else None

    return mean


def _mean(lines: list[Record], measure: Callable[[Record], float | None], form: str) -> str:
    values = [value for line in lines if (value := measure(line)) is not None]
    return format(sum(values) / len(values), form) if values else "-"


def _changed(line: Record) -> list[str]:
    default = ("kl_bound", results.KL_BOUND)
    return [f"{name}={value}" for name, value in line["run"]["settings"].items() if (name, value) != default]


def arm(line: Record) -> str:
    """Loss and changed settings."""
    return ", ".join([line["run"]["arm"], *_changed(line)])


def _reference(line: Record, baseline: str) -> str | None:
    """The arm to compare with: the same loss without changed settings, else GSPO or the baseline."""
    loss: str = line["run"]["arm"]
    if _changed(line):
        return loss
    if loss == "union_sequence":
        return SEQUENCE_BASELINE
    return baseline if loss != baseline else None


def _arms_at_rates(lines: list[Record]) -> Arms:
    return _by(lines, lambda line: (arm(line), line["run"]["lr"]))


def _compared_with(arms: Arms, name: str, lr: float, baseline: str) -> list[Record]:
    """The reference's runs at the same rate; at another one only if both arms have exactly one."""
    against = _reference(arms[name, lr][0], baseline)
    references = {rate: found for (other, rate), found in arms.items() if other == against}
    if lr in references:
        return references[lr]
    alone = len(references) == sum(other == name for other, _ in arms) == 1
    return next(iter(references.values())) if alone else []


def _part(line: Record) -> tuple[str, str]:
    """Task and section (estimator and regime); only runs that share both are compared."""
    return line["run"]["task"], line["run"]["section"]


def _by(lines: Iterable[Record], key: Callable[[Record], Key]) -> dict[Key, list[Record]]:
    groups: dict[Key, list[Record]] = {}
    for line in lines:
        groups.setdefault(key(line), []).append(line)
    return groups


def _table(header: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{' --- |' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def by_arm(lines: list[Record], baseline: str = BASELINE) -> Iterator[str]:
    """Success and its paired difference, for each task, estimator, regime, arm and rate.

    Losses are compared with ``baseline``; losses with changed settings, with their defaults.
    """
    for task, group in _by(lines, lambda line: line["run"]["task"]).items():
        sections = _by(group, lambda line: line["run"]["section"])
        yield f"\n{task}, {next(iter(sections))}\n" if len(sections) == 1 else f"\n{task}\n"
        header = ["arm", "rate", "seeds", "final success", "difference", "mean over steps", "difference", "diverged"]
        header += ["entropy", "distinct", "projected"]
        if len(sections) == 1:
            yield from _table(header, _arms(group, baseline))
        else:
            rows = ([section, *row] for section, found in sections.items() for row in _arms(found, baseline))
            yield from _table(["estimator, regime", *header], rows)


def _arms(lines: list[Record], baseline: str) -> Iterator[list[str]]:
    arms = _arms_at_rates(lines)
    for (name, lr), runs in arms.items():
        reference = _compared_with(arms, name, lr, baseline)
        differences = [_difference(runs, reference, measure) for measure in (results.final_success, _mean_over_steps)]
        yield [
            name,
            rate_text(lr),
            str(len(runs)),
            _interval(mean_interval([results.final_success(line) for line in runs])),
            differences[0],
            _interval(mean_interval([_mean_over_steps(line) for line in runs])),
            differences[1],
            str(sum(line["run"]["status"] == "diverged" for line in runs)),
            _mean(runs, _last("actor/entropy"), ".2f"),
            _mean(runs, _last("study/distinct_answers"), ".2f"),
            _mean(runs, _over_steps("troll/projected_share"), ".1%"),
        ]


def _by_seed(lines: list[Record]) -> dict[int, Record]:
    return {line["run"]["seed"]: line for line in lines}


def by_rate(lines: list[Record]) -> Iterator[str]:
    """Final success at each rate and the stable range, for each task, estimator, regime and arm."""
    for part, group in _by(lines, _part).items():
        yield f"\n{', '.join(part)}\n"
        rates = sorted({line["run"]["lr"] for line in group})
        rows = []
        for name, runs in _by(group, arm).items():
            at = {lr: [line for line in runs if line["run"]["lr"] == lr] for lr in rates}
            success = {lr: sum(map(results.final_success, found)) / len(found) for lr, found in at.items() if found}
            stable = stable_range(success)
            diverged = sum(line["run"]["status"] == "diverged" for line in runs)
            rows.append(
                [
                    name,
                    *(_number(success[lr]) if lr in success else "" for lr in rates),
                    f"{len(stable.rates)} of {stable.tested}",
                    f"{diverged} of {len(runs)}",
                ]
            )
        yield from _table(["arm", *map(rate_text, rates), "stable rates", "diverged"], rows)


def entropy_by_rate(lines: list[Record]) -> Iterator[str]:
    """Entropy of the last step at each rate, for each task, estimator, regime and arm."""
    for part, group in _by(lines, _part).items():
        yield f"\n{', '.join(part)}\n"
        rates = sorted({line["run"]["lr"] for line in group})
        arms = _arms_at_rates(group)
        rows = (
            [name, *(_mean(arms.get((name, lr), []), _last("actor/entropy"), ".2f") for lr in rates)]
            for name in dict.fromkeys(name for name, _ in arms)
        )
        yield from _table(["arm", *map(rate_text, rates)], rows)


SUCCESS = 0.3
"""Share of right samples at which a rare answer has become common."""


def take_off(line: Record) -> int | None:
    """The first step whose samples reach :data:`SUCCESS`."""
    steps = zip(line["metrics"]["step"], line["metrics"]["critic/score/mean"], strict=True)
    return next((step for step, value in steps if value is not None and value >= SUCCESS), None)


def final_greedy(line: Record) -> float:
    """Greedy held-out success at the last evaluation."""
    values: list[float] = [value for value in line["metrics"][names.GREEDY] if value is not None]
    return values[-1]


def _at(name: str, place: float) -> Callable[[Record], float | None]:
    def value(line: Record) -> float | None:
        found = [value for value in line["metrics"].get(name, []) if value is not None]
        return found[round(place * (len(found) - 1))] if found else None

    return value


def _median(name: str) -> Callable[[Record], float | None]:
    def value(line: Record) -> float | None:
        found = [value for value in line["metrics"].get(name, []) if value is not None]
        return statistics.median(found) if found else None

    return value


def _difference(own: list[Record], reference: list[Record], measure: Callable[[Record], float]) -> str:
    ours, theirs = ({seed: measure(line) for seed, line in _by_seed(lines).items()} for lines in (own, reference))
    return _interval(paired_difference(ours, theirs).interval, signed=True) if set(ours) & set(theirs) else ""


def pretrained(lines: list[Record], baseline: str = BASELINE) -> Iterator[str]:
    """For each task and regime: what was learnt, what the policy looks like, what left the region, what it cost."""
    for (task, section), group in _by(lines, _part).items():
        arms = _arms_at_rates(group)
        order = list(dict.fromkeys(name for name, _ in arms))
        for title, header, row in (
            ("Success", _SUCCESS, _success_row),
            ("Policy: at the start, halfway and at the end", _POLICY, _policy_row),
            ("Share of tokens, in % of all, over the probed steps", _REGION, _region_row),
            ("Median seconds per step", _COST, _cost_row),
        ):
            yield f"\n{task}, {section}. {title}.\n"
            rows = []
            for (name, lr), runs in sorted(arms.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
                reference = _compared_with(arms, name, lr, baseline)
                rows += [[name, rate_text(lr), *cells] for cells in row(runs, reference)]
            yield from _table(["arm", "rate", *header], rows)


_SUCCESS = ["seeds", "greedy", "difference", "sampled", "difference", "mean over steps", f"steps to {SUCCESS:g}"]


def _success_row(runs: list[Record], reference: list[Record]) -> Iterator[list[str]]:
    cells = [str(len(runs))]
    for measure in (final_greedy, results.final_success):
        cells += [_interval(mean_interval([measure(line) for line in runs])), _difference(runs, reference, measure)]
    cells.append(_interval(mean_interval([_mean_over_steps(line) for line in runs])))
    yield [*cells, ", ".join(str(take_off(line) or "-") for line in runs)]


_POLICY = ["entropy", "distinct", f"mass on {PROBED_K[1]}", f"cap {PROBED_K[1]} binds", "diverged"]


def _policy_row(runs: list[Record], reference: list[Record]) -> Iterator[list[str]]:
    shown = (
        ("actor/entropy", ".2f"),
        (names.DISTINCT, ".2f"),
        (of_k(PROBED_K[1], "kept_mass"), ".3f"),
        (of_k(PROBED_K[1], "cap_hits"), ".0%"),
    )
    yield [
        *(" ".join(_mean(runs, _at(name, place), form) for place in (0, 0.5, 1)) for name, form in shown),
        str(sum(line["run"]["status"] == "diverged" for line in runs)),
    ]


_REGION = ["k", "in training", "true", *(f"{s} {w}" for s in names.SUPPORTS for w in ("sees", "false", "missed"))]


def _region_row(runs: list[Record], reference: list[Record]) -> Iterator[list[str]]:
    def share(name: str) -> str:
        return _mean(runs, lambda line: _percent(_over_steps(name)(line)), ".2f")

    for k in PROBED_K:
        seen = [share(of_k(k, what, s)) for s in names.SUPPORTS for what in ("projected", "false", "missed")]
        yield [str(k), share("troll/projected_share"), share(names.OUTSIDE), *seen]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


_COST = ["step", "old pass", "update", "sampling and the rest"]


def _cost_row(runs: list[Record], reference: list[Record]) -> Iterator[list[str]]:
    parts = [_median(f"timing_s/{name}") for name in ("step", "old_log_prob", "update_actor")]

    def rest(line: Record) -> float | None:
        step, *others = (part(line) or 0.0 for part in parts)
        return step - sum(others)

    yield [_mean(runs, part, ".1f") for part in (*parts, rest)]
