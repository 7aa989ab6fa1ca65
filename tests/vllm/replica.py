"""verl's own vLLM replica and the workers that update its weights, without the trainer."""

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
from verl.workers.config import HFModelConfig
from verl.workers.rollout.replica import RolloutReplica, TokenOutput, get_rollout_replica_class


def configuration(model: Path, *overrides: str) -> Any:
    """verl's composed configuration for the replica."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose(
            "ppo_trainer",
            overrides=[
                "+cpu=default",
                "+cpu/rollout=vllm",
                f"actor_rollout_ref.model.path={model}",
                "data.max_prompt_length=16",
                "data.max_response_length=16",
                "actor_rollout_ref.rollout.calculate_log_probs=True",
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
                *overrides,
            ],
        )


class WeightSender(Worker):
    """The training side: verl's adapter, sending the weights of a checkpoint."""

    def __init__(self, rollout: Any, model: Any) -> None:
        super().__init__()
        from verl.workers.rollout.vllm_rollout.vllm_rollout import ServerAdapter

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
    """A running replica, of the class that is registered for vLLM unless another is given."""

    def __init__(self, config: Any, kind: type[RolloutReplica] | None = None) -> None:
        rollout, model = config.actor_rollout_ref.rollout, config.actor_rollout_ref.model
        self.pool = RayResourcePool([1], use_gpu=True, max_colocate_count=2)
        self.senders = RayWorkerGroup(
            resource_pool=self.pool,
            ray_cls_with_init=RayClassWithInitArgs(ray.remote(WeightSender), rollout=rollout, model=model),
            device_name=get_device_name(),
        )
        self.replica = (kind or get_rollout_replica_class("vllm"))(0, rollout, model, gpus_per_node=1)
        asyncio.run(self.replica.init_hybrid(self.senders))

    def update(self, model: Path, scale: float = 1.0, step: int = 1) -> None:
        """verl's weight synchronisation through shared memory."""
        ray.get(self.senders.send(str(model), scale, step))

    def generate(self, prompts: Sequence[list[int]], *, in_turn: bool = False, **sampling: Any) -> list[TokenOutput]:
        """One answer per prompt, each with its own seed; ``in_turn`` keeps answers from sharing a batch.

        Which requests share a batch depends on when they arrive, and rounding depends on the batch.
        """
        params = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "logprobs": True, **sampling}

        def send(index: int) -> ray.ObjectRef:
            return self.replica.server_handle.generate.remote(
                prompt_ids=prompts[index],
                sampling_params={**params, "seed": index},
                request_id=f"{index}-{id(params)}",
            )

        if in_turn:
            return [ray.get(send(index)) for index in range(len(prompts))]
        return ray.get([send(index) for index in range(len(prompts))])

    def close(self) -> None:
        """End the server and the workers."""
        for actor in [*self.replica.servers, *self.senders.workers]:
            ray.kill(actor)
        for group in self.pool.get_placement_groups():
            ray.util.remove_placement_group(group)
