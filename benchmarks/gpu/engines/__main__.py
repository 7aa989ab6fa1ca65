"""Runs TROLL in verl's own engines and trainer on one device, and checks correctness and cost.

    python -m benchmarks.gpu.engines --device cuda --out FOLDER [--only fsdp2 trainer] [--seconds 170] [--tiny]

========  =============================================================================================================
fsdp2     verl's FSDP2 engine: the Triton kernels against the torch forms, the first update, time and memory of a step
fsdp      the same on FSDP1, which needs an accelerator
megatron  the same on verl's Megatron engine at tensor-parallel size 1, with layers that need no TransformerEngine
model     time and memory of a step on FSDP2 with a model of 1.5 billion parameters (random weights)
trainer   three steps of verl's trainer for each method, with the embedded rollout on the device
========  =============================================================================================================

FOLDER/gpu_engines.json is rewritten after every row. A row is passed, failed or skipped, with the reason; the exit
status is 1 if one failed. Parts run in separate processes, one after the other; the trainers run side by side on eight
or more cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.engines.parts import engine_part
from benchmarks.gpu.engines.rows import Clock, EngineRow, Results
from benchmarks.gpu.engines.trainer import RUNS, trainer_part

PARTS = ("fsdp2", "fsdp", "megatron", "model", "trainer")
ENGINES = PARTS[:4]
NEEDED = {
    "fsdp2": ("verl", "tensordict", "transformers"),
    "fsdp": ("verl", "tensordict", "transformers"),
    "megatron": ("verl", "tensordict", "transformers", "megatron.core", "mbridge"),
    "model": ("verl", "tensordict", "transformers"),
    "trainer": ("verl", "ray", "transfer_queue", "transformers"),
}
# Seconds reserved for the trainers, however long the engines take.
TRAINER_SECONDS = 90.0


def missing(part: str) -> list[str]:
    """Packages that a part needs but that are not installed."""
    absent = []
    for name in NEEDED[part]:
        try:
            found = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            absent.append(name)
    return absent


def machine(device: str) -> dict[str, Any]:
    """Facts that the numbers depend on."""
    facts = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    for name in ("triton", "transformers", "verl", "ray", "megatron.core", "flash_attn"):
        if not (spec := _spec(name)):
            continue
        try:
            facts[name] = importlib.metadata.version(name.replace(".", "-"))
        except importlib.metadata.PackageNotFoundError:
            facts[name] = str(spec.origin)
    if device == "cuda":
        facts["accelerator"] = torch.cuda.get_device_name()
    return facts


def _spec(name: str) -> Any:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None


def engine_parts(parts: Sequence[str], options: argparse.Namespace, clock: Clock, results: Results) -> None:
    """Run engine parts in separate processes. With enough cores they all import at once, then work in turn."""
    together = _jobs(options) > 1
    with tempfile.TemporaryDirectory() as name:
        logs = {part: Path(name, f"{part}.log") for part in parts}
        rows = {part: Path(name, f"{part}.jsonl") for part in parts}
        processes: dict[str, subprocess.Popen[bytes]] = {}

        def start(part: str) -> None:
            from tests.device import environment

            command = [
                sys.executable,
                "-m",
                "benchmarks.gpu.engines",
                "--part",
                part,
                "--out",
                str(rows[part]),
                "--wait",
            ]
            command += ["--device", options.device, *(["--tiny"] if options.tiny else [])]
            variables = {**os.environ, **environment(options.device), "TROLL_TEST_DEVICE": options.device}
            if part == "megatron":
                # Compiling Megatron's small functions would take longer than the whole measurement.
                variables["TORCHDYNAMO_DISABLE"] = "1"
            with logs[part].open("wb") as log:
                processes[part] = subprocess.Popen(
                    command, env=variables, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
                )

        try:
            for part in parts if together else ():
                start(part)
            for part in parts:
                if part not in processes:
                    start(part)
                process = processes[part]
                assert process.stdin is not None
                process.stdin.write(f"{max(1.0, clock.left - 3)}\n".encode())
                process.stdin.close()
                seen = 0
                while True:
                    ended = process.poll() is not None
                    lines = rows[part].read_text().splitlines() if rows[part].exists() else []
                    for line in lines[seen:]:
                        results.add(json.loads(line))
                    seen = len(lines)
                    if ended or clock.left <= 0:
                        break
                    time.sleep(0.1)
                if process.poll() != 0:
                    why = f"exit status {process.returncode}" if ended else "not finished in time"
                    tail = logs[part].read_text(errors="replace")[-3000:]
                    results.add(EngineRow(part, "process", reason=f"{why}\n{tail}").as_dict())
        finally:
            for process in processes.values():
                process.kill()
                process.wait()


def _jobs(options: argparse.Namespace) -> int:
    jobs: int = options.jobs or (4 if (os.cpu_count() or 1) >= 8 else 1)
    return jobs


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.engines",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--methods", nargs="+", choices=RUNS, default=list(RUNS), help="the trainer's methods")
    parser.add_argument("--seconds", type=float, default=170.0, help="time limit for everything")
    parser.add_argument("--jobs", type=int, help="parallel processes; by default 4, or 1 with fewer than eight cores")
    parser.add_argument("--tiny", action="store_true", help="small models, for a dry run")
    parser.add_argument("--part", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--wait", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    return options


def main(given: Sequence[str] | None = None) -> int:
    """Run the parts; return 1 if a row failed."""
    options = arguments(given)
    warnings.filterwarnings("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("VERL_LOGGING_LEVEL", "ERROR")
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", RAY_USAGE_STATS_ENABLED="0")
    # The machine may have no other interface.
    os.environ.update(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo")
    if options.part:

        def append(row: EngineRow) -> None:
            with options.out.open("a") as file:
                file.write(json.dumps(row.as_dict()) + "\n")

        engine_part(options.part, options, append)
        sys.stdout.flush()
        # Keep library threads from holding up exit.
        os._exit(0)
    clock = Clock(options.seconds)
    results = Results(options.out, machine(options.device))
    parts = []
    for part in options.only:
        if absent := missing(part):
            reason = f"not installed: {', '.join(absent)}"
            results.add(EngineRow(part, "all", skipped=True, reason=reason).as_dict())
        else:
            parts.append(part)
    engines = [part for part in ENGINES if part in parts]
    if engines:
        reserve = TRAINER_SECONDS if "trainer" in parts else 0.0
        engine_parts(engines, options, Clock(max(0.5 * clock.left, clock.left - reserve)), results)
    if "trainer" in parts:
        trainer_part(options, _jobs(options), clock, lambda row: results.add(row.as_dict()))
    rows = results.content["rows"]
    counts = {status: sum(row["status"] == status for row in rows) for status in ("passed", "failed", "skipped")}
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return int(counts["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
