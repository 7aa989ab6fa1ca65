"""Makes the CPU stand in for the accelerator that megatron-core assumes.

Megatron names its device in three ways: ``device="cuda"`` when it creates tensors, ``Tensor.cuda()`` and the like, and
``torch.cuda.current_device()`` with streams and events. :func:`install` replaces the last for the whole process;
:func:`cpu_as_accelerator` rewrites the first two, in the calling thread and within its context.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

__all__ = ["cpu_as_accelerator", "install"]

_CPU = torch.device("cpu")


def _host(device: Any) -> Any:
    """``device``, or the CPU if ``device`` means an accelerator: an index, ``cuda`` or ``cuda:<index>``."""
    if isinstance(device, torch.device):
        return _CPU if device.type == "cuda" else device
    if isinstance(device, str):
        return _CPU if device.startswith("cuda") else device
    return _CPU if isinstance(device, int) and not isinstance(device, bool) else device


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites the devices of torch calls, in the thread that entered the mode.

    A backward pass is a single call, so the mode does not see the calls inside it. Megatron's take their device from
    ``torch.cuda.current_device()``.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizers group parameters by this name.
            return func(*args).replace("torch.", "torch.cuda.")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if "device" in kwargs:
            kwargs["device"] = _host(kwargs["device"])
        if func is torch.Tensor.to:
            args = (args[0], *map(_host, args[1:2]), *args[2:])
        return func(*args, **kwargs)


class _Event:
    """An event that is always complete, since CPU work is synchronous."""

    def __init__(self, *unused: Any, **unused_too: Any) -> None:
        """Accept any arguments of ``torch.cuda.Event``."""

    def record(self, stream: Any = None) -> None:
        """Nothing to record."""

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always complete."""
        return True


class _Stream:
    """The only stream of a device that runs in order; all instances are equal."""

    def __init__(self, *unused: Any, **unused_too: Any) -> None:
        """Accept any arguments of ``torch.cuda.Stream``."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def record_event(self, event: Any = None) -> _Event:
        """A completed event."""
        return event or _Event()

    def synchronize(self) -> None:
        """Nothing to wait for."""


def _constant(value: Any) -> Callable[..., Any]:
    """A new function each time, since torch's compiler identifies members of ``torch.cuda`` by identity."""
    return lambda *unused, **unused_too: value


# torch.cuda.manual_seed is deliberately absent: torch.manual_seed calls it.
_CUDA: dict[str, Any] = {
    "current_device": _constant(_CPU),
    "set_device": _constant(None),
    "synchronize": _constant(None),
    "empty_cache": _constant(None),
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    "Stream": _Stream,
    "Event": _Event,
    "current_stream": _constant(_Stream()),
    "default_stream": _constant(_Stream()),
    "stream": lambda stream: contextlib.nullcontext(),
}


def _with_listed_splits(all_to_all_single: Callable[..., Any]) -> Callable[..., Any]:
    """Also accept split sizes as tensors: Megatron converts them to lists only if it copies from an accelerator."""

    @functools.wraps(all_to_all_single)
    def call(*args: Any, **kwargs: Any) -> Any:
        listed = {name: value.tolist() for name, value in kwargs.items() if name in _SPLITS and torch.is_tensor(value)}
        return all_to_all_single(*args, **{**kwargs, **listed})

    return call


_SPLITS = ("output_split_sizes", "input_split_sizes")
_lock = threading.Lock()
_installed = False
_thread = threading.local()


def install() -> None:
    """Replace members of ``torch.cuda`` in this process, permanently, and disable compilation; idempotent.

    Raises:
        RuntimeError: there is a CUDA device, which must not be hidden.
    """
    global _installed
    with _lock:
        if _installed:
            return
        if torch.cuda.is_available():
            raise RuntimeError(
                "Megatron's CPU mode is for machines without CUDA: hide the GPUs with CUDA_VISIBLE_DEVICES=, or, to "
                "use them, unset VERL_PLATFORM and VERL_USE_EXTERNAL_MODULES and leave out +cpu=megatron"
            )
        for name, value in _CUDA.items():
            setattr(torch.cuda, name, value)
        dist.all_to_all_single = _with_listed_splits(dist.all_to_all_single)
        # Compiling Megatron's small functions takes longer than a test. The first call covers existing functions, the
        # variable those compiled later.
        torch.compiler.set_stance("force_eager")
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        _installed = True


@contextlib.contextmanager
def cpu_as_accelerator() -> Iterator[None]:
    """Create CUDA tensors on the CPU instead, in this thread; calls :func:`install`, may be nested."""
    if getattr(_thread, "entered", False):
        yield
        return
    install()
    _thread.entered = True
    try:
        with _CudaMeansCpu():
            yield
    finally:
        _thread.entered = False
