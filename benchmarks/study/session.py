"""A process that keeps Ray and verl running and trains one run after another: ``python -m benchmarks.study.session``.

It reads one line of JSON per run from standard input, ``{"cell": ..., "tasks": FOLDER, "metrics": PATH, "device":
...}``, and answers with one line on standard output, ``{"seconds": ..., "device": ...}`` or ``{"error": ...}``. It
exits after an error, since the state of its processes is then unknown. All other output goes to standard error. Runs of
verl's asynchronous trainer are its own task runner's, one per process.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.study.cells import Cell


def configuration(cell: Cell, tasks: Path, device: str) -> Any:
    """verl's configuration of a run, composed and validated as in verl's entry point."""
    from hydra import compose, initialize_config_module
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config
    from verl.utils.device import auto_set_device

    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=cell.overrides(tasks, device))
    auto_set_device(config)
    validate_config(config=config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    return config


def connect(config: Any, **variables: str) -> None:
    """Start Ray as verl's entry point does, with further environment variables for verl's processes."""
    import ray
    from omegaconf import OmegaConf
    from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

    environment = get_ppo_ray_runtime_env(config)
    environment.setdefault("env_vars", {}).update({"TRANSFER_QUEUE_ENABLE": "1", **variables})
    chosen = OmegaConf.to_container(config.ray_kwargs.ray_init, resolve=True)
    ray.init(**{**chosen, "runtime_env": environment})


def start(config: Any) -> Any:
    """Start Ray and verl's processes, and wait until they are ready."""
    import ray

    from benchmarks.study.trainer import StudyRunner

    connect(config)
    runner = StudyRunner.remote(config)  # type: ignore[attr-defined]
    ray.get(runner.__ray_ready__.remote())
    return runner


def train_asynchronously(config: Any, metrics: str) -> None:
    """Run verl's own task runner; its file logger writes one line per step to ``metrics``."""
    import ray
    from verl.trainer.main_ppo import TaskRunnerV1

    connect(config, VERL_FILE_LOGGER_PATH=metrics)
    ray.get(TaskRunnerV1.remote().run.remote(config))


def name(device: str) -> str:
    """The accelerator's name, or ``cpu``."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else device


def main() -> int:
    """Train the runs given on standard input."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    runner: Any = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            cell = Cell.from_json(order["cell"])
            config = configuration(cell, Path(order["tasks"]), order["device"])
            if runner is None and not cell.is_asynchronous:
                runner = start(config)
            import ray

            begin = time.monotonic()
            if cell.is_asynchronous:
                train_asynchronously(config, order["metrics"])
            else:
                ray.get(runner.run.remote(config, order["metrics"]))
            answer: dict[str, Any] = {"seconds": round(time.monotonic() - begin, 2), "device": name(order["device"])}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)
        if "error" in answer:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
