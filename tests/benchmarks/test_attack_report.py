"""The attacks on the report hold at a small scale, and fall where what they attack is taken away."""

from __future__ import annotations

import re
from pathlib import Path
from unittest import mock

import pytest

from benchmarks.attack import report
from benchmarks.attack.attack import Extent, Outcome
from verl_troll.tools.report import values
from verl_troll.tools.report.logs import json_lines, points


def test_files(tmp_path: Path) -> None:
    outcome = report.files(Extent(tmp_path, scale=0.1))
    assert (outcome.tried, outcome.fell) == (7, 0), outcome.examples


def test_fuzz(tmp_path: Path) -> None:
    outcome = report.fuzz(Extent(tmp_path, scale=0.01))
    assert (outcome.tried, outcome.fell) == (100, 0), outcome.examples


def test_a_pipe_that_is_waited_for_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "opened", lambda path: path.open("rb"))
    with mock.patch.dict(report.KINDS, {"pipe": report.KINDS["pipe"]}, clear=True):
        outcome = report.files(Extent(tmp_path))
    assert (outcome.tried, outcome.fell) == (1, 1)
    assert "it waits for a pipe" in outcome.examples[0]


def test_an_error_of_another_kind_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (values, points, json_lines):
        monkeypatch.setattr(module, "as_float", float)
    (tmp_path / "fuzz").mkdir()
    outcome: Outcome = report.fuzz(Extent(tmp_path / "fuzz", scale=0.02))
    assert outcome.fell > 0
    assert "Error" in outcome.examples[0]


def test_large_files_fall_by_memory_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = report.MEMORY_BYTES / 2**20
    monkeypatch.setattr(report, "MEMORY_BYTES", 2**20)
    outcome = report.large(Extent(tmp_path, scale=1e-3))
    assert (outcome.tried, outcome.fell) == (3, 3)
    for example in outcome.examples:
        found = re.search(r": (\d+) MiB of memory$", example)
        assert found, example
        assert int(found[1]) < limit
