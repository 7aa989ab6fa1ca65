"""Train on the quickstart's task with verl's trainer; print one line per step, then a summary and a plot."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import answers
import plot
import psutil

from verl_troll.tools import disk

HERE = Path(__file__).resolve().parent

PROMPTS = 16
SHOWN_PROBLEMS = 5
TROLL_GROUPS = {"actor": "default", "rollout": "rollout_support"}
TAIL_LINES = 40


@dataclass(frozen=True)
class Recipe:
    """What is trained with.

    Attributes:
        title: the model's name in the picture.
        samples: responses per prompt.
        mini_batches: optimizer steps per batch.
        rate: Adam's constant learning rate.
        prompt_length: tokens at most.
        response_length: tokens at most.
        test_every: steps between evaluations.
        test_samples: responses per held-out problem.
        threads: threads per process at most; a dozen processes share the cores, two of them take turns computing.
        settings: further overrides for verl.
    """

    title: str
    samples: int
    mini_batches: int
    rate: float
    prompt_length: int
    response_length: int
    test_every: int
    test_samples: int
    threads: int
    settings: tuple[str, ...]


_ACTOR = "actor_rollout_ref.actor"
RECIPES = {
    "smollm2": Recipe(
        title="SmolLM2-135M-Instruct",
        samples=4,
        mini_batches=4,
        rate=1e-5,
        prompt_length=32,
        response_length=12,
        test_every=4,
        test_samples=2,
        threads=8,
        settings=(
            "reward.custom_reward_function.path=pkg://verl_troll.tasks.rewards.reasoning_gym",
            # Logits of response tokens only.
            "actor_rollout_ref.model.use_fused_kernels=True",
            # MiB; the embeddings have 108 and are sent whole to vLLM.
            "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=128",
        ),
    ),
    # The rate is deliberately high for one batch: the policy leaves the trust region, and the projection acts.
    "tiny": Recipe(
        title="tiny model",
        samples=8,
        mini_batches=8,
        rate=3e-4,
        prompt_length=16,
        response_length=12,
        test_every=10,
        test_samples=1,
        threads=1,
        settings=(f"reward.custom_reward_function.path={HERE / 'reward.py'}",),
    ),
}


def overrides(args: argparse.Namespace) -> list[str]:
    """verl's command line for one run."""
    data: Path = args.data
    recipe = RECIPES[args.model]
    samples = PROMPTS * recipe.samples
    if args.megatron_tp:
        engine = [
            "+cpu=megatron",
            "model_engine=megatron",
            f"actor_rollout_ref.actor.megatron.tensor_model_parallel_size={args.megatron_tp}",
            f"trainer.n_gpus_per_node={args.megatron_tp}",
        ]
    else:
        engine = ["+cpu=default"]
    chosen = [
        *engine,
        *(["+cpu/rollout=vllm"] if args.rollout == "vllm" else []),
        *(
            [f"+troll={'rollout_support' if args.old_policy == 'rollout' else 'default'}"]
            if args.loss == "troll"
            else []
        ),
        f"hydra.run.dir={args.out / 'hydra'}",
        "algorithm.adv_estimator=grpo",
        f"data.train_files={data / 'train.parquet'}",
        f"data.val_files={data / 'held_out.parquet'}",
        f"data.train_batch_size={PROMPTS}",
        f"data.seed={args.seed}",
        f"data.max_prompt_length={recipe.prompt_length}",
        f"data.max_response_length={recipe.response_length}",
        f"actor_rollout_ref.model.path={data / 'model'}",
        "actor_rollout_ref.model.use_remove_padding=False",
        f"{_ACTOR}.optim.lr={recipe.rate}",
        f"{_ACTOR}.optim.weight_decay=0",
        f"{_ACTOR}.ppo_mini_batch_size={PROMPTS // recipe.mini_batches}",
        f"{_ACTOR}.ppo_micro_batch_size_per_gpu={samples // recipe.mini_batches}",
        f"actor_rollout_ref.rollout.n={recipe.samples}",
        f"actor_rollout_ref.rollout.seed={args.seed}",
        f"actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu={samples}",
        "actor_rollout_ref.rollout.calculate_log_probs=True",
        # Measure the trained policy itself: sampled at its own temperature, not greedily.
        f"actor_rollout_ref.rollout.val_kwargs.n={recipe.test_samples}",
        "actor_rollout_ref.rollout.val_kwargs.do_sample=True",
        "actor_rollout_ref.rollout.val_kwargs.temperature=1.0",
        "actor_rollout_ref.rollout.val_kwargs.top_p=1.0",
        *recipe.settings,
        "trainer.logger=[console,file]",
        "trainer.project_name=quickstart",
        f"trainer.experiment_name={args.model}-{args.loss}-seed{args.seed}",
        f"trainer.default_local_dir={args.out / 'checkpoints'}",
        f"trainer.validation_data_dir={args.out / 'answers'}",
        "trainer.val_before_train=True",
        f"trainer.test_freq={recipe.test_every}",
        "trainer.save_freq=-1",
        "trainer.resume_mode=disable",
        f"trainer.total_training_steps={args.steps}",
        "trainer.total_epochs=1000000",
    ]
    return [*chosen, *args.overrides]


