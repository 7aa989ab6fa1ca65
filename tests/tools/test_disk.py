"""A full disk is named with its free space and what to do: real file systems of a few megabytes."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from benchmarks.attack.launchers import fill, small_disk
from benchmarks.study import __main__ as study
from benchmarks.study import pool
from verl_troll.tools import disk

MEGABYTE = 2**20


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 8 * MEGABYTE, files=50) as found:
        if found is None:
            pytest.skip("needs the right to mount")
        yield found


def complaint(path: Path) -> list[str]:
    """About the file system at ``path`` alone: others may be full where this runs."""
    with mock.patch.object(disk, "of_every_run", return_value=[]):
        return disk.Watch([disk.Place("checkpoints", path, "--out FOLDER")]).complaint().splitlines()


def test_a_full_disk(small: Path) -> None:
    fill(small)
    (line,) = complaint(small / "not" / "there" / "yet")
    assert re.match(
        rf"The file system at {small} is full: No space left on device \(0 B of 8 MiB free at \d\d:\d\d:\d\d\)", line
    )
    assert "It holds: checkpoints." in line
    assert "checkpoints: --out FOLDER" in line


def test_a_disk_with_space(small: Path) -> None:
    assert complaint(small) == []
    assert list(small.iterdir()) == []


def test_a_nearly_full_disk(small: Path) -> None:
    (small / "file").write_bytes(bytes(8 * MEGABYTE - 64 * 1024))
    with mock.patch.object(disk, "_PROBE_BYTES", 1024):
        (line,) = complaint(small)
    assert f"{small} is nearly full (64 KiB of 8 MiB free" in line


def test_a_disk_that_can_hold_no_more_files(small: Path) -> None:
    for number in range(50):
        with contextlib.suppress(OSError):
            (small / str(number)).touch()
    (line,) = complaint(small)
    assert "can hold no more files (8 MiB of 8 MiB free" in line


def test_what_was_removed_in_the_end_is_remembered(small: Path) -> None:
    with mock.patch.object(disk, "of_every_run", return_value=[]):
        watch = disk.Watch([disk.Place("log", small, "--out FOLDER")])
        fill(small)
        watch.look()
        (small / "filling").unlink()
        assert f"{small} is full (0 B of 8 MiB free" in watch.complaint()


def test_a_file_system_that_refuses_for_another_reason(small: Path) -> None:
    refusal = OSError(errno.EDQUOT, "quota")
    with mock.patch("tempfile.TemporaryFile", side_effect=refusal):
        (line,) = complaint(small)
    assert "is full: Disk quota exceeded (8 MiB of 8 MiB free" in line
    with mock.patch("tempfile.TemporaryFile", side_effect=PermissionError(errno.EACCES, "no")):
        assert complaint(small) == []


def test_places_on_one_file_system_share_a_line(small: Path) -> None:
    fill(small)
    with mock.patch.object(disk, "of_every_run", return_value=[]):
        places = [disk.Place("log", small, "--out FOLDER"), disk.Place("checkpoints", small / "x", "elsewhere")]
        (line,) = disk.Watch(places).complaint().splitlines()
    assert "It holds: log, checkpoints." in line


def test_where_ray_and_temporary_files_go(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    assert [str(place.path) for place in disk.of_every_run()] == ["/tmp", "/tmp", "/dev/shm"]
    monkeypatch.setenv("TMPDIR", "/a")
    monkeypatch.setenv("RAY_TMPDIR", "/b")
    assert [str(place.path) for place in disk.of_every_run()] == ["/b", "/a", "/dev/shm"]


def test_as_a_script_it_needs_no_package(small: Path) -> None:
    command = [sys.executable, "-I", "-S", disk.__file__, str(small)]
    fill(small)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"The file system at {small} is full" in done.stderr
    assert f"what is written to {small}" in done.stderr


def test_a_failed_run_of_the_study_names_the_disk(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> float:
        raise pool.SessionError("the session ended")

    fill(small)
    monkeypatch.setattr(pool.SessionProcess, "_run", fail)
    session = object.__new__(pool.SessionProcess)
    with pytest.raises(pool.SessionError, match=rf"the session ended\nThe file system at {small} is full"):
        session.run(mock.Mock(), Path(), small / "metrics.jsonl")


def test_results_of_the_study_that_cannot_be_written(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(small)
    with mock.patch.object(study, "_list", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))):
        assert study.main(["list", "--results", str(small / "results.jsonl")]) == 1
    assert f"The file system at {small} is full" in capsys.readouterr().err


def test_captured_output_that_does_not_fit(small: Path) -> None:
    from benchmarks import processes

    with mock.patch.object(tempfile, "tempdir", str(small)):
        done = processes.run(["sh", "-c", "head -c 20M /dev/zero"])
    assert done.returncode != 0
    assert f"The file system at {small} is full" in done.stderr
