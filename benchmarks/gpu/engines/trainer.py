"""The part that runs verl's trainer."""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import math
import tempfile
from pathlib import Path

from benchmarks.gpu.engines.rows import Clock, EngineRow, Report, run_case

STEPS = 3
SHOWN = (
    "timing_s/",
    "troll/",
    "training/rollout_",
    "perf/max_memory",
    "critic/score/mean",
    "actor/ppo_kl",
    "actor/grad_norm",
    "response_length/mean",
)
ACTOR = "actor_rollout_ref.actor"
RUNS = {
    "vanilla": [],
    "union": ["+troll=default", f"{ACTOR}.policy_loss.troll.support=union"],
    "anchored": ["+troll=default", f"{ACTOR}.policy_loss.troll.support=anchored"],
    "union, FSDP1": ["+troll=default", f"{ACTOR}.policy_loss.troll.support=union"],
}


def train(method: str, device: str, folder: Path, clock: Clock, row: EngineRow) -> None:
    """Run three steps of verl's trainer with one method and the embedded rollout on the device."""
    from tests.trainer.run import probe_lines, run_trainer

    troll = method != "vanilla"
    out = folder / method.replace(", ", "-")
    overrides = [
        *RUNS[method],
        f"{ACTOR}.strategy={'fsdp' if 'FSDP1' in method else 'fsdp2'}",
        f"{ACTOR}.fsdp_config.use_torch_compile=false",
        # Low, since a task that is learned at once leaves no gradient.
        f"{ACTOR}.optim.lr=1e-5",
        "actor_rollout_ref.rollout.calculate_log_probs=True",
        "+ray_kwargs.ray_init.object_store_memory=1000000000",
        f"trainer.total_training_steps={STEPS}",
    ]
    rows = run_trainer(folder / "assets", out, overrides, probe=troll, limit=max(5.0, clock.left), device=device)
    row.check("steps that are missing", float([one["step"] for one in rows] != list(range(1, STEPS + 1))), 0)
    for number, one in enumerate(rows, start=1):
        row.facts[f"step {number}"] = {
            name: round(float(value), 5)
            for name, value in one.items()
            # verl writes NaN as null.
            if value is not None and name.startswith(SHOWN)
        }
        finite = one["actor/grad_norm"] is not None and math.isfinite(one["actor/grad_norm"])
        row.check(f"gradient is not a number, step {number}", float(not finite), 0)
        difference = one.get("training/rollout_probs_diff_mean", float("nan"))
        # Fails if the rollout did not receive the previous step's weights.
        row.check(f"rollout's probabilities from the actor's, step {number}", difference, 0.02)
    if troll:
        row.check("KL after projection", max(one["troll/kl_after_max"] for one in rows), 0.05 * (1 + 1e-5))
        row.check("tokens that did not converge", max(one["troll/unconverged"] for one in rows), 0)
        lines = probe_lines(out)
        row.facts["kernels"] = sorted({bool(line["kernels"]) for line in lines})
        row.check("passes without the kernels", float(device == "cuda" and row.facts["kernels"] != [True]), 0)
        sent = [sorted(line["digest"] for line in lines if line["pass"] == kind) for kind in ("old", "update")]
        row.check("supports that changed on the way", float(sent[0] != sent[1] or not sent[0]), 0)


def trainer_part(options: argparse.Namespace, jobs: int, clock: Clock, report: Report) -> None:
    """Run all methods, ``jobs`` at a time."""
    from tests.trainer.run import make_assets

    chosen = [name for name in RUNS if name in options.methods and (options.device != "cpu" or "FSDP1" not in name)]
    with tempfile.TemporaryDirectory() as name, concurrent.futures.ThreadPoolExecutor(jobs) as threads:
        folder = Path(name)
        (folder / "assets").mkdir()
        make_assets(folder / "assets", hidden_size=32 if options.tiny else 256)
        for method in chosen:
            case = functools.partial(train, method, options.device, folder, clock)
            threads.submit(run_case, report, "trainer", method, clock, case)
