"""Rows of the report: one case each, with its checks, and the file that holds them."""

from __future__ import annotations

import dataclasses
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Clock:
    """Tracks the time left for a part."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


@dataclass
class EngineRow:
    """One case of one part.

    Attributes:
        checks: value, limit and whether it passed, by name.
        facts: further numbers.
        reason: why it failed or was skipped.
    """

    part: str
    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, tuple[float, float, bool]] = field(default_factory=dict)
    reason: str = ""
    skipped: bool = False
    seconds: float = 0.0

    def check(self, name: str, value: float, limit: float) -> None:
        """Require ``value`` to be at most ``limit``; NaN fails."""
        self.checks[name] = (float(value), limit, float(value) <= limit)

    @property
    def status(self) -> str:
        if self.skipped:
            return "skipped"
        return "failed" if self.reason or not all(passed for _, _, passed in self.checks.values()) else "passed"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"status": self.status, **dataclasses.asdict(self)}


Report = Callable[[EngineRow], None]


def run_case(report: Report, part: str, name: str, clock: Clock, case: Callable[[EngineRow], None]) -> None:
    """Run one case and report its row, even if it raises."""
    row = EngineRow(part, name)
    begin = time.perf_counter()
    if clock.left <= 0:
        row.skipped, row.reason = True, "no time was left"
    else:
        try:
            case(row)
        except Exception:
            row.reason = traceback.format_exc()[-3000:]
    row.seconds = round(time.perf_counter() - begin, 3)
    report(row)


class Results:
    """The rows so far, in one file that is replaced atomically."""

    def __init__(self, folder: Path, machine: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "gpu_engines.json"
        self.content: dict[str, Any] = {"machine": machine, "rows": []}
        self.write()

    def add(self, row: dict[str, Any]) -> None:
        """Add a row and print its outcome."""
        self.content["rows"].append(row)
        self.write()
        print(f"{row['status']:8} {row['seconds']:7.1f} s  {row['part']}: {row['name']}", flush=True)
        for name, (value, limit, passed) in row["checks"].items():
            if not passed:
                print(f"         {name}: {value} is not at most {limit}", flush=True)
        if row["reason"]:
            print("         " + row["reason"].strip().replace("\n", "\n         "), flush=True)

    def write(self) -> None:
        """Write all rows."""
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(self.content, indent=1) + "\n")
        draft.replace(self.path)
