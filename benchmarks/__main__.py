"""Measure what TROLL costs compared with verl's clipping, on the same inputs, in one run.

    python -m benchmarks [--quick | --full] [--only NAME ...] [--json FILE] [--markdown]

``old_pass`` reads the old policy, ``update`` goes from the new policy's logits to the loss and back, ``head`` does so
from the hidden states, ``solver`` finds only the step size, ``carried`` counts the bytes between the passes. Methods
alternate, so a busy machine slows all of them equally. By default one axis varies at a time, the others stay at their
first value; this takes up to an hour on two cores. ``--full`` runs all combinations. Cases that do not fit into free
memory are reported as skipped.

Extra memory is the peak allocation above the inputs. A floor is the bytes that must move divided by the bandwidth, or
the operations divided by the matrix-product rate, both measured in the same turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

NAMES = ("old_pass", "update", "solver", "carried", "head")
AXES = ("vocab", "tokens", "k", "dtype", "ranks", "response_share", "hidden")
# The first value of each axis is its default.
DEFAULT = {
    "vocab": [151_936, 32_000, 128_256, 256_000],
    "tokens": [1024, 256, 4096, 32_768],
    "k": [64, 16, 256],
    "dtype": ["float32", "bfloat16"],
    "ranks": [1, 2, 4],
    "response_share": [1.0, 0.5],
    "hidden": [896, 2048],
}
QUICK = {
    "vocab": [151_936],
    "tokens": [256],
    "k": [64],
    "dtype": ["float32", "bfloat16"],
    "ranks": [1, 2],
    "response_share": [1.0],
    "hidden": [896],
}
# For the head, whose matrix products would dominate the run time.
DEFAULT_HEAD = {"vocab": [151_936, 32_000], "tokens": [512, 2048], "k": [64]}
QUICK_HEAD = {"vocab": [32_000]}
HEAD_REPEAT = 3
# The fused head only; the bytes of the unfused one are computed.
FUSED_ALONE = {"vocab": 32_000, "tokens": 32_768}


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="a few small cases, under five minutes on two cores")
    extent.add_argument("--full", action="store_true", help="all combinations of the axes")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one object per row")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeat", type=int, help="number of timed turns (5; --quick 3; head at most 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="total over all ranks")
    axes = parser.add_argument_group("axes", "the first value is the default while other axes vary")
    axes.add_argument("--vocab", type=int, nargs="+")
    axes.add_argument("--tokens", type=int, nargs="+")
    axes.add_argument("--k", type=int, nargs="+")
    axes.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"))
    axes.add_argument("--ranks", type=int, nargs="+", help="ranks that share the vocabulary, on the host")
    axes.add_argument("--response-share", type=float, nargs="+", help="share of response tokens")
    axes.add_argument("--hidden", type=int, nargs="+", help="width of the hidden states, for head")
    options = parser.parse_args(given)
    head = QUICK_HEAD if options.quick else DEFAULT_HEAD
    options.head = {axis: values for axis, values in head.items() if getattr(options, axis) is None}
    for axis, default in (QUICK if options.quick else DEFAULT).items():
        if getattr(options, axis) is None:
            setattr(options, axis, default)
    if options.device == "cuda":
        options.ranks = [1]
    if options.repeat is None:
        options.repeat = 3 if options.quick else 5
    if options.repeat < 1:
        parser.error(f"--repeat must be at least 1, got {options.repeat}")
    return options


def cases(options: argparse.Namespace, name: str, axes: Sequence[str]) -> Iterator[Any]:
    """The cases of a measurement over these axes."""
    from benchmarks.rows import Case

    values = {axis: getattr(options, axis) for axis in AXES} | (options.head if name == "head" else {})
    centre = Case(device=options.device, **{axis: values[axis][0] for axis in AXES})
    if options.full:
        for chosen in itertools.product(*(values[axis] for axis in axes)):
            yield dataclasses.replace(centre, **dict(zip(axes, chosen, strict=True)))
        return
    yield centre
    for axis in axes:
        for value in values[axis][1:]:
            yield dataclasses.replace(centre, **{axis: value})


def measure(options: argparse.Namespace, report: Callable[[str], None]) -> list[Any]:
    """Measure all rows."""
    from benchmarks import carried, head, old_pass, ranks, solver, update
    from benchmarks.measure import free_memory
    from benchmarks.rows import Case, Row, parameters
    from benchmarks.table import describe

    modules: dict[str, Any] = {module.NAME: module for module in (old_pass, update, solver, carried, head)}

    def too_large(name: str, case: Case, needed: int) -> Row | None:
        free = free_memory(case.device)
        if needed <= 0.9 * free:
            return None
        reason = f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        return Row(name, "all", parameters(case, *modules[name].AXES, "device"), skipped=reason)

    rows: list[Row] = []
    sharded: dict[int, list[tuple[str, Case]]] = {}
    for name in options.only:
        module = modules[name]
        for case in cases(options, name, module.AXES):
            skipped = too_large(name, case, module.needed_bytes(case))
            if skipped is not None:
                rows.append(skipped)
            elif case.ranks > 1 and name in ranks.SHARDED:
                sharded.setdefault(case.ranks, []).append((name, case))
            else:
                begin = time.perf_counter()
                repeat = min(options.repeat, HEAD_REPEAT) if name == head.NAME else options.repeat
                rows += module.run(dataclasses.replace(case, ranks=1), repeat)
                report(f"{name}: {describe(parameters(case, *module.AXES))}: {time.perf_counter() - begin:.0f} s")
    for count, jobs in sharded.items():
        begin = time.perf_counter()
        for found in ranks.run_on_ranks(jobs, count, options.repeat, options.threads):
            rows += found
        report(f"{count} ranks: {time.perf_counter() - begin:.0f} s")
    if head.NAME in options.only and not options.quick:
        case = Case(
            device=options.device, dtype=options.dtype[0], k=options.k[0], hidden=options.hidden[0], **FUSED_ALONE
        )
        skipped = too_large(head.NAME, case, head.fused_bytes(case))
        rows += [skipped] if skipped is not None else head.run_fused_alone(case)
    return sorted(rows, key=lambda row: NAMES.index(row.measurement))


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print the tables and the targets, write the JSON."""
    options = arguments(given)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if options.device == "cpu":
        os.environ.setdefault("VERL_PLATFORM", "cpu")
        os.environ.setdefault("VERL_USE_EXTERNAL_MODULES", "verl_troll.cpu")
    # Hide notices about missing optional libraries of verl and Megatron, also in the rank processes.
    warnings.filterwarnings("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("VERL_LOGGING_LEVEL", "ERROR")
    import torch

    from benchmarks import table, targets
    from benchmarks.measure import machine

    torch.set_num_threads(options.threads)
    # Keep the collection before each turn from scanning all imported objects.
    gc.freeze()
    facts = machine(options.device)
    if facts["load"] > 0.5 * facts["cores"]:
        print(f"other processes run (load {facts['load']}): times will spread", file=sys.stderr)
    rows = measure(options, lambda text: print(text, file=sys.stderr, flush=True))
    print(", ".join(f"{name} {value}" for name, value in facts.items()), end="\n\n")
    print(table.render(rows, options.markdown), end="\n\n")
    judged = targets.judge(rows)
    print("## Targets" if options.markdown else "Targets", end="\n\n")
    print(table.grid(targets.COLUMNS, [target.cells() for target in judged], options.markdown))
    if options.json is not None:
        content = {
            "rows": [row.as_dict(facts) for row in rows],
            "targets": [{**dataclasses.asdict(target), "verdict": target.verdict} for target in judged],
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
