"""``benchmarks.gpu.engines`` on the CPU at a tiny size: it runs, and reports what failed or was missing."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from benchmarks import processes
from benchmarks.gpu.engines import __main__ as command
from benchmarks.gpu.engines.rows import Clock, EngineRow, Results, run_case


def run(out: Path, *arguments: str, **environment: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and rows."""
    words = [sys.executable, "-m", "benchmarks.gpu.engines", "--device", "cpu", "--tiny", "--out", str(out)]
    done = processes.run([*words, *arguments], env={**os.environ, **environment})
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return done.returncode, json.loads((out / "gpu_engines.json").read_text())["rows"]


def test_engines_on_a_cpu(tmp_path: Path) -> None:
    status, rows = run(tmp_path, "--only", "fsdp2", "fsdp", "--seconds", "3000")
    assert status == 0, rows
    found = {(row["part"], row["name"]): row for row in rows}
    assert found["fsdp", "all"]["reason"] == "FSDP1 needs an accelerator"
    ours = [row for row in rows if row["part"] == "fsdp2"]
    assert {row["status"] for row in ours} == {"passed"}
    for kind in ("logits", "fused head"):
        compared = [row for row in ours if row["name"].startswith(kind) and row["checks"]]
        # Two supports, two temperatures, packed and padded.
        assert len(compared) == 8
        assert all(row["facts"]["first update exact"] for row in compared)
        facts = found["fsdp2", f"{kind}: cost of a step"]["facts"]
        assert all(facts[f"{name}, update, s"] > 0 for name in ("vanilla", "anchored", "union"))


def test_what_is_not_installed_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in command.PARTS:
        monkeypatch.setitem(command.NEEDED, part, ("torch", "verl_that_is_not_here", "not_here.either"))
    with mock.patch.dict(os.environ):
        assert command.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "gpu_engines.json").read_text())["rows"]
    assert {row["status"] for row in rows} == {"skipped"} and len(rows) == len(command.PARTS)
    assert {row["reason"] for row in rows} == {"not installed: verl_that_is_not_here, not_here.either"}
    assert "0 passed, 0 failed, 5 skipped" in capsys.readouterr().out


def test_a_row_says_what_failed() -> None:
    row = EngineRow("fsdp2", "one")
    row.check("below", 1.0, 2.0)
    assert row.status == "passed"
    row.check("not a number", float("nan"), 2.0)
    assert row.status == "failed" and row.checks["not a number"][2] is False
    found: list[EngineRow] = []

    def broken(row: EngineRow) -> None:
        raise FloatingPointError("no numbers today")

    run_case(found.append, "fsdp2", "two", Clock(60), broken)
    run_case(found.append, "fsdp2", "three", Clock(0), broken)
    assert [one.status for one in found] == ["failed", "skipped"]
    assert "no numbers today" in found[0].reason and found[1].reason == "no time was left"


def test_a_part_that_does_not_end_is_ended(tmp_path: Path) -> None:
    results = Results(tmp_path, {})
    options = argparse.Namespace(device="cpu", tiny=True, jobs=1)
    command.engine_parts(["fsdp2"], options, Clock(0.5), results)
    (row,) = results.content["rows"]
    assert row["status"] == "failed" and row["reason"].startswith("not finished in time")