def environment(metrics: Path, threads: int) -> dict[str, str]:
    """Environment of the trainer and all its processes."""
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {
        **kept,
        "VERL_PLATFORM": "cpu",
        "VERL_USE_EXTERNAL_MODULES": "verl_troll.cpu",
        "VERL_FILE_LOGGER_PATH": str(metrics),
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(threads),
        "TQ_NUM_THREADS": "1",
        # Size of vLLM's KV cache in GiB; the default is a share of the host's memory.
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def new_rows(stream: Any, rest: list[str]) -> Iterator[dict[str, Any]]:
    """Rows completed in a growing file since the last call; ``rest`` holds an unfinished line."""
    rest[0] += stream.read()
    *lines, rest[0] = rest[0].split("\n")
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            print("  a damaged line of the metrics, as a full disk leaves it", file=sys.stderr)
            continue
        yield {"step": row["step"], **row["data"]}


def show(row: dict[str, Any], steps: int, begin: float | None) -> None:
    """Print one line for one step."""
    step = row["step"]
    parts = [f"  step {step:>3}/{steps}"]
    if (reward := row.get(plot.REWARD)) is not None:
        parts.append(f"reward {reward:.2f}")
    if (share := row.get(plot.PROJECTED_SHARE)) is not None:
        parts.append(f"projected {share:6.2%}")
    success = plot.held_out_success(row)
    parts.append(f"held-out success {success:.2f}" if success is not None else " " * 21)
    if begin is not None and 0 < step < steps:
        left = (time.monotonic() - begin) / step * (steps - step)
        parts.append(f"{left / 60:.1f} min left" if left >= 90 else f"{left:.0f} s left")
    print("   ".join(parts).rstrip(), flush=True)


def follow(process: subprocess.Popen[bytes], metrics: Path, steps: int, disks: disk.Watch) -> None:
    """Print steps as they are logged, and watch the disks, until the trainer ends."""
    begin: float | None = None
    rest = [""]
    stream = None
    while True:
        ended = process.poll() is not None
        disks.look()
        if stream is None and metrics.exists():
            stream = metrics.open(encoding="utf-8", errors="replace")
        if stream is not None:
            for row in new_rows(stream, rest):
                if begin is None:
                    begin = time.monotonic()
                show(row, steps, begin)
        if ended:
            if stream is not None:
                stream.close()
            return
        time.sleep(0.2)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the trainer, letting it stop its Ray processes."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def places(args: argparse.Namespace) -> list[disk.Place]:
    """What the run writes."""
    chosen = [word.partition("=")[2] for word in args.overrides if word.startswith("trainer.default_local_dir=")]
    checkpoints = args.out / Path(chosen[-1] if chosen else "checkpoints")
    return [
        disk.Place("log, metrics and curves", args.out, "--out FOLDER"),
        disk.Place("checkpoints", checkpoints, "-- trainer.default_local_dir=FOLDER"),
    ]


def main() -> int:
    """Run the trainer and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder made by prepare.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of this run")
    parser.add_argument("--model", choices=RECIPES, required=True)
    parser.add_argument("--loss", choices=("troll", "vanilla"), required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--megatron-tp", type=int, help="train on verl's Megatron engine with this many ranks")
    parser.add_argument("--rollout", choices=("hf", "vllm"), default="hf", help="rollout engine")
    parser.add_argument("--old-policy", choices=TROLL_GROUPS, default="actor", help="what computes the old policy")
    parser.add_argument("overrides", nargs="*", help="further Hydra overrides for verl, after --")
    args = parser.parse_args()
    args.out, args.data = args.out.resolve(), args.data.resolve()
    disks = disk.Watch(places(args))
    try:
        status = run(args, disks)
    except OSError as error:
        print(f"\n{error}", file=sys.stderr)
        status = 1
    if status != 0 and (complaint := disks.complaint()):
        print(f"\n{complaint}", file=sys.stderr)
    return status


def run(args: argparse.Namespace, disks: disk.Watch) -> int:
    """Run the trainer with the options of :func:`main` and return its exit status."""
    args.out.mkdir(parents=True, exist_ok=True)
    metrics, log_path = args.out / "metrics.jsonl", args.out / "train.log"
    # What an earlier run left here would be taken for this one's.
    metrics.unlink(missing_ok=True)
    shutil.rmtree(args.out / "answers", ignore_errors=True)
    cores = min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)))
    threads = max(1, min(cores // (args.megatron_tp or 1), RECIPES[args.model].threads))
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *overrides(args)]
    print(f"  verl's own log: {log_path}\n  starting Ray and verl, up to a minute", flush=True)
    with log_path.open("wb") as log:
        log.write(f"{shlex.join(command)}\n".encode(errors="surrogateescape"))
        log.flush()
        process = subprocess.Popen(
            command,
            env=environment(metrics, threads),
            cwd=args.out,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            follow(process, metrics, args.steps, disks)
        finally:
            stop(process)
    if process.returncode != 0:
        tail = log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
        print(f"\nverl failed (exit status {process.returncode}). The end of {log_path}:", file=sys.stderr)
        print("\n".join(tail), file=sys.stderr)
        return process.returncode if process.returncode > 0 else 1
    rows = plot.read(metrics)
    picture = args.out / "curves.png"
    plot.draw(
        rows,
        picture,
        f"{RECIPES[args.model].title}, GRPO, {args.loss}, seed {args.seed}",
        plot.kl_bound(args.out / "hydra"),
    )
    print()
    print(plot.summary(rows))
    print(answers.before_and_after(args.out / "answers", args.data / "held_out.parquet", SHOWN_PROBLEMS))
    print(f"  metrics: {metrics}\n  curves:  {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
