"""State of one GPU run: device, sizes, clock, and the results, saved after every row."""

from __future__ import annotations

import json
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Device cycles to sleep before each timed call.
_HEAD_START = 20_000_000


@dataclass(frozen=True)
class Sizes:
    """Sizes of the inputs: ``vocab`` columns, ``tokens`` timed rows, ``k`` kept ids."""

    vocab: int = 151_936
    odd_vocab: int = 50_257
    tokens: int = 8192
    checked: int = 64
    k: int = 64
    fuzzed: int = 1_000_000
    hidden: tuple[int, ...] = (896, 4096)


TINY = Sizes(vocab=333, odd_vocab=77, tokens=6, checked=5, k=8, fuzzed=12, hidden=(16,))


@dataclass
class Session:
    """State of one run.

    Attributes:
        device: ``cuda``, or ``cpu`` for a dry run in Triton's interpreter.
        out: folder for ``gpu.json`` and ``gpu.md``.
        seconds: no row starts after this many seconds.
        checks: the result of each check, by name; failures are texts that begin with FAILED.
        times: milliseconds and memory, by name.
    """

    device: str
    out: Path
    seconds: float
    sizes: Sizes
    facts: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, Any] = field(default_factory=dict)
    times: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    begun: float = field(default_factory=time.perf_counter)

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def failed(self) -> list[str]:
        return [name for name, found in self.checks.items() if str(found).startswith("FAILED")]

    def elapsed(self) -> float:
        return time.perf_counter() - self.begun

    def synchronise(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def late(self, name: str) -> bool:
        """Whether the time is up; if so, record ``name`` as skipped."""
        if self.elapsed() < self.seconds:
            return False
        self.skipped.append(name)
        return True

    def check(self, name: str, function: Callable[[], Any]) -> None:
        """Run ``function``, which raises on failure, and record its result."""
        if self.late(name):
            return
        try:
            self.checks[name] = function() or "ok"
        except Exception as error:
            self.checks[name] = f"FAILED {type(error).__name__}: {error}"[:600]
            traceback.print_exc(limit=3)
        print(f"{self.elapsed():6.1f} s  {name}: {self.checks[name]}", flush=True)
        self.write()

    def time(
        self,
        name: str,
        function: Callable[[Any], object],
        prepare: Callable[[], Any] = lambda: None,
        *,
        repeat: int = 11,
    ) -> None:
        """Time ``function(prepare())`` on the device: median and quartiles over turns, without the first two.

        ``extra_mib`` is the peak above the previous allocation, ``host_ms`` the host's time to launch the work.
        """
        if self.late(name):
            return
        try:
            self._time(name, function, prepare, repeat)
        except Exception as error:
            # Third-party code may not run here; our own has been checked.
            self.skipped.append(f"{name} ({type(error).__name__}: {error})"[:300])
            traceback.print_exc(limit=2)
        self.write()

    def _time(self, name: str, function: Callable[[Any], object], prepare: Callable[[], Any], repeat: int) -> None:
        milliseconds, host = [], []
        before = 0
        for turn in range(repeat + 2 if self.on_gpu else 1):
            value = prepare()
            self.synchronise()
            if self.on_gpu:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                # Let the host run ahead, as in training, so that only the device's work is timed.
                torch.cuda._sleep(_HEAD_START)
                launch = time.perf_counter()
                begin.record()
                function(value)
                end.record()
                launch = time.perf_counter() - launch
                self.synchronise()
                if turn > 1:
                    milliseconds.append(begin.elapsed_time(end))
                    host.append(1e3 * launch)
            else:
                launch = time.perf_counter()
                function(value)
                milliseconds.append(1e3 * (time.perf_counter() - launch))
                host.append(milliseconds[-1])
            del value
        ordered = sorted(milliseconds)
        self.times[name] = {
            "ms": statistics.median(ordered),
            "low": ordered[len(ordered) // 4],
            "high": ordered[3 * len(ordered) // 4],
            "host_ms": statistics.median(host),
            "extra_mib": (torch.cuda.max_memory_allocated() - before) / 2**20 if self.on_gpu else 0.0,
        }
        row = self.times[name]
        print(
            f"{self.elapsed():6.1f} s  {name:58s} {row['ms']:9.3f} ms  host {row['host_ms']:7.3f} ms  "
            f"{row['extra_mib']:7.0f} MiB",
            flush=True,
        )

    def ratio(self, name: str, base: str) -> float | None:
        """Time of ``name`` relative to ``base``; None unless both were measured."""
        if name not in self.times or base not in self.times:
            return None
        return self.times[name]["ms"] / self.times[base]["ms"]

    def write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        content = {
            "facts": self.facts,
            "checks": self.checks,
            "times": self.times,
            "skipped": self.skipped,
            "failed": self.failed,
        }
        (self.out / "gpu.json").write_text(json.dumps(content, indent=1) + "\n")

    def normal(self, rows: int, columns: int, *, dtype: torch.dtype, seed: int = 0, scale: float = 3.0) -> Tensor:
        """Random logits, generated a few rows at a time to avoid a full float32 copy."""
        generator = torch.Generator(self.device).manual_seed(seed)
        result = torch.empty(rows, columns, dtype=dtype, device=self.device)
        for start in range(0, rows, 256):
            part = result[start : start + 256]
            part.copy_(scale * torch.randn(part.shape, generator=generator, device=self.device))
        return result
