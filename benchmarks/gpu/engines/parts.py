"""The parts of the check that run in verl's engines, without its trainer."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.engines.agreement import agreement
from benchmarks.gpu.engines.cost import SUPPORTS, cost
from benchmarks.gpu.engines.hosts import FsdpHost, Host, MegatronHost
from benchmarks.gpu.engines.inputs import SIZES, Size, make_batch, sampled, write_model
from benchmarks.gpu.engines.rows import Clock, EngineRow, Report, run_case


def fsdp(strategy: str, device: str, size: Size, clock: Clock, report: Report) -> None:
    """Run the cases of one FSDP strategy; each engine is built once and used for all methods."""
    with tempfile.TemporaryDirectory() as folder:
        for fused in (False, True):
            kind = "fused head" if fused else "logits"
            host: list[Host] = []
            batch: list[Any] = []
            # verl's fused kernels cannot read an untied head, since FSDP2 shards it separately.
            path = write_model(Path(folder, f"tied-{fused}"), size, device, tied=fused)
            setup = fsdp_setup(path, strategy, device, fused=fused)

            def start(row: EngineRow, setup: Any = setup, host: list[Host] = host, batch: list[Any] = batch) -> None:
                batch[:] = [sampled(make_batch(size), setup.model_path, device)]
                host.append(FsdpHost(device, setup))
                row.facts["engine"] = type(host[0].engine).__name__

            run_case(report, strategy, f"{kind}: engine", clock, start)
            if host:
                cases(host[0], setup, batch[0], size, kind, clock, report)
            host.clear()
            release(device)


def fsdp_setup(path: str, strategy: str, device: str, *, fused: bool = False) -> Any:
    """The settings of an FSDP engine."""
    from tests.distributed.fsdp_scenarios import Setup

    return Setup(
        path,
        None,
        strategy=strategy,
        use_fused_kernels=fused,
        micro_batch_size=8,
        max_token_len=1 << 20,
        param_dtype="bf16" if device == "cuda" else "fp32",
        temperature=1.0,
        lr=1e-6,
    )


def model(device: str, size: Size, clock: Clock, report: Report) -> None:
    """Measure the cost of a step with one model."""

    def case(row: EngineRow) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = write_model(Path(folder), size, device, tied=True)
            setup = fsdp_setup(path, "fsdp2", device)
            host = FsdpHost(device, setup)
        row.facts["parameters"] = sum(parameter.numel() for parameter in host.parameters())
        cost(host, setup, make_batch(size, timed=True), size.repeat, row)

    run_case(report, "model", "cost of a step", clock, case)


def megatron(device: str, size: Size, clock: Clock, report: Report) -> None:
    """Run the cases of the Megatron engine, with separate engines for packed and padded."""
    from tests.distributed.megatron_stock import Layout
    from tests.distributed.megatron_stock import write_model as write

    with tempfile.TemporaryDirectory() as folder:
        # Writes the tokenizer, which verl requires.
        write(Path(folder))
        path = write_model(Path(folder), size, device, tied=False)
        for packed in (True, False):
            kind = "packed" if packed else "padded"
            host: list[Host] = []
            batch: list[Any] = []
            layout = Layout(path, use_remove_padding=packed, micro_batch_size=8, lr=1e-6, temperature=1.0)

            def start(row: EngineRow, layout: Any = layout, host: list[Host] = host, batch: list[Any] = batch) -> None:
                batch[:] = [sampled(make_batch(size), layout.model_path, device)]
                host.append(MegatronHost(device, layout))
                row.facts["engine"] = type(host[0].engine).__name__

            run_case(report, "megatron", f"{kind}: engine", clock, start)
            if host:
                cases(host[0], layout, batch[0], size, kind, clock, report)
            host.clear()
            release(device)


def cases(host: Host, setup: Any, batch: Any, size: Size, kind: str, clock: Clock, report: Report) -> None:
    """Run comparisons on a small batch and a measurement on a large one, the most informative first."""
    part = getattr(setup, "strategy", "megatron")
    packings = [setup.use_remove_padding] if part == "megatron" else [True, False]
    for number, packed in enumerate(packings):
        for temperature in (1.0, 0.8):
            chosen = dataclasses.replace(setup, use_remove_padding=packed, temperature=temperature)
            for support in SUPPORTS:
                name = f"{kind}: {support}, temperature {temperature}, {'packed' if packed else 'padded'}"
                case = functools.partial(agreement, host, chosen, {"support": support}, batch)
                run_case(report, part, name, clock, case)
        if number == 0:
            timed = make_batch(size, timed=True)
            case = functools.partial(
                cost, host, dataclasses.replace(setup, use_remove_padding=packed), timed, size.repeat
            )
            run_case(report, part, f"{kind}: cost of a step", clock, case)


def release(device: str) -> None:
    """Free an engine's memory before the next one is built."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def engine_part(part: str, options: argparse.Namespace, report: Report) -> None:
    """Run one engine part in this process."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    if part == "fsdp" and options.device == "cpu":
        report(EngineRow(part, "all", skipped=True, reason="FSDP1 needs an accelerator"))
        return
    import torch.distributed as dist

    import verl_troll.plugin  # noqa: F401
    from tests.device import backend

    with tempfile.TemporaryDirectory() as folder:
        if options.device == "cuda":
            torch.cuda.set_device(0)
        store = dist.FileStore(str(Path(folder, "store")), 1)
        dist.init_process_group(backend(options.device), store=store, rank=0, world_size=1)
        # Wait until the parts before this one are done; the line holds the time left.
        clock = Clock(float(sys.stdin.readline() if options.wait else options.seconds))
        size = SIZES["tiny" if options.tiny else "full"]
        if part == "megatron":
            megatron(options.device, size, clock, report)
        elif part == "model":
            model(options.device, size if options.tiny else SIZES["model"], clock, report)
        else:
            fsdp(part, options.device, size, clock, report)
