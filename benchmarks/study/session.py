"""A process that keeps Ray and verl running and trains one run after another: ``python -m benchmarks.study.session``.

It reads one line of JSON per run from standard input, ``{"cell": ..., "tasks": FOLDER, "metrics": PATH}``, and answers
with one line on standard output, ``{"seconds": ...}`` or ``{"error": ...}``. It exits after an error, since the state
of its processes is then unknown. All other output goes to standard error.
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


def configuration(cell: Cell, tasks: Path) -> Any:
    """verl's configuration of a run, composed and validated as in verl's entry point."""
    from hydra import compose, initialize_config_module
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config
    from verl.utils.device import auto_set_device

    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=cell.overrides(tasks))
    auto_set_device(config)
    validate_config(config=config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    return config


def start(config: Any) -> Any:
    """Start Ray and verl's processes, and wait until they are ready."""
    import ray
    from omegaconf import OmegaConf
    from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

    from benchmarks.study.trainer import StudyRunner

    environment = get_ppo_ray_runtime_env(config)
    environment.setdefault("env_vars", {})["TRANSFER_QUEUE_ENABLE"] = "1"
    chosen = OmegaConf.to_container(config.ray_kwargs.ray_init, resolve=True)
    ray.init(**{**chosen, "runtime_env": environment})
    runner = StudyRunner.remote(config)  # type: ignore[attr-defined]
    ray.get(runner.__ray_ready__.remote())
    return runner


def main() -> int:
    """Train the runs given on standard input."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    runner: Any = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            config = configuration(Cell.from_json(order["cell"]), Path(order["tasks"]))
            if runner is None:
                runner = start(config)
            import ray

            begin = time.monotonic()
            ray.get(runner.run.remote(config, order["metrics"]))
            answer: dict[str, Any] = {"seconds": round(time.monotonic() - begin, 2)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)
        if "error" in answer:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
