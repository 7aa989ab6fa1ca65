"""verl's own SGLang replica and the workers that update its weights, without the trainer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from hydra import compose, initialize_config_module
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.device import get_device_name
from verl.utils.distributed import initialize_global_process_group_ray
from verl.workers.config import HFModelConfig
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

ROLLOUT = "actor_rollout_ref.rollout"
ENGINE = f"{ROLLOUT}.engine_kwargs.sglang"
SHARING = "tests.sglang.cpu_sharing"
STOCK = f"actor_rollout_ref.model.external_lib={SHARING}"
TROLL = f"actor_rollout_ref.model.external_lib=[verl_troll.plugin,{SHARING}]"
SUPPORT = f"actor_rollout_ref.model.external_lib=[verl_troll.plugin,verl_troll.plugin.rollout,{SHARING}]"

# Settings for SGLang on a CPU, after `+cpu=default`.
ON_CPU = [
    f"{ROLLOUT}.name=sglang",
    f"{ROLLOUT}.enforce_eager=True",
    f"{ROLLOUT}.free_cache_engine=False",
    f"{ROLLOUT}.gpu_memory_utilization=0.1",
    f"{ROLLOUT}.max_num_seqs=64",
    f"{ROLLOUT}.load_format=dummy",
    f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes=16",
    *(
        f"++{ENGINE}.{setting}"
        for setting in (
            "device=cpu",
            "attention_backend=torch_native",
            "sampling_backend=pytorch",
            "grammar_backend=none",
            "enable_memory_saver=False",
            "disable_overlap_schedule=True",
            "max_total_tokens=4096",
            "random_seed=1",
        )
    ),
]


def configuration(model: Path, *overrides: str) -> Any:
    """verl's composed configuration for the replica."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose(
            "ppo_trainer",
            overrides=[
                "+cpu=default",
                *ON_CPU,
                f"actor_rollout_ref.model.path={model}",
                "data.max_prompt_length=16",
                "data.max_response_length=16",
                f"{ROLLOUT}.calculate_log_probs=True",
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
                *overrides,
            ],
        )


class WeightSender(Worker):
    """The training side: verl's adapter, sending the weights of a checkpoint."""

    def __init__(self, rollout: Any, model: Any) -> None:
        super().__init__()
        from verl.workers.rollout.sglang_rollout.sglang_rollout import ServerAdapter

        initialize_global_process_group_ray(timeout_second=None, backend="gloo")
        self.adapter = ServerAdapter(
            config=omega_conf_to_dataclass(rollout),
            model_config=omega_conf_to_dataclass(model, dataclass_type=HFModelConfig),
            device_mesh=None,
        )

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    async def send(self, folder: str, scale: float, step: int) -> None:
        """Send every matrix of the checkpoint, multiplied by ``scale``."""
        from safetensors.torch import load_file

        weights = load_file(Path(folder, "model.safetensors"))
        scaled = ((name, weight * scale if weight.dim() > 1 else weight) for name, weight in weights.items())
        await self.adapter.update_weights(scaled, global_steps=step)


class Served:
    """A running replica.

    Args:
        config: from :func:`configuration`.
        replica_class: verl's own, or the plugin's.
    """

    def __init__(self, config: Any, replica_class: type[RolloutReplica]) -> None:
        rollout, model = config.actor_rollout_ref.rollout, config.actor_rollout_ref.model
        self.pool = RayResourcePool([1], use_gpu=True, max_colocate_count=2)
        self.senders = RayWorkerGroup(
            resource_pool=self.pool,
            ray_cls_with_init=RayClassWithInitArgs(ray.remote(WeightSender), rollout=rollout, model=model),
            device_name=get_device_name(),
        )
        self.replica = replica_class(0, rollout, model, gpus_per_node=1)
        self.requests = 0
        try:
            asyncio.run(self.replica.init_hybrid(self.senders))
        except BaseException:
            self.close()
            raise

    def update(self, model: Path, scale: float = 1.0, step: int = 1) -> None:
        """verl's weight synchronisation through shared memory."""
        ray.get(self.senders.send(str(model), scale, step))

    def ask(self, prompt: list[int], **sampling: Any) -> Any:
        """Start one request."""
        self.requests += 1
        return self.replica.server_handle.generate.remote(
            prompt_ids=prompt,
            sampling_params={"temperature": 1.0, "top_p": 1.0, "top_k": -1, "logprobs": True, **sampling},
            request_id=f"request-{self.requests}",
        )

    def generate(self, prompts: Sequence[list[int]], **sampling: Any) -> list[TokenOutput]:
        """All prompts at once."""
        return ray.get([self.ask(prompt, **sampling) for prompt in prompts])

    def generate_in_turn(self, prompts: Sequence[list[int]], **sampling: Any) -> list[TokenOutput]:
        """One prompt after another: SGLang serves all requests from one random stream (``random_seed``)."""
        return [ray.get(self.ask(prompt, **sampling)) for prompt in prompts]

    def close(self) -> None:
        """End the server and the workers."""
        for actor in [*self.replica.servers, *self.senders.workers]:
            ray.kill(actor)
        for group in self.pool.get_placement_groups():
            ray.util.remove_placement_group(group)
