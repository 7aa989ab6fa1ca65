"""Run a function on several CPU ranks with gloo; return its results, or raise with the first traceback.

Ranks start from a fork server that has imported the host packages once, so a scenario costs tenths of a second. A GPU
does not survive a fork: there, each rank imports them itself.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks.guardian import descendants, stay_behind
from benchmarks.processes import IDLE_SECONDS, HungError, Progress
from tests.device import DEVICE, backend

# How long the other ranks may take to end once one has failed; only failing tests wait.
GRACE_SECONDS = 10
PRELOAD = ("torch", "torch.distributed", "tests.distributed.preload")


class RankFailedError(AssertionError):
    """A rank raised, died or hung; the message holds its traceback."""


def _context() -> Any:
    context: Any = multiprocessing.get_context("forkserver" if DEVICE == "cpu" else "spawn")
    if DEVICE == "cpu":
        context.set_forkserver_preload(list(PRELOAD))
    return context


def _rank_main(
    function: Callable[..., Any], rank: int, world_size: int, folder: str, arguments: tuple[Any, ...]
) -> None:
    # What a rank starts and leaves behind, as Megatron does when saving, ends with it; all end with the launcher.
    stay_behind()
    import torch
    import torch.distributed as dist

    log = os.open(str(Path(folder) / f"log{rank}"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    if DEVICE == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    try:
        store = dist.FileStore(str(Path(folder) / "store"), world_size)
        # The launcher detects hung ranks: a limit here would fail those that wait for a slow one.
        limit = timedelta(hours=1)
        dist.init_process_group(backend(), store=store, rank=rank, world_size=world_size, timeout=limit)
        result = (True, function(*arguments))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        result = (False, traceback.format_exc())
    Path(folder, f"result{rank}").write_bytes(pickle.dumps(result))
    # Library threads must not keep a finished rank alive.
    os._exit(0 if result[0] else 1)


def run_ranks(
    function: Callable[..., Any], world_size: int, arguments: Sequence[Any] = (), *, idle: float = IDLE_SECONDS
) -> list[Any]:
    """Results of ``function(*arguments)`` by rank; it runs inside an initialised process group.

    Args:
        idle: seconds without progress on any rank after which they count as hung.

    Raises:
        RankFailedError: a rank failed (with its traceback), or all hang; the other ranks are ended at once.
    """
    context = _context()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank_main, args=(function, rank, world_size, folder, tuple(arguments)))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        waiting = dict(enumerate(ranks))
        logs = [Path(folder, f"log{rank}") for rank in range(world_size)]
        # Each of these processes guards its rank.
        progress = Progress(lambda: descendants(*(one.pid for one in waiting.values())), logs, idle=idle)
        try:
            while waiting:
                sentinels = [process.sentinel for process in waiting.values()]
                if not multiprocessing.connection.wait(sentinels, timeout=progress.interval):
                    try:
                        progress.check()
                    except HungError as error:
                        raise RankFailedError(f"ranks {sorted(waiting)} of {world_size} hang: {error}") from None
                for rank in [rank for rank, process in waiting.items() if not process.is_alive()]:
                    if _failure(rank, ranks[rank].exitcode, folder):
                        raise _first_failure(ranks, folder)
                    waiting.pop(rank)
        finally:
            for process in ranks:
                process.terminate()
            for process in ranks:
                process.join()
        return [pickle.loads(Path(folder, f"result{rank}").read_bytes())[1] for rank in range(world_size)]


def _first_failure(ranks: Sequence[Any], folder: str) -> RankFailedError:
    """The cause: ranks that wait for a failed one fail too, and may end before it."""
    limit = time.monotonic() + GRACE_SECONDS
    while any(process.is_alive() for process in ranks) and time.monotonic() < limit:
        time.sleep(0.05)
    ended = [rank for rank, process in enumerate(ranks) if not process.is_alive()]
    failures = {rank: _failure(rank, ranks[rank].exitcode, folder) for rank in ended}
    first = min((rank for rank in ended if failures[rank]), key=lambda rank: _last_write(rank, folder))
    return RankFailedError(failures[first])


def _last_write(rank: int, folder: str) -> int:
    written = [path for path in (Path(folder, f"result{rank}"), Path(folder, f"log{rank}")) if path.exists()]
    return written[0].stat().st_mtime_ns if written else 0


def _failure(rank: int, exit_code: int | None, folder: str) -> str:
    """What went wrong on a rank that has ended; nothing if nothing did."""
    path = Path(folder, f"result{rank}")
    if not path.exists():
        log = Path(folder, f"log{rank}").read_text(errors="replace")[-4000:]
        return f"rank {rank} ended with exit code {exit_code} before it had a result:\n{log}"
    passed, value = pickle.loads(path.read_bytes())
    return "" if passed else f"rank {rank} failed:\n{value}"
