"""The attacks on the launchers hold at a small scale, and fall where what they attack is taken away."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.attack import launchers
from benchmarks.attack.attack import Extent
from verl_troll.tools import disk


def test_overrides(tmp_path: Path) -> None:
    outcome = launchers.overrides(Extent(tmp_path, scale=0.04))
    assert (outcome.tried, outcome.fell) == (22, 0), outcome.examples


def test_settings_that_a_shell_expands_fall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(launchers.EXAMPLES, tmp_path / "examples")
    file = tmp_path / "examples" / "cluster" / "skypilot.yaml"
    text = file.read_text()
    quoted = 'python3 -c "$words" "$SCRIPT" "$SETTINGS"'
    assert quoted in text
    file.write_text(text.replace(quoted, 'bash "$SCRIPT" $SETTINGS'))
    monkeypatch.setattr(launchers, "EXAMPLES", tmp_path / "examples")
    monkeypatch.setattr(launchers, "LAUNCHERS", {"skypilot.yaml": launchers.LAUNCHERS["skypilot.yaml"]})
    monkeypatch.setattr(launchers, "WORDS", ("two words", "examples/*", "a", "b", "c", "d"))
    (tmp_path / "folder").mkdir()
    outcome = launchers.overrides(Extent(tmp_path / "folder"))
    assert outcome.fell >= 2
    assert "skypilot.yaml" in outcome.examples[0]


def test_disk_full(tmp_path: Path) -> None:
    outcome = launchers.disk_full(Extent(tmp_path, scale=0.1))
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    assert (outcome.tried, outcome.fell) == (2, 0), outcome.examples


def test_a_disk_that_nobody_names_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.Watch, "complaint", lambda _: "")
    cases = {"captured": launchers.disk_cases()["benchmarks.processes: output"]}
    monkeypatch.setattr(launchers, "disk_cases", lambda: cases)
    outcome = launchers.disk_full(Extent(tmp_path))
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    assert (outcome.tried, outcome.fell) == (2, 1)
