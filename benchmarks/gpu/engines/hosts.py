"""verl's engines on one device, with the method selectable per pass."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Host:
    """One of verl's engines, with the method selectable per pass; ``setup`` is a test scenario's."""

    def __init__(self, device: str, setup: Any) -> None:
        self.device = torch.device(device)
        self.setup = setup
        self.engine: Any = self.build(setup)

    def build(self, setup: Any) -> Any:
        """Build the engine."""
        raise NotImplementedError

    def loss_function(self, setup: Any, troll: dict[str, Any] | None) -> Any:
        """verl's loss function; also configures the engine with these TROLL settings, or without TROLL."""
        raise NotImplementedError

    def old_pass(self, batch: Any, setup: Any) -> dict[str, Tensor]:
        """Model outputs of the old-log-prob pass, on the CPU."""
        raise NotImplementedError

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The model's parameters."""
        raise NotImplementedError

    def gradient(self, parameter: torch.nn.Parameter) -> Tensor | None:
        """The parameter's gradient after the backward pass."""
        return parameter.grad

    def forget(self) -> None:
        """Remove the last method's settings from the engine's configuration."""
        object.__setattr__(self.engine.engine_config, "troll", None)

    def move(self, scale: float) -> None:
        """Perturb every parameter relatively, to simulate updates."""
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                local = _local(parameter)
                generator = torch.Generator(local.device).manual_seed(number)
                noise = torch.randn(local.shape, generator=generator, device=local.device, dtype=torch.float32)
                local.mul_((1 + scale * noise).to(local.dtype))

    def loss(self, batch: Any, setup: Any, loss_function: Any) -> tuple[float, dict[str, float], Tensor]:
        """Loss, metrics and gradient (as one vector) of a mini-batch."""
        from tests.distributed.batches import with_settings

        data = with_settings(batch, setup, calculate_entropy=False)
        with self.engine.train_mode():
            self.engine.optimizer_zero_grad()
            result = self.engine.forward_backward_batch(data, loss_function, forward_only=False)
            found = [
                _local(g).detach().float().flatten() for p in self.parameters() if (g := self.gradient(p)) is not None
            ]
            vector = torch.cat(found)
            self.engine.optimizer_zero_grad()
        return float(sum(result["loss"])), _metrics(result["metrics"]), vector

    def step(self, batch: Any, setup: Any, loss_function: Any) -> None:
        """One update, including the optimizer step."""
        from tests.distributed.batches import with_settings

        data = with_settings(batch, setup, calculate_entropy=False)
        with self.engine.train_mode():
            self.engine.train_batch(data, loss_function)


class FsdpHost(Host):
    """verl's FSDP or FSDP2 engine."""

    def build(self, setup: Any) -> Any:
        from tests.distributed import fsdp_scenarios

        return fsdp_scenarios.build(setup)[0]

    def loss_function(self, setup: Any, troll: dict[str, Any] | None) -> Any:
        from verl.workers.utils.losses import ppo_loss

        from tests.distributed import fsdp_scenarios

        self.forget()
        actor = fsdp_scenarios.actor_of(dataclasses.replace(setup, troll=troll), self.engine.engine_config)
        return functools.partial(ppo_loss, config=actor)

    def old_pass(self, batch: Any, setup: Any) -> dict[str, Tensor]:
        from tests.distributed import fsdp_scenarios

        return fsdp_scenarios.old_pass(self.engine, batch, setup)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        yield from self.engine.module.parameters()


class MegatronHost(Host):
    """verl's Megatron engine."""

    def build(self, setup: Any) -> Any:
        from tests.distributed import megatron_stock

        return megatron_stock.build(setup)

    def loss_function(self, setup: Any, troll: dict[str, Any] | None) -> Any:
        from verl.workers.config import ActorConfig
        from verl.workers.utils.losses import ppo_loss

        from tests.distributed import megatron_scenarios

        self.forget()
        if troll is not None:
            return megatron_scenarios.loss_function(self.engine, setup, troll)
        actor = ActorConfig(strategy="megatron", rollout_n=1, ppo_micro_batch_size_per_gpu=setup.micro_batch_size)
        return functools.partial(ppo_loss, config=actor)

    def old_pass(self, batch: Any, setup: Any) -> dict[str, Tensor]:
        from tests.distributed import megatron_stock

        return megatron_stock.old_pass(self.engine, batch, setup)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        for module in self.engine.module:
            yield from module.parameters()

    def gradient(self, parameter: torch.nn.Parameter) -> Tensor | None:
        gradient: Tensor | None = getattr(parameter, "main_grad", None)
        return gradient


def _local(tensor: Any) -> Tensor:
    """This rank's part of a tensor; on one rank, all of it."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor.data
    return local


def _metrics(metrics: dict[str, Any]) -> dict[str, float]:
    from verl.utils.metric import Metric

    return {name: float(Metric.aggregate_dp([one])) for name, one in metrics.items() if isinstance(one, Metric)}
