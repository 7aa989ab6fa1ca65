"""Reward for mathematics: 1 if math-verify finds the final answer equal to the ground truth, else 0.

Parsing LaTeX and comparing expressions can take unbounded time and memory, in C code that signal handlers cannot
interrupt. So it runs in separate processes, which are killed when they exceed a limit.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from verl_troll.tasks.rewards import _math_worker
from verl_troll.tasks.rewards.answers import final_answer

MAX_ANSWER = 2000
"""Maximum characters of an answer. Longer ones count as wrong, unparsed."""
START_SECONDS = 300.0
"""How long a worker may take to import math-verify, even on a busy machine."""

if importlib.util.find_spec("math_verify") is None:
    raise ImportError("the reward for mathematics needs math-verify: pip install 'verl_troll[tasks]'")


class Worker:
    """One process that compares answers; it ends with :meth:`close` or with this process."""

    def __init__(self, memory: int, seconds: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-B", "-c", Path(_math_worker.__file__).read_text(), str(memory), str(int(seconds) + 1)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
        )
        if self._reply(START_SECONDS) != {"ready": True}:
            status = self.close()
            raise RuntimeError(
                f"the process for math-verify did not start (status {status}): try "
                f"{sys.executable} -c 'import math_verify'"
            )

    def _reply(self, seconds: float) -> dict[str, bool] | None:
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        text = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not text.endswith(b"\n"):
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    return None
                chunk = os.read(self._process.stdout.fileno(), 4096)
                if not chunk:
                    return None
                text += chunk
        reply: dict[str, bool] = json.loads(text)
        return reply

    def equal(self, gold: str, answer: str, seconds: float) -> bool | None:
        """Whether two answers are equal; None if the process hit a limit or crashed, and must be replaced."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"gold": gold, "answer": answer}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        reply = self._reply(seconds)
        return None if reply is None else reply["equal"]

    def close(self) -> int:
        """End the process and return its status."""
        self._process.kill()
        with self._process:
            return self._process.wait()


class WorkerPool:
    """Up to ``size`` workers, started on demand. Thread-safe."""

    def __init__(self, size: int, memory: int, seconds: float) -> None:
        self._memory, self._seconds = memory, seconds
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(size):
            self._idle.put(None)

    def equal(self, gold: str, answer: str) -> bool | None:
        """Whether two answers are equal; None if a limit ended the comparison."""
        worker = self._idle.get()
        result: bool | None = None
        try:
            worker = worker or Worker(self._memory, self._seconds)
            result = worker.equal(gold, answer, self._seconds)
        finally:
            if worker is not None and result is None:
                worker.close()
                worker = None
            self._idle.put(worker)
        return result


_pools: dict[tuple[int, int, float], WorkerPool] = {}
_pools_lock = threading.Lock()


def _pool(size: int, memory: int, seconds: float) -> WorkerPool:
    key = (size, memory, seconds)
    with _pools_lock:
        if key not in _pools:
            _pools[key] = WorkerPool(*key)
        return _pools[key]


# A forked process must not use its parent's workers.
os.register_at_fork(after_in_child=_pools.clear)


def _plain(text: str) -> str:
    return "".join(text.replace("$", "").replace("\\,", "").replace("\\!", "").split())


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    *,
    seconds: float = 10.0,
    memory_mb: int = 2048,
    workers: int = 2,
    **unused: Any,
) -> dict[str, float]:
    """Score one response. verl's reward manager calls this in a thread of a reward worker.

    Args:
        data_source: unused; :func:`verl_troll.tasks.rewards.answers.final_answer` handles all tasks.
        solution_str: the response.
        ground_truth: the right answer as LaTeX or plain text, or a solution that ends in ``#### answer``.
        extra_info: unused.
        seconds: time limit for one comparison.
        memory_mb: address space of a worker process, in MiB.
        workers: worker processes per reward worker, about 120 MiB each.

    Returns:
        ``score`` and ``acc``: 1 if the final answer is right, else 0. ``answered``: 1 if the response has a final
        answer. ``stopped``: 1 if a limit ended the comparison.

    Raises:
        ValueError: the ground truth is empty.
        RuntimeError: math-verify does not start.
    """
    truth = str(ground_truth).rsplit("####", 1)[-1].strip()
    if not truth:
        raise ValueError(f"ground_truth={ground_truth!r} holds no answer")
    answer = final_answer(solution_str)
    if answer is None:
        return {"score": 0.0, "acc": 0.0, "answered": 0.0, "stopped": 0.0}
    equal: bool | None = False
    if _plain(answer) == _plain(truth):
        equal = True
    elif len(answer) <= MAX_ANSWER:
        equal = _pool(workers, memory_mb << 20, seconds).equal(_boxed(truth), _boxed(answer))
    return {"score": float(bool(equal)), "acc": float(bool(equal)), "answered": 1.0, "stopped": float(equal is None)}


def _boxed(text: str) -> str:
    return f"\\boxed{{{text}}}"
