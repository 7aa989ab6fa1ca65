"""Runs cells in long-lived sessions, two at a time by default, and saves their results."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from benchmarks.processes import HungError, Tree
from benchmarks.study import results
from benchmarks.study.cells import DEVICES, ROOT, TASKS_FOLDER, Cell
from verl_troll.tools import disk

SCRATCH = ROOT / "runs" / "study" / "cells"
ATTEMPTS = 2


class SessionError(Exception):
    """A run failed or timed out."""


def environment(device: str = DEVICES[0]) -> dict[str, str]:
    """Environment of verl's processes: the device, one thread each, this repository's modules."""
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {
        **kept,
        **(
            {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "verl_troll.cpu"}
            if device == "cpu"
            else {"VERL_USE_EXTERNAL_MODULES": "verl_troll.embedded"}
        ),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
        "TQ_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
    }


class SessionProcess:
    """One process of :mod:`benchmarks.study.session` and its child processes."""

    def __init__(self, kind: tuple[Any, ...], log: Path, device: str = DEVICES[0]) -> None:
        self.kind = kind
        self._device = device
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as stream:
            self._tree = Tree(
                [sys.executable, "-m", "benchmarks.study.session"],
                cwd=ROOT,
                env=environment(device),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
            )

    def run(self, cell: Cell, tasks: Path, metrics: Path) -> tuple[float, str]:
        """Train one cell and return its seconds, without process start-up, and the device's name.

        Raises:
            SessionError: with the traceback if there is one, and what is known of full disks.
        """
        disks = disk.Watch([disk.Place("log and metrics of the study", metrics.parent, "a clone on another disk")])
        try:
            return self._run(cell, tasks, metrics, disks)
        except SessionError as error:
            raise SessionError("\n".join(filter(None, (str(error), disks.complaint())))) from None

    def _run(self, cell: Cell, tasks: Path, metrics: Path, disks: disk.Watch) -> tuple[float, str]:
        process = self._tree.process
        assert process.stdin is not None
        assert process.stdout is not None
        order = {"cell": cell.to_json(), "tasks": str(tasks), "metrics": str(metrics), "device": self._device}
        try:
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise SessionError("the session had ended") from None
        with selectors.DefaultSelector() as waiting:
            waiting.register(process.stdout, selectors.EVENT_READ)
            progress = self._tree.progress((self._log, metrics))
            while not waiting.select(progress.interval):
                disks.look()
                try:
                    progress.check()
                except HungError as error:
                    raise SessionError(f"the session hangs: {error}") from None
        line = process.stdout.readline()
        if not line:
            raise SessionError(f"the session ended with exit status {process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise SessionError(answer["error"])
        return answer["seconds"], answer["device"]

    def end(self) -> None:
        """End the process and its session, including Ray's processes."""
        self._tree.end()


class Pool:
    """Runs cells until none is left or time is up.

    Args:
        cells: returns the wanted cells in order, given the results so far.
        file: results file.
        tasks: folder of the prepared tasks.
        say: prints a line.
        device: one of :data:`benchmarks.study.cells.DEVICES`; all sessions share it.
    """

    def __init__(
        self,
        cells: Callable[[results.Results], Iterable[Cell]],
        file: Path,
        tasks: Path = TASKS_FOLDER,
        say: Callable[[str], None] = print,
        device: str = DEVICES[0],
    ) -> None:
        self._cells = cells
        self._file = file
        self._tasks = tasks
        self._say = say
        self._device = device
        self._lock = threading.Lock()
        self._done = results.read(file)
        self._taken: set[str] = set()
        self._failures: dict[str, int] = {}
        self._seconds: list[float] = []
        self._sessions: dict[str, SessionProcess] = {}
        self._stop = threading.Event()

    def _left(self) -> list[Cell]:
        wanted = {cell.key: cell for cell in self._cells(self._done)}
        return [
            cell
            for key, cell in wanted.items()
            if key not in self._done and key not in self._taken and self._failures.get(key, 0) < ATTEMPTS
        ]

    def _next(self, kind: tuple[Any, ...] | None) -> Cell | None:
        """The next cell; within a task, one that the running session can train comes first."""
        with self._lock:
            left = self._left()
            if not left:
                return None
            same = [cell for cell in left if cell.session == kind and cell.task == left[0].task]
            cell = (same or left)[0]
            self._taken.add(cell.key)
            return cell

    def _ended(self, cell: Cell, line: results.Record, seconds: float, workers: int) -> None:
        with self._lock:
            results.append(line, self._file)
            self._done[cell.key] = line
            self._taken.discard(cell.key)
            self._seconds.append(seconds)
            left = len(self._left()) + len(self._taken)
            minutes = left * sum(self._seconds) / len(self._seconds) / workers / 60
            success = results.held_out(line)
            self._say(
                f"{cell.name}: {success[0]:.2f} -> {results.final_success(line):.2f}"
                f"{' DIVERGED' if line['run']['status'] == 'diverged' else ''}, {seconds:.0f} s; "
                f"{left} known runs left, about {minutes:.0f} min"
            )

    def _failed(self, cell: Cell, error: Exception) -> None:
        with self._lock:
            self._taken.discard(cell.key)
            self._failures[cell.key] = self._failures.get(cell.key, 0) + 1
            self._say(f"{cell.name}: FAILED ({self._failures[cell.key]} of {ATTEMPTS} attempts)\n{error}")

    def _work(self, name: str, until: float, workers: int) -> None:
        try:
            while not self._stop.is_set() and time.monotonic() < until:
                running = self._sessions.get(name)
                cell = self._next(running.kind if running else None)
                if cell is None:
                    # Other workers' results may add new cells.
                    if not self._taken:
                        return
                    time.sleep(1)
                    continue
                metrics = SCRATCH / f"{cell.key}.jsonl"
                try:
                    seconds, device = self._session(name, cell).run(cell, self._tasks, metrics)
                    line = results.record(cell, metrics, seconds, device)
                # A full disk leaves metrics that cannot be read.
                except (SessionError, ValueError) as error:
                    self._end(name)
                    if not self._stop.is_set():
                        self._failed(cell, error)
                else:
                    self._ended(cell, line, seconds, workers)
                    metrics.unlink()
        finally:
            self._end(name)

    def _session(self, name: str, cell: Cell) -> SessionProcess:
        running = self._sessions.get(name)
        if running is None or running.kind != cell.session:
            self._end(name)
            running = self._sessions[name] = SessionProcess(cell.session, SCRATCH / f"{name}.log", self._device)
        return running

    def _end(self, name: str) -> None:
        if (session := self._sessions.pop(name, None)) is not None:
            session.end()

    def run(self, workers: int, minutes: float) -> list[str]:
        """Run the cells; return the keys of those that failed every attempt.

        Ctrl-C ends the running cells at once; completed ones are already saved.

        Args:
            workers: parallel sessions, one core each.
            minutes: time after which no new cell starts.
        """
        until = time.monotonic() + minutes * 60
        with ThreadPoolExecutor(workers) as threads:
            futures = [threads.submit(self._work, f"worker-{number}", until, workers) for number in range(workers)]
            try:
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except BaseException:
                self._stop.set()
                for session in list(self._sessions.values()):
                    session.end()
                self._say("stopped; completed runs are kept")
                raise
        return [key for key, count in self._failures.items() if count >= ATTEMPTS]
