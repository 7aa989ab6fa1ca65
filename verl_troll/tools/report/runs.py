"""A training run as the report sees it: its metrics as series, and what tells it from others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from verl_troll.tools.report.metrics import held_out_keys, names_of
from verl_troll.tools.report.values import as_float


@dataclass(frozen=True)
class Series:
    """One metric of one run; ``steps`` increase. Values may be NaN or infinite if they were logged so."""

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.steps)

    def finite(self) -> Series:
        """The points whose value is finite."""
        if all(map(math.isfinite, self.values)):
            return self
        return series_of(
            {step: value for step, value in zip(self.steps, self.values, strict=True) if math.isfinite(value)}
        )


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        task: what was trained on; empty if unknown.
        arm: the method, e.g. ``vanilla``.
        seed: None if unknown; such a run is never paired.
        lr: the actor's learning rate; None if unknown.
        status: ``diverged``, or another word for how it ended; empty if unknown.
        settings: other settings that distinguish the run, by name.
        metrics: those that the report shows, by verl's metric name.
        section: what it is compared within; runs of different sections are never averaged.
        source: file or folder, as given.
        argument: the command-line argument that it was found under.
        kind: format of the source.
        earlier: ends the arm's name if a later run is in the same file or folder; else empty.
    """

    task: str
    arm: str
    seed: int | None
    lr: float | None
    status: str
    settings: Mapping[str, Any]
    metrics: Mapping[str, Series]
    section: str = ""
    source: str = ""
    argument: str = ""
    kind: str = ""
    earlier: str = ""
    _derived: dict[str, Series] = field(default_factory=dict, repr=False, compare=False)

    def metric(self, *names: str) -> Series:
        """The first named metric that the run has, else an empty series; a name without a prefix matches any."""
        found = (series for name in names for key, series in self.metrics.items() if name in names_of(key))
        return next(found, Series())

    def held_out(self) -> Series:
        """Held-out success, averaged over data sources at the steps that measured all of them."""
        if "held_out" not in self._derived:
            self._derived["held_out"] = _average([self.metrics[key] for key in held_out_keys(self.metrics).values()])
        return self._derived["held_out"]

    def kl_bound(self) -> float | None:
        """The projection's KL bound per token, in nats; None for a run without one, or with none that is finite."""
        for name, value in self.settings.items():
            if name.split(".")[-1] == "kl_bound":
                bound = as_float(value)
                return None if bound is None or not math.isfinite(bound) else bound
        return None


def _average(parts: Sequence[Series]) -> Series:
    if len(parts) < 2:
        return parts[0] if parts else Series()
    by_step = [dict(zip(part.steps, part.values, strict=True)) for part in parts]
    shared = set.intersection(*(set(values) for values in by_step))
    return series_of({step: sum(values[step] for values in by_step) / len(by_step) for step in shared})


def series_of(points: Mapping[int, float]) -> Series:
    """A series from values by step."""
    steps = tuple(sorted(points))
    return Series(steps, tuple(points[step] for step in steps))
