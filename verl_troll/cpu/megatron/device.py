"""The CPU in the place of the accelerator that megatron-core takes for granted.

Megatron names its device in three ways: ``device="cuda"`` where tensors are made, ``Tensor.cuda()`` and the like, and
``torch.cuda.current_device()`` with streams and events around it. :func:`install` answers the last for the process;
:func:`cpu_as_accelerator` rewrites the first two, in the calling thread and only while its context lasts.
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
    """``device``, or the CPU where ``device`` means an accelerator: an index, ``cuda`` or ``cuda:<index>``."""
    if isinstance(device, torch.device):
        return _CPU if device.type == "cuda" else device
    if isinstance(device, str):
        return _CPU if device.startswith("cuda") else device
    return _CPU if isinstance(device, int) and not isinstance(device, bool) else device


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites the devices of torch calls; a mode belongs to the thread that entered it.

    A backward pass runs as one such call, so that the calls inside it are not seen. Those of Megatron take their device
    from ``torch.cuda.current_device()``.
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
            # Megatron's optimizers sort parameters by this name.
            return func(*args).replace("torch.", "torch.cuda.")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if "device" in kwargs:
            kwargs["device"] = _host(kwargs["device"])
        if func is torch.Tensor.to:
            args = (args[0], *map(_host, args[1:2]), *args[2:])
        return func(*args, **kwargs)


class _Event:
    """An event of work that is done as soon as it is asked for."""

    def __init__(self, *unused: Any, **unused_too: Any) -> None:
        """Any arguments of ``torch.cuda.Event``."""

    def record(self, stream: Any = None) -> None:
        """Nothing to record."""

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always done."""
        return True


class _Stream:
    """The one queue of a device that works in order; all streams are equal."""

    def __init__(self, *unused: Any, **unused_too: Any) -> None:
        """Any arguments of ``torch.cuda.Stream``."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def record_event(self, event: Any = None) -> _Event:
        """An event that is done."""
        return event or _Event()

    def synchronize(self) -> None:
        """Nothing to wait for."""


def _constant(value: Any) -> Callable[..., Any]:
    """A new function of any arguments; torch's compiler tells the members of ``torch.cuda`` apart by identity."""
    return lambda *unused, **unused_too: value


# torch.cuda.manual_seed is absent on purpose: torch.manual_seed calls it.
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
    """Takes split sizes as tensors too: Megatron makes lists of them only where it copies them from an accelerator."""

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
    """Answer for ``torch.cuda`` in this process, for good, and run compiled functions as they are written; idempotent.

    Raises:
        RuntimeError: there is a CUDA device, which must not be hidden.
    """
    global _installed
    with _lock:
        if _installed:
            return
        if torch.cuda.is_available():
            raise RuntimeError("Megatron's CPU mode is for machines without CUDA; unset VERL_PLATFORM to use the GPU")
        for name, value in _CUDA.items():
            setattr(torch.cuda, name, value)
        dist.all_to_all_single = _with_listed_splits(dist.all_to_all_single)
        # Compiling Megatron's small functions takes longer than a test: neither those that are there already, nor those
        # that are made later.
        torch.compiler.set_stance("force_eager")
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        _installed = True


@contextlib.contextmanager
def cpu_as_accelerator() -> Iterator[None]:
    """In this thread, tensors that are asked for on CUDA come from the CPU; implies :func:`install`, may be nested."""
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
