"""verl's Megatron engine with the CPU as Megatron's accelerator."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from verl_troll.cpu.megatron.device import cpu_as_accelerator

__all__ = ["ENTRY_POINTS", "run_on_cpu"]

# What verl's workers call from outside, in whatever thread of a Ray actor.
ENTRY_POINTS = (
    "__init__",
    "initialize",
    "to",
    "forward_backward_batch",
    "optimizer_zero_grad",
    "optimizer_step",
    "lr_scheduler_step",
    "get_per_tensor_param",
    "save_checkpoint",
    "load_checkpoint",
)


@contextlib.contextmanager
def _cpu_models() -> Iterator[None]:
    """For the building of an engine: models from CPU layers, and one random generator for all ranks' parameters."""
    from megatron.core import tensor_parallel

    from verl_troll.cpu.megatron import bridges

    bridges.register()
    # The tracker that Megatron has for inference keeps no generators on an accelerator. Weights come from a file.
    tracker = tensor_parallel.get_cuda_rng_tracker(inference_rng_tracker=True)
    yield
    # verl does not load a checkpoint without such states; that of the CPU's generator is kept beside them anyway.
    tracker.states_.setdefault("none", torch.empty(0, dtype=torch.uint8))


@contextlib.contextmanager
def _adam_states(engine: Any) -> Iterator[None]:
    """For the loading of a checkpoint: state for Megatron to load into, then the count of steps for each parameter.

    TransformerEngine's Adam allocates its state at once and counts steps by group. torch's has nothing before its first
    step, and counts by parameter; Megatron saves that count, and loads it into the groups only.
    """
    adams = [part.optimizer for part in engine.optimizer.chained_optimizers if part.optimizer is not None]
    for adam in adams:
        for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
            if not adam.state[parameter]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                adam.state[parameter] = {"step": torch.tensor(0.0), **moments}
    # In float32 the optimizer's copies are the parameters themselves, which Megatron does not expect to need gradients.
    with torch.no_grad():
        yield
    for adam in adams:
        for group in adam.param_groups:
            for parameter in group["params"]:
                adam.state[parameter]["step"] = torch.tensor(float(group["step"]))


def _on_cpu(method: Callable[..., Any], surrounding: Callable[[Any], Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def on_cpu(self: Any, *args: Any, **kwargs: Any) -> Any:
        with cpu_as_accelerator(), surrounding(self):
            return method(self, *args, **kwargs)

    return on_cpu


def run_on_cpu(engine: type) -> None:
    """Run the entry points of ``engine`` and of its subclasses under :func:`cpu_as_accelerator`; changes the class."""
    surroundings = {"__init__": lambda self: _cpu_models(), "load_checkpoint": _adam_states}
    for name in ENTRY_POINTS:
        surrounding = surroundings.get(name, contextlib.nullcontext)
        setattr(engine, name, _on_cpu(getattr(engine, name), surrounding))
