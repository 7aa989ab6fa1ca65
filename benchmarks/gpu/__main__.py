"""Check the kernels on a GPU and time them against vanilla's, with only torch, Triton, NumPy and jaxtyping.

    python -m benchmarks.gpu --out FOLDER [--seconds 420] [--engines]
    TRITON_INTERPRET=1 python -m benchmarks.gpu --out FOLDER --device cpu --tiny    # a dry run

Writes ``gpu.json`` after every row and ``gpu.md`` at the end; exits with 1 if a check failed. flash-attention's
cross-entropy and verl's fused head are timed as well where they are installed. ``--engines`` continues with verl's
own engines and trainer (``python -m benchmarks.gpu.engines``); ``benchmarks/gpu/pack.sh`` packs what they need for a
machine without a network.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import checks, times
from benchmarks.gpu.session import TINY, Session, Sizes
from verl_troll.core import kernels

# Each target: name, row, row to divide by, maximum ratio.
TARGETS = (
    ("update, anchored, over flash-attention's cross-entropy", "update, TROLL anchored", times.FLASH, 1.00),
    ("update, union, over flash-attention's cross-entropy", "update, TROLL union", times.FLASH, 1.10),
    ("old pass with entropy over vanilla's", times.OLD, times.FLASH_OLD, 1.00),
    ("old pass with entropy over one copy of the logits", times.OLD, times.COPY, 1.00),
)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=420, help="no further row is begun after so many (420)")
    parser.add_argument("--only", nargs="+", choices=("checks", "times"), default=["checks", "times"])
    parser.add_argument("--engines", action="store_true", help="verl's engines and trainer as well")
    parser.add_argument("--engine-seconds", type=float, default=300, help="for these (300)")
    parser.add_argument("--tiny", action="store_true", help="inputs that the interpreter can read")
    options = parser.parse_args(given)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU: for a dry run set TRITON_INTERPRET=1 and write --device cpu --tiny")
    if options.device == "cpu" and not (options.tiny and kernels.available(torch.device("cpu"))):
        parser.error("--device cpu is a dry run: it needs --tiny, and TRITON_INTERPRET=1 in the environment")
    return options


def facts(device: str) -> dict[str, Any]:
    """The machine and package versions."""
    import triton

    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        found["multiprocessors"] = properties.multi_processor_count
    return found


def table(session: Session) -> str:
    """Facts, checks, times and targets in Markdown."""
    lines = [", ".join(f"{name} {value}" for name, value in session.facts.items()), "", "| check | |", "| --- | --- |"]
    for name, found in session.checks.items():
        text = ", ".join(f"{key} {value:.3g}" for key, value in found.items()) if isinstance(found, dict) else found
        lines.append(f"| {name} | {text} |")
    lines += ["", "| | ms | quartiles | host, ms | MiB above |", "| --- | --- | --- | --- | --- |"]
    for name, row in session.times.items():
        lines.append(
            f"| {name} | {row['ms']:.3f} | {row['low']:.3f} to {row['high']:.3f} | {row['host_ms']:.2f} | "
            f"{row['extra_mib']:.0f} |"
        )
    lines += ["", "| target | at most | measured |", "| --- | --- | --- |"]
    for dtype in ("bfloat16", "float32"):
        for name, own, base, limit in TARGETS:
            ratio = session.ratio(f"{dtype}, {own}", f"{dtype}, {base}")
            lines.append(f"| {name}, {dtype} | {limit:.2f} | {'not measured' if ratio is None else f'{ratio:.2f}'} |")
    if session.skipped:
        lines += ["", "Not begun in time: " + "; ".join(session.skipped) + "."]
    return "\n".join(lines) + "\n"


def main(given: Sequence[str] | None = None) -> int:
    """Check, time, and write the results."""
    options = arguments(given)
    if options.tiny and options.device == "cpu":
        from verl_troll.core.kernels import logits_triton as form

        form.READ_TILE_BYTES = form.WRITE_COLUMNS = 2048
    session = Session(options.device, options.out, options.seconds, TINY if options.tiny else Sizes())
    session.facts |= facts(options.device)
    print(session.facts, flush=True)
    if "checks" in options.only:
        checks.run(session)
    if "times" in options.only:
        times.run(session)
    session.facts["seconds"] = round(session.elapsed())
    session.write()
    text = table(session)
    (options.out / "gpu.md").write_text(text)
    print("\n" + text)
    if session.failed:
        print("FAILED: " + "; ".join(session.failed), file=sys.stderr)
    engines = 0
    if options.engines:
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu.engines",
            "--device",
            options.device,
            "--out",
            str(options.out),
        ]
        command += ["--seconds", str(options.engine_seconds), *(["--tiny"] if options.tiny else [])]
        engines = subprocess.run(command, check=False).returncode
    return 1 if session.failed or engines else 0


if __name__ == "__main__":
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    sys.exit(main())
