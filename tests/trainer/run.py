"""Start verl's real trainer on tiny assets and read back what it logged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.processes import HungError, Tree
from benchmarks.study.tasks.quickstart import quickstart
from tests.device import DEVICE
from tests.device import environment as platform_variables

ROOT = Path(__file__).resolve().parents[2]
PROBE_MODULE = "tests.trainer.probe_loader"
METRICS = "metrics.jsonl"
# verl's trainer with a rollout on a device of its own and two updates per weight transfer.
SEPARATE_ASYNC = (
    "trainer.v1.trainer_mode=separate_async",
    "trainer.v1.separate_async.parameter_sync_step=2",
    "actor_rollout_ref.rollout.nnodes=1",
    "actor_rollout_ref.rollout.n_gpus_per_node=1",
    "actor_rollout_ref.rollout.checkpoint_engine.backend=ray_object_store",
    "actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=verl_troll.cpu.checkpoint_engine",
    "ray_kwargs.ray_init.num_gpus=2",
)
ASYNCHRONOUS = {
    "colocated, tool loop": (
        "trainer.v1.trainer_mode=colocate_async",
        "actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent",
    ),
    "separate": SEPARATE_ASYNC,
}


def make_assets(folder: Path, hidden_size: int = 32) -> None:
    """A random Qwen2 model with peaked outputs, its tokenizer, and prompts; four heads share ``hidden_size``."""
    from tests.tiny_model import tiny_qwen2

    tokenizer = quickstart("prepare").make_tokenizer()
    model = tiny_qwen2(len(tokenizer), pad=tokenizer.pad_token_id, end=tokenizer.eos_token_id, hidden_size=hidden_size)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {
            "data_source": "even-characters",
            "prompt": [{"role": "user", "content": "say" + " please" * (index % 3)}],
            "ability": "form",
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {"index": index},
        }
        for index in range(32)
    ]
    pd.DataFrame(rows).to_parquet(folder / "train.parquet")
    pd.DataFrame(rows[:8]).to_parquet(folder / "val.parquet")


def run_trainer(
    assets: Path,
    out: Path,
    overrides: list[str],
    *,
    ranks: int = 1,
    probe: bool = False,
    limit: float | None = None,
    group: str = "default",
    device: str = DEVICE,
    module: str = "verl.trainer.main_ppo",
) -> list[dict[str, Any]]:
    """Run a trainer of verl and return one row of metrics per logged step (``step`` among the keys).

    Args:
        limit: maximum run time in seconds; by default unlimited while the run makes progress.
        group: a configuration group; ``cpu`` by default, unless the device is another.
        device: as in :mod:`tests.device`.
        module: the trainer's, for ``python -m``.

    Raises:
        AssertionError: the trainer failed or hung; the message ends with its log.
    """
    command, environment = trainer(
        assets, out, overrides, ranks=ranks, probe=probe, group=group, device=device, module=module
    )
    log, metrics = out / "trainer.log", out / METRICS
    ended = ""
    with log.open("w") as file, Tree(command, cwd=out, env=environment, stdout=file, stderr=subprocess.STDOUT) as tree:
        try:
            if (code := tree.wait((log, metrics), limit=limit)) != 0:
                ended = f"ended with {code}"
        except HungError as error:
            ended = f"hung: {error}"
    assert not ended, f"the trainer {ended}:\n{log.read_text(errors='replace')[-6000:]}"
    return metric_rows(out)


def trainer(
    assets: Path,
    out: Path,
    overrides: list[str],
    *,
    ranks: int = 1,
    probe: bool = False,
    group: str = "default",
    device: str = DEVICE,
    module: str = "verl.trainer.main_ppo",
) -> tuple[list[str], dict[str, str]]:
    """The command that :func:`run_trainer` runs in ``out``, which is made, and its environment."""
    out.mkdir(parents=True, exist_ok=True)
    verls = platform_variables(device)
    if probe:
        verls["VERL_USE_EXTERNAL_MODULES"] += f",{PROBE_MODULE}"
    environment = {
        **os.environ,
        **verls,
        "VERL_FILE_LOGGER_PATH": str(out / METRICS),
        "TROLL_TEST_PROBE": str(out),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "HYDRA_FULL_ERROR": "1",
        "RAY_DEDUP_LOGS": "0",
        # A dozen processes share the cores.
        "OMP_NUM_THREADS": "1",
        "TQ_NUM_THREADS": "1",
    }
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    command = [
        sys.executable,
        "-m",
        module,
        f"hydra.run.dir={out}/hydra",
        f"+cpu={group}" if device == "cpu" else "+embedded=default",
        "algorithm.adv_estimator=grpo",
        f"data.train_files={assets}/train.parquet",
        f"data.val_files={assets}/val.parquet",
        "data.train_batch_size=8",
        "data.max_prompt_length=24",
        "data.max_response_length=10",
        f"actor_rollout_ref.model.path={assets}/model",
        f"{actor}.ppo_mini_batch_size=4",
        f"{actor}.ppo_micro_batch_size_per_gpu=4",
        f"{actor}.optim.lr=5e-3",
        f"{rollout}.n=4",
        f"{rollout}.log_prob_micro_batch_size_per_gpu=8",
        f"reward.custom_reward_function.path={ROOT}/tests/trainer/reward.py",
        f"trainer.n_gpus_per_node={ranks}",
        "trainer.logger=[console,file]",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        "trainer.resume_mode=disable",
        f"trainer.default_local_dir={out}/checkpoints",
        *overrides,
    ]
    return command, environment


def metric_rows(out: Path) -> list[dict[str, Any]]:
    """One row of metrics per step logged so far."""
    rows = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    return [{"step": row["step"], **row["data"]} for row in rows]


def probe_lines(out: Path) -> list[dict[str, Any]]:
    """What :mod:`tests.trainer.probe` recorded, over all workers."""
    return [json.loads(line) for path in sorted(out.glob("probe-*.jsonl")) for line in path.read_text().splitlines()]
