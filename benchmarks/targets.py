"""Compares each target with the worst row that counts for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import carried, head, old_pass, solver, update
from benchmarks.rows import Row
from benchmarks.table import describe, number


@dataclass(frozen=True)
class Target:
    """A target and its worst measured value.

    Attributes:
        name: what is measured.
        limit: the maximum allowed.
        measured: the worst value; None if nothing was measured.
        case: the case with the worst value.
        share_met: share of the rows within the limit.
    """

    name: str
    limit: float
    measured: float | None = None
    case: str = ""
    share_met: float | None = None

    @property
    def verdict(self) -> str:
        """``met``, ``missed`` or ``not measured``."""
        if self.measured is None:
            return "not measured"
        return "met" if self.measured <= self.limit else "missed"

    def cells(self) -> list[str]:
        """Cells of the target's row in the table."""
        value = "" if self.measured is None else number(self.measured)
        share = "" if self.share_met is None else f"{self.share_met:.0%}"
        return [self.name, f"at most {number(self.limit)}", value, self.verdict, share, self.case]


COLUMNS = ("target", "limit", "worst measured", "verdict", "rows within", "worst case")


def judge(rows: Sequence[Row]) -> list[Target]:
    """All targets."""
    on_gpu = any(row.parameters.get("device") == "cuda" for row in rows)
    return [
        _time(rows, update.NAME, "anchored, reused", update.BOTH, 1.0, "update, anchored: time over vanilla's"),
        _time(rows, update.NAME, "anchored", update.BOTH, 1.0, "update, anchored, logits kept: time over vanilla's"),
        _memory(rows, "anchored, reused", "update, anchored: peak memory above vanilla's, MiB"),
        _memory(rows, "anchored", "update, anchored, logits kept: peak memory above vanilla's, MiB"),
        _time(rows, update.NAME, "union, reused", update.BOTH, 1.15, "update, union: time over vanilla's"),
        _worst(
            "update, anchored: own peak memory over one [tokens, vocabulary] buffer",
            0.1,
            (
                (row.extra_bytes / row.facts["logits_bytes"], row)
                for row in _of(rows, update.NAME, "anchored, reused", update.BOTH)
                if row.extra_bytes is not None
            ),
        ),
        *_old_pass(rows, on_gpu),
        _worst(
            "step size: mean evaluations",
            5,
            ((row.facts["evaluations"], row) for row in _of(rows, solver.NAME, "TROLL", "solve")),
        ),
        _worst(
            "carried bytes per token at 10 kept ids",
            80,
            (
                (row.facts["bytes_per_token"], row)
                for row in _of(rows, carried.NAME, "TROLL", "pack + unpack")
                if row.parameters["kept"] == 10
            ),
        ),
        _worst(
            "carried bytes per token over 8 + 6 per kept id",
            1,
            (
                (row.facts["bytes_per_token"] / row.facts["allowed_bytes"], row)
                for row in _of(rows, carried.NAME, "TROLL", "pack + unpack")
            ),
        ),
        _worst(
            "head, fused, 32k tokens: peak memory over an unfused one's, computed",
            0.1,
            (
                (row.facts["share_of_unfused_computed"], row)
                for row in _of(rows, head.NAME, "anchored, fused", head.BOTH)
                if "share_of_unfused_computed" in row.facts
            ),
        ),
        _worst(
            "head, fused, anchored: time over the unfused vanilla's",
            1.1,
            (
                (row.ratio, row)
                for row in _of(rows, head.NAME, "anchored, fused", head.BOTH)
                if row.ratio is not None and row.baseline == head.VANILLA
            ),
        ),
    ]


def _of(rows: Iterable[Row], measurement: str, method: str, phase: str) -> list[Row]:
    return [
        row
        for row in rows
        if (row.measurement, row.method, row.phase) == (measurement, method, phase) and row.skipped is None
    ]


def _time(rows: Sequence[Row], measurement: str, method: str, phase: str, limit: float, name: str) -> Target:
    own = _of(rows, measurement, method, phase)
    return _worst(name, limit, ((row.ratio, row) for row in own if row.ratio is not None))


def _old_pass(rows: Sequence[Row], on_gpu: bool) -> list[Target]:
    methods = {"with entropy": "TROLL, entropy", "without entropy": "TROLL"}
    if on_gpu:
        return [
            _worst(
                f"old pass, {name}: time over one reading of the logits",
                2,
                (
                    (row.ratio_to_floor, row)
                    for row in _of(rows, old_pass.NAME, method, "")
                    if row.ratio_to_floor is not None
                ),
            )
            for name, method in methods.items()
        ]
    return [
        _time(rows, old_pass.NAME, method, "", 1.3, f"old pass, {name}: time over vanilla's")
        for name, method in methods.items()
    ]


def _memory(rows: Sequence[Row], method: str, name: str) -> Target:
    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row.parameters.values())

    base = {key(row): row.extra_bytes for row in _of(rows, update.NAME, update.VANILLA, update.BOTH)}
    own = _of(rows, update.NAME, method, update.BOTH)
    return _worst(
        name,
        0,
        (
            ((row.extra_bytes - above) / 2**20, row)
            for row in own
            if row.extra_bytes is not None and (above := base.get(key(row))) is not None
        ),
    )


def _worst(name: str, limit: float, values: Iterable[tuple[float, Row]]) -> Target:
    found = list(values)
    if not found:
        return Target(name, limit)
    measured, row = max(found, key=lambda pair: pair[0])
    return Target(
        name,
        limit,
        measured,
        describe(row.parameters),
        sum(value <= limit for value, _ in found) / len(found),
    )
