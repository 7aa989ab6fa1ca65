"""Measures time, peak memory and the machine's bandwidth."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Silences the profiler's start and stop messages; read when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Times = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Contender:
    """One of the compared methods.

    Attributes:
        name: name of the method.
        phases: the timed calls, in order; each receives the previous one's result, the first that of ``prepare``.
        prepare: called before each turn, untimed.
    """

    name: str
    phases: dict[str, Callable[[Any], Any]]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of ``count`` turns."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return cls(statistics.median(values), low, high, len(values))


def synchronise(device: str) -> None:
    """Wait for the device, and for other ranks if there are any."""
    if device == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def take_turns(contenders: Sequence[Contender], repeat: int, device: str) -> Times:
    """Seconds by contender and phase, one per turn; the first turn is a warm-up and is dropped.

    The contenders alternate, so a busy machine slows all of them equally.
    """
    times: Times = {contender.name: {phase: [] for phase in contender.phases} for contender in contenders}
    for turn in range(repeat + 1):
        for contender in contenders:
            value = contender.prepare()
            gc.collect()
            for phase, call in contender.phases.items():
                synchronise(device)
                start = time.perf_counter()
                value = call(value)
                synchronise(device)
                if turn > 0:
                    times[contender.name][phase].append(time.perf_counter() - start)
            del value
    return times


def peak_bytes(contender: Contender, device: str, phases: int | None = None) -> int:
    """Peak bytes during the first ``phases`` (all by default), above what was allocated before them."""
    value = contender.prepare()
    gc.collect()

    def work() -> None:
        nonlocal value
        for call in list(contender.phases.values())[:phases]:
            value = call(value)

    return _peak_on_accelerator(work) if device == "cuda" else _peak_on_host(work)


def _peak_on_accelerator(work: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_host(work: Callable[[], None]) -> int:
    """Peak of torch's host allocator, including temporaries inside operators.

    Memory that libraries take from the system directly is not counted.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        work()
    results = recording.profiler.kineto_results
    events = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event[0])
    peak = total = 0
    for _, change in events:
        total += change
        peak = max(peak, total)
    return peak


def bandwidth_contenders(buffer: Tensor) -> list[Contender]:
    """Reads all bytes of ``buffer`` once, and reads and writes them in place, without changing values."""
    flat = buffer.detach().flatten()
    if flat.element_size() < 4:
        flat = flat[: flat.numel() // 2 * 2].view(torch.float32)
    # Sum rows, since a sum over all entries uses fewer lanes.
    rows = flat[: flat.numel() // 64 * 64].view(64, -1)
    return [
        Contender("read once", {"read": lambda _: rows.sum(-1)}),
        Contender("read and write", {"read and write": lambda _: flat.mul_(1.0)}),
    ]


def machine(device: str) -> dict[str, Any]:
    """Facts that the numbers depend on; ``load`` is the average number of running processes in the last minute."""
    import verl

    facts = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "memory_gib": round(total_memory() / 2**30),
        "torch": torch.__version__,
        "verl": verl.__version__,
        "python": platform.python_version(),
    }
    if device == "cuda":
        facts["accelerator"] = torch.cuda.get_device_name()
    return facts


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _meminfo(key: str) -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def total_memory() -> int:
    """Bytes of host memory."""
    return _meminfo("MemTotal")


def free_memory(device: str) -> int:
    """Bytes available for allocation."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else _meminfo("MemAvailable")
