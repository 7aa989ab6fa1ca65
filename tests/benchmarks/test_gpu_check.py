"""``python -m benchmarks.gpu`` without a GPU: a dry run in Triton's interpreter, and how it reports a failure."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.session import TINY, Session
from benchmarks.processes import run

pytest.importorskip("triton", reason="the extra dev brings Triton from Python 3.11 on")


def test_a_dry_run(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = run(
        [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--device",
            "cpu",
            "--tiny",
            "--out",
            str(tmp_path),
            "--seconds",
            "3000",
        ],
        env=environment | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["failed"] == [] and len(found["checks"]) >= 20
    assert all(row["ms"] > 0 for row in found["times"].values()) and len(found["times"]) >= 20
    # verl's Triton head needs a GPU.
    assert all("verl's fused head" in name for name in found["skipped"])
    table = (tmp_path / "gpu.md").read_text()
    assert "update, union, over flash-attention's cross-entropy, bfloat16 | 1.10 | not measured" in table


def session(folder: Path, seconds: float = 60) -> Session:
    return Session("cpu", folder, seconds, TINY)


def test_a_failed_check_is_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> None:
        raise AssertionError("two is not three")

    own = session(tmp_path)
    own.check("right", lambda: {"error": 0.0})
    own.check("wrong", wrong)
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["failed"] == own.failed == ["wrong"]
    assert written["checks"] == {"right": {"error": 0.0}, "wrong": "FAILED AssertionError: two is not three"}
    assert "| wrong | FAILED AssertionError: two is not three |" in command.table(own)


def test_what_cannot_run_is_no_failure_of_ours(tmp_path: Path) -> None:
    def broken(_: None) -> None:
        raise RuntimeError("no such kernel")

    own = session(tmp_path)
    own.time("theirs", broken)
    assert own.failed == [] and own.skipped == ["theirs (RuntimeError: no such kernel)"]


def test_nothing_is_begun_after_the_time(tmp_path: Path) -> None:
    own = session(tmp_path, seconds=0)
    own.check("late", lambda: None)
    own.time("later", lambda _: None)
    assert own.skipped == ["late", "later"] and own.checks == {} and own.times == {}


def test_a_machine_without_a_gpu_is_told_how_to_run_dry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["--device", "cuda"], ["--device", "cpu"], ["--device", "cpu", "--tiny"]):
        with pytest.raises(SystemExit):
            command.arguments([*given, "--out", str(tmp_path)])
        assert "TRITON_INTERPRET=1" in capsys.readouterr().err
