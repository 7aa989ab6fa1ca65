"""Runs commands as process trees that end as a whole, and that may run as long as they make progress."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks import guardian
from verl_troll.tools import disk

IDLE_SECONDS = 600.0
"""Without progress; then a process counts as hung."""
WORK_SHARE = 0.05
"""Of one core, by one process over the idle seconds: less is no progress. Ray's daemons use up to 0.02 while they wait,
and a core shared by ten processes leaves each a tenth."""


class HungError(Exception):
    """A process made no progress for too long."""


class Progress:
    """Tells a slow process from a hung one.

    Progress means that a watched file has changed in size, or that a process has used processor time:
    :data:`WORK_SHARE` of ``idle`` seconds.

    Args:
        processes: returns the ids of the processes to watch, without those that have ended.
        files: expected to grow; missing ones count as empty.
        idle: seconds without progress after which :meth:`check` raises.
    """

    def __init__(
        self, processes: Callable[[], Iterable[int]], files: Iterable[Path] = (), *, idle: float = IDLE_SECONDS
    ) -> None:
        self._processes = processes
        self._files = tuple(files)
        self.idle = idle
        self.interval = min(5.0, idle / 10)
        """Seconds between two looks; :meth:`check` does nothing in between."""
        self._used: dict[int, float] = {}
        self._worked: dict[int, float] = {}
        self._sizes = self._size_of_files()
        self._since = self._looked = time.monotonic()

    def check(self) -> None:
        """Look for progress.

        Raises:
            HungError: there was none for ``idle`` seconds.
        """
        now = time.monotonic()
        if now - self._looked < self.interval:
            return
        # If the machine slept, or the caller itself was delayed, the processes are not to blame.
        if now - self._looked > 10 * self.interval:
            self._since = now
        self._looked = now
        used = processor_seconds(self._processes())
        for process, seconds in used.items():
            more = seconds - self._used.get(process, 0.0)
            self._worked[process] = self._worked.get(process, 0.0) + max(0.0, more)
        self._used = used
        sizes = self._size_of_files()
        if sizes != self._sizes or max(self._worked.values(), default=0.0) >= WORK_SHARE * self.idle:
            self._sizes, self._worked, self._since = sizes, {}, now
        elif now - self._since > self.idle:
            raise HungError(f"no progress for {self.idle:g} s")

    def _size_of_files(self) -> list[int]:
        return [path.stat().st_size if path.exists() else 0 for path in self._files]


def processor_seconds(processes: Iterable[int]) -> dict[int, float]:
    """Processor time of each process."""
    found = {}
    for process in processes:
        try:
            times = psutil.Process(process).cpu_times()
        except psutil.NoSuchProcess:
            continue
        found[process] = times.user + times.system
    return found


class Tree:
    """A running command in its own session, with everything it starts.

    All of it ends with the command, with the ``with`` block, and with this process, even if that is killed
    (:mod:`benchmarks.guardian`).

    Args:
        options: for :class:`subprocess.Popen`.
    """

    def __init__(self, command: Sequence[str | Path], **options: Any) -> None:
        self._writing: int | None
        reading, self._writing = os.pipe()
        guarded = [sys.executable, "-I", "-S", guardian.__file__, str(reading), *command]
        try:
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                guarded, start_new_session=True, pass_fds=[reading], **options
            )
        except BaseException:
            os.close(self._writing)
            raise
        finally:
            os.close(reading)

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def processes(self) -> list[int]:
        """Ids of the running processes."""
        return guardian.descendants(self.process.pid) if self.process.poll() is None else []

    def progress(self, files: Iterable[Path] = (), *, idle: float = IDLE_SECONDS) -> Progress:
        """A watch over the processes and files that they write."""
        return Progress(self.processes, files, idle=idle)

    def wait(self, files: Iterable[Path] = (), *, idle: float = IDLE_SECONDS, limit: float | None = None) -> int:
        """Exit status of the command.

        Args:
            files: as for :class:`Progress`.
            idle: as for :class:`Progress`.
            limit: seconds after which to stop regardless of progress.

        Raises:
            HungError: it made no progress, or reached the limit.
        """
        progress = self.progress(files, idle=idle)
        until = None if limit is None else time.monotonic() + limit
        while True:
            try:
                return self.process.wait(progress.interval)
            except subprocess.TimeoutExpired:
                progress.check()
            if until is not None and time.monotonic() > until:
                raise HungError(f"not done within {limit:g} s")

    def end(self) -> None:
        """End the command and everything it started."""
        if self._writing is not None:
            os.close(self._writing)
            self._writing = None
        self.process.wait()


def run(
    command: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    check: bool = False,
    idle: float = IDLE_SECONDS,
) -> subprocess.CompletedProcess[str]:
    """Like :func:`subprocess.run` with captured output, for as long as the command makes progress.

    If it fails and a disk is full, its standard error ends with that.

    Raises:
        HungError: no progress; the message ends with the output.
        subprocess.CalledProcessError: the command failed, and ``check`` is set.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        with (
            out.open("wb") as stdout,
            err.open("wb") as stderr,
            Tree(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr) as tree,
        ):
            try:
                code = tree.wait((out, err), idle=idle)
            except HungError as error:
                tail = "\n".join(path.read_text(errors="replace")[-3000:] for path in (out, err))
                raise HungError(f"{error}\n{tail}") from None
        disks = disk.Watch([disk.Place("captured output", Path(folder), "TMPDIR=FOLDER")]).complaint() if code else ""
        done = subprocess.CompletedProcess(
            command, code, out.read_text(errors="replace"), err.read_text(errors="replace") + (disks and f"\n{disks}\n")
        )
    if check:
        done.check_returncode()
    return done
