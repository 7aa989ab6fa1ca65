"""Runs verl's Megatron engine with the CPU as the accelerator."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from verl_troll.cpu.megatron.device import cpu_as_accelerator

__all__ = ["ENTRY_POINTS", "run_on_cpu"]

# Methods that verl's workers call, from any thread of a Ray actor.
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
    """While an engine is built: CPU layers, and one random generator for all ranks' parameters."""
    from megatron.core import tensor_parallel

    from verl_troll.cpu.megatron import bridges

    bridges.register()
    # Megatron's inference tracker keeps no generators on an accelerator. Weights come from a file anyway.
    tracker = tensor_parallel.get_cuda_rng_tracker(inference_rng_tracker=True)
    yield
    # verl cannot load a checkpoint without tracker states; it saves the CPU generator's state separately.
    tracker.states_.setdefault("none", torch.empty(0, dtype=torch.uint8))


@contextlib.contextmanager
def _adam_states(engine: Any) -> Iterator[None]:
    """While a checkpoint is loaded: allocate the state first, then set each parameter's step count.

    TransformerEngine's Adam allocates its state immediately and counts steps per group. torch's Adam allocates at its
    first step and counts per parameter; Megatron saves that count but only loads it into the groups.
    """
    adams = [part.optimizer for part in engine.optimizer.chained_optimizers if part.optimizer is not None]
    for adam in adams:
        for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
            if not adam.state[parameter]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                adam.state[parameter] = {"step": torch.tensor(0.0), **moments}
    # In float32 the main parameters are the model's own, and Megatron does not expect them to require gradients.
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
    """Patch ``engine`` to run its and its subclasses' entry points under :func:`cpu_as_accelerator`."""
    surroundings = {"__init__": lambda self: _cpu_models(), "load_checkpoint": _adam_states}
    for name in ENTRY_POINTS:
        surrounding = surroundings.get(name, contextlib.nullcontext)
        setattr(engine, name, _on_cpu(getattr(engine, name), surrounding))
