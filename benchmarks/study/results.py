"""The study's results: one line of JSON per run, appended when it ends.

The format is that of collected runs (``docs/report.md``), which ``verl-troll report`` reads; ``run`` also holds the
cell. A curve is null at the steps without a value: evaluations are every few steps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.study import names
from benchmarks.study.cells import PROBED_K, Cell
from verl_troll.tools.report.read import read_runs
from verl_troll.tools.report.statistics import diverged

FILE = Path(__file__).with_name("results.jsonl")

Record = dict[str, Any]
Results = Mapping[str, Record]

KL_BOUND = 0.05
"""TROLL's default, in nats."""

KEPT = (
    "critic/score/mean",
    "actor/entropy",
    "actor/grad_norm",
    "actor/ppo_kl",
    "actor/pg_clipfrac",
    "response_length/mean",
    names.DISTINCT,
    names.GREEDY,
    "training/off_policy/trajectory_staleness/mean",
    "timing_s/step",
    "timing_s/old_log_prob",
    "timing_s/update_actor",
    "troll/kl_before",
    "troll/kl_before_max",
    "troll/kl_after",
    "troll/kl_after_max",
    "troll/projected_share",
    "troll/fixed_share",
    "troll/support_size",
    "troll/old_kept_mass",
    "troll/new_kept_mass",
    "troll/cap_hit_share",
    "troll/unconverged",
    *names.probed(PROBED_K),
)
"""Curves to keep, besides held-out success."""


def held_out_key(task: str) -> str:
    """verl's name for held-out success, a share."""
    return f"val-core/{task}/reward/mean@1"


def curves(task: str, metrics: Path) -> dict[str, list[float | None]]:
    """Curves of a run from verl's file log, rounded to five digits except success, which rules compare exactly."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    found: dict[str, list[float | None]] = {"step": [row["step"] for row in rows]}
    success, of_reward_loop = held_out_key(task), f"val-core/{task}/acc/mean@1"
    for row in rows:
        # As verl names it where its own reward loop scored the samples.
        if of_reward_loop in row["data"]:
            row["data"][success] = row["data"][of_reward_loop]
    for name in (success, *KEPT):
        if any(name in row["data"] for row in rows):
            values = [row["data"].get(name) for row in rows]
            found[name] = values if name == success else [_rounded(value) for value in values]
    return found


def _rounded(value: float | None) -> float | None:
    # verl's logger writes non-finite values as null; the status marks such a run as diverged.
    return None if value is None else float(f"{value:.5g}")


def status(metrics: Path) -> str:
    """``diverged`` by the rule of ``verl-troll report``, else ``finished``."""
    (run,) = read_runs([metrics])
    return "diverged" if diverged(run) else "finished"


def record(cell: Cell, metrics: Path, seconds: float, device: str = "cpu") -> Record:
    """The line of a completed run, with the device's name where it was not the CPU."""
    run = {
        "key": cell.key,
        "task": cell.task,
        "arm": cell.loss,
        "estimator": cell.estimator,
        "section": f"{cell.estimator}, {cell.regime}",
        "lr": cell.lr,
        "seed": cell.seed,
        "status": status(metrics),
        "seconds": seconds,
        **({} if device == "cpu" else {"device": device}),
        "settings": _settings(cell),
        "cell": cell.to_json(),
    }
    return {"run": run, "metrics": curves(cell.task, metrics)}


def _settings(cell: Cell) -> dict[str, str | float]:
    # The report draws the bound, so record it.
    bound: dict[str, str | float] = {"kl_bound": KL_BOUND} if cell.uses_troll else {}
    changed = dict(setting.removeprefix("troll.").split("=", 1) for setting in cell.settings)
    return {**bound, **{name: _number(value) for name, value in changed.items()}}


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def read(file: Path = FILE) -> dict[str, Record]:
    """Completed runs by :attr:`Cell.key`, without a truncated last line."""
    if not file.exists():
        return {}
    lines = file.read_text(encoding="utf-8").split("\n")
    records = [json.loads(line) for line in lines[:-1]]
    return {line["run"]["key"]: line for line in records}


def append(line: Record, file: Path = FILE) -> None:
    """Append a line, as atomically as the file system allows, after removing a truncated last line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+b") as stream:
        size = stream.seek(0, os.SEEK_END)
        if size:
            stream.seek(size - 1)
            if stream.read(1) != b"\n":
                stream.seek(0)
                whole = stream.read().rfind(b"\n") + 1
                stream.truncate(whole)
        stream.write(json.dumps(line, separators=(",", ":"), allow_nan=False).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def held_out(line: Record) -> list[float]:
    """Held-out success at each evaluation; the first is before training."""
    values = line["metrics"][held_out_key(line["run"]["task"])]
    return [value for value in values if value is not None]


def final_success(line: Record) -> float:
    """Mean held-out success of the last two evaluations."""
    return sum(held_out(line)[-2:]) / 2
