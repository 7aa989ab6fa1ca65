"""Separate processes for libraries that read a model's answers.

Parsing an answer can take unbounded time and memory, in C code that signal handlers cannot interrupt. So it runs in
processes that are killed when they exceed a limit, and replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_troll.tasks.rewards import _worker

START_SECONDS = 300.0
"""How long a worker may take to import its library, even on a busy machine."""


@dataclass(frozen=True)
class Program:
    """What a worker runs.

    Attributes:
        file: Python file whose ``load()`` imports the library and returns the function that answers questions.
        library: the library's name, for messages.
        extra: the extra of this package that installs it.
    """

    file: Path
    library: str
    extra: str


class Worker:
    """One process that answers questions; it ends with :meth:`close` or with this process.

    Args:
        program: what it runs.
        memory: address space, in bytes.
        seconds: CPU time for one answer, after which the process ends itself.

    Raises:
        ImportError: the library or one of its dependencies is missing.
        RuntimeError: the process does not start.
    """

    def __init__(self, program: Program, memory: int, seconds: float) -> None:
        self._program = program
        source = Path(_worker.__file__).read_text()
        self._process = subprocess.Popen(
            [sys.executable, "-B", "-c", source, str(memory), str(int(seconds) + 1), str(program.file.resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            # The order of sets is part of what a library computes; one answer needs one thread.
            env={**os.environ, "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        try:
            started = self._reply(START_SECONDS) == {"ready": True}
        except ImportError:
            self.close()
            raise
        if not started:
            # One that ended has a status of its own; one that hangs is killed.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            raise RuntimeError(f"the process for {program.library} did not start (status {self.close()})")

    def _reply(self, seconds: float) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        chunks: list[bytes] = []
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not chunks or not chunks[-1].endswith(b"\n"):
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    return None
                chunk = os.read(self._process.stdout.fileno(), 1 << 16)
                if not chunk:
                    return None
                chunks.append(chunk)
        reply: dict[str, Any] = json.loads(b"".join(chunks))
        if "missing" in reply:
            library, extra = self._program.library, self._program.extra
            raise ImportError(
                f"{library} cannot be used: {reply['missing']}; python: {sys.executable}; "
                f"pip install 'verl_troll[{extra}]'"
            )
        return reply

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The answer to a question; None if the process hit a limit or crashed, and must be replaced.

        Raises:
            ImportError: a dependency of the library is missing.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        return self._reply(seconds)

    def close(self) -> int:
        """End the process and return its status."""
        self._process.kill()
        with self._process:
            return self._process.wait()


class WorkerPool:
    """Up to ``size`` workers, started on demand. Thread-safe."""

    def __init__(self, program: Program, size: int, memory: int, seconds: float) -> None:
        self._program, self._memory, self._seconds = program, memory, seconds
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(size):
            self._idle.put(None)

    def ask(self, question: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to a question; None if a limit ended the process."""
        worker = self._idle.get()
        reply: dict[str, Any] | None = None
        try:
            worker = worker or Worker(self._program, self._memory, self._seconds)
            reply = worker.ask(question, self._seconds)
        finally:
            if worker is not None and reply is None:
                worker.close()
                worker = None
            self._idle.put(worker)
        return reply


_pools: dict[tuple[Program, int, int, float], WorkerPool] = {}
_pools_lock = threading.Lock()


def shared_pool(program: Program, size: int, memory: int, seconds: float) -> WorkerPool:
    """This process's pool with these settings."""
    key = (program, size, memory, seconds)
    with _pools_lock:
        if key not in _pools:
            _pools[key] = WorkerPool(*key)
        return _pools[key]


# A forked process must not use its parent's workers.
os.register_at_fork(after_in_child=_pools.clear)
