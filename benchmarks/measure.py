"""Clock, memory meter and the machine's own rates."""

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

# The profiler announces its start and stop otherwise; read when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Times = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Contender:
    """One of the methods that are compared.

    Attributes:
        name: of the method.
        phases: what is timed, in order: each is called with what the one before it returned, the first with what
            ``prepare`` returned.
        prepare: called before each turn, not timed.
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
    """Wait for the device, and for the other ranks where there are any."""
    if device == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def take_turns(contenders: Sequence[Contender], repeat: int, device: str) -> Times:
    """Seconds by contender and phase, one per turn; the first turn warms up and is dropped.

    The contenders take turns, so that a busy machine slows all alike.
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
    """Bytes allocated at the peak of the first ``phases`` (all by default) above those allocated before them."""
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
    """From every event of torch's host allocator, scratch inside operators among them.

    What operators take from the system themselves (a few libraries' work space) is not seen.
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
    """Reading all bytes of ``buffer`` once, and reading and writing them in place; no value changes."""
    flat = buffer.detach().flatten()
    if flat.element_size() < 4:
        flat = flat[: flat.numel() // 2 * 2].view(torch.float32)
    # Sums of rows: a sum of all entries adds up in fewer lanes.
    rows = flat[: flat.numel() // 64 * 64].view(64, -1)
    return [
        Contender("read once", {"read": lambda _: rows.sum(-1)}),
        Contender("read and write", {"read and write": lambda _: flat.mul_(1.0)}),
    ]


def machine(device: str) -> dict[str, Any]:
    """Facts that the numbers depend on; ``load`` is the number of running processes over the last minute."""
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
    """Bytes that can be allocated now."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else _meminfo("MemAvailable")
