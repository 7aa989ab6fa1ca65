"""Time and memory of verl's passes, by method."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.engines.hosts import Host
from benchmarks.gpu.engines.rows import EngineRow

SUPPORTS = ("anchored", "union")


def cost(host: Host, setup: Any, batch: Any, repeat: int, row: EngineRow) -> None:
    """Measure time and peak memory of the old pass and of an update with optimizer step, the methods in turn.

    On a GPU also the time that its kernels took in one more turn: what is left of a pass's time is the host's.
    """
    from tests.distributed.batches import with_old_policy

    row.facts["tokens"] = int(batch["input_ids"].values().shape[0])
    row.facts["response tokens"] = int(batch["response_mask"].values().sum())
    methods = {"vanilla": None, **{name: {"support": name} for name in SUPPORTS}}
    shards: dict[str, Any] = {}

    def turn(method: str, measure: Callable[[str, Callable[[], Any]], None]) -> None:
        loss_function = host.loss_function(setup, methods[method])
        measure("old pass", functools.partial(host.old_pass, batch, setup))
        measure("update", functools.partial(host.step, shards[method], setup, loss_function))

    for method, troll in methods.items():
        loss_function = host.loss_function(setup, troll)
        shards[method] = with_old_policy(batch, host.old_pass(batch, setup))
        host.step(shards[method], setup, loss_function)
    seconds: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    busy: dict[str, float] = {}
    for method in [*methods] * repeat:

        def clock(phase: str, work: Callable[[], Any], method: str = method) -> None:
            took, extra = _measure(work, host.device)
            seconds.setdefault(f"{method}, {phase}", []).append(took)
            memory[f"{method}, {phase}"] = max(extra, memory.get(f"{method}, {phase}", 0.0))

        turn(method, clock)
    for method in methods if host.device.type == "cuda" else ():

        def profile(phase: str, work: Callable[[], Any], method: str = method) -> None:
            kernels = _kernel_seconds(work)
            busy[f"{method}, {phase}"] = sum(kernels.values())
            slowest = sorted(kernels, key=kernels.__getitem__, reverse=True)[:10]
            row.facts[f"{method}, {phase}, slowest kernels, s"] = {name: round(kernels[name], 5) for name in slowest}

        turn(method, profile)
    for name, took_each in seconds.items():
        row.facts[f"{name}, s"] = round(statistics.median(took_each), 5)
        row.facts[f"{name}, from and to, s"] = [round(min(took_each), 5), round(max(took_each), 5)]
        if name in busy:
            row.facts[f"{name}, of its kernels, s"] = round(busy[name], 5)
            row.facts[f"{name}, MiB above the engine"] = round(memory[name], 1)
    for phase in ("old pass", "update"):
        for method in SUPPORTS:
            row.facts[f"{method} over vanilla, {phase}"] = round(
                row.facts[f"{method}, {phase}, s"] / row.facts[f"vanilla, {phase}, s"], 3
            )


def _measure(work: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds, and peak MiB above what was allocated before (0 on the CPU)."""
    cuda = device.type == "cuda"
    resting = 0
    if cuda:
        torch.cuda.synchronize()
        resting = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    return seconds, (torch.cuda.max_memory_allocated() - resting) / 2**20 if cuda else 0.0


def _kernel_seconds(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds that each kernel and kind of copy took on the GPU, by its full name: many begin alike."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return {event.key: event.self_device_time_total / 1e6 for event in profile.key_averages()}
