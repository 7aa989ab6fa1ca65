"""Formats rows as aligned text or Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.rows import Row

_TITLES = {
    "old_pass": "Reading the old policy",
    "update": "Update: logits to loss, and back",
    "solver": "Step size",
    "carried": "Carried from the old pass to the update",
    "head": "Language-model head and loss",
}
_SHORT = {
    "vocab": "V",
    "tokens": "tokens",
    "k": "K",
    "dtype": "",
    "ranks": "ranks",
    "device": "",
    "response_share": "response",
    "hidden": "D",
    "outcomes": "outcomes",
    "family": "",
    "kept": "kept ids",
}
_COLUMNS = ("case", "method", "time, ms", "quartiles", "ratio", "extra MiB", "floor, ms", "x floor", "further")
# The same in all rows of a case, or only useful in the JSON.
_HIDDEN = {"kept_ids_max", "read_gb_per_s", "gflop_per_s", "logits_bytes", "bytes_per_field", "allowed_bytes"}


def render(rows: Sequence[Row], markdown: bool) -> str:
    """A table per measurement, and what the floors count."""
    parts = []
    for name in dict.fromkeys(row.measurement for row in rows):
        own = [row for row in rows if row.measurement == name]
        parts.append(f"## {_TITLES.get(name, name)}" if markdown else f"{_TITLES.get(name, name)} ({name})")
        parts.append(grid(_COLUMNS, [_cells(row) for row in own], markdown))
        bases = sorted({row.baseline for row in own if row.baseline})
        if bases:
            parts.append(f"Ratio: to {' or '.join(repr(base) for base in bases)} in the same case and phase.")
        counted = dict.fromkeys(f"{row.phase or 'read'}: {row.floor.counted}" for row in own if row.floor)
        parts += [f"Floor, {text}." for text in counted]
    return "\n\n".join(parts)


def grid(columns: Sequence[str], cells: Sequence[Sequence[str]], markdown: bool) -> str:
    """A table; in plain text, numbers are right-aligned."""
    if markdown:
        lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
        return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells)])
    table = [list(columns), *(list(row) for row in cells)]
    widths = [max(len(row[index]) for row in table) for index in range(len(columns))]
    right = [all(not row[index] or row[index][0].isdigit() for row in table[1:]) for index in range(len(columns))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in table
    )


def number(value: float) -> str:
    """About three significant digits, without exponent."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.4f}"


def describe(parameters: dict[str, Any]) -> str:
    """A short description of a case."""
    words = []
    for name, value in parameters.items():
        if (name, value) in (("ranks", 1), ("response_share", 1.0), ("device", "cpu")):
            continue
        text = f"{value:,}".replace(",", " ") if isinstance(value, int) else str(value)
        words.append(f"{_SHORT.get(name, name)} {text}".strip())
    return ", ".join(words)


def _cells(row: Row) -> list[str]:
    method = f"{row.method}: {row.phase}" if row.phase not in ("", "solve", "read") else row.method
    cells = [describe(row.parameters), method]
    if row.skipped is not None:
        return [*cells, *[""] * 6, f"skipped: {row.skipped}"]
    seconds = row.seconds
    cells += [
        number(1e3 * seconds.median) if seconds else "",
        f"{number(1e3 * seconds.low)} to {number(1e3 * seconds.high)}" if seconds and seconds.count > 1 else "",
        f"{row.ratio:.2f}" if row.ratio is not None else "",
        f"{row.extra_bytes / 2**20:.1f}" if row.extra_bytes is not None else "",
        number(1e3 * row.floor.seconds) if row.floor else "",
        number(row.ratio_to_floor) if row.ratio_to_floor is not None else "",
    ]
    facts = (f"{name} {_fact(value)}" for name, value in row.facts.items() if name not in _HIDDEN)
    return [*cells, "; ".join(facts)]


def _fact(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)
