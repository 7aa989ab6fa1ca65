"""Attack the product and print what was tried, what held and what fell.

    python -m benchmarks.attack [--only NAME ...] [--scale S] [--seed N] [--device cuda] [--markdown] [--list]

Exits with 1 if something fell. Attacks that cannot run on this machine are listed with the reason.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.attack.attack import Attack, Extent, Outcome

MODULES: tuple[str, ...] = ("kernels", "support", "rewards", "report", "launchers", "cluster")
"""Modules of this package; each has ``ATTACKS``."""


def attacks() -> dict[str, Attack]:
    """Every attack by its name."""
    found = [attack for module in MODULES for attack in importlib.import_module(f"benchmarks.attack.{module}").ATTACKS]
    return {attack.name: attack for attack in found}


def main(given: Sequence[str] | None = None) -> int:
    """Run the attacks; the exit status."""
    known = attacks()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=known, default=list(known), metavar="NAME", help=", ".join(known))
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of tries")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table at the end")
    parser.add_argument("--list", action="store_true", help="say what each attack tries, and stop")
    options = parser.parse_args(given)
    if options.list:
        for attack in known.values():
            print(f"{attack.name:24} {attack.promise}")
        return 0

    rows: list[tuple[Attack, Outcome]] = []
    for name in options.only:
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="attack-") as folder:
            outcome = known[name].run(Extent(Path(folder), options.scale, options.seed, torch.device(options.device)))
        rows.append((known[name], outcome))
        print(f"{name:24} {describe(outcome)}  ({time.monotonic() - start:.0f} s)", flush=True)
        for example in outcome.examples:
            print(f"    {example}", flush=True)
    if options.markdown:
        print(table(rows))
    return int(any(outcome.fell for _, outcome in rows))


def describe(outcome: Outcome) -> str:
    """One line."""
    if outcome.skipped:
        return f"not tried: {outcome.skipped}"
    return f"tried {outcome.tried:,}, held {outcome.tried - outcome.fell:,}, fell {outcome.fell:,}"


def table(rows: Sequence[tuple[Attack, Outcome]]) -> str:
    """The Markdown table of docs/reliability.md."""
    lines = ["| attack | what must hold | tried | held | fell |", "| --- | --- | ---: | ---: | ---: |"]
    for attack, outcome in rows:
        counts = (outcome.tried, outcome.tried - outcome.fell, outcome.fell)
        cells = [f"not tried: {outcome.skipped}", "", ""] if outcome.skipped else [f"{count:,}" for count in counts]
        lines.append("| " + " | ".join([f"`{attack.name}`", attack.promise, *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
