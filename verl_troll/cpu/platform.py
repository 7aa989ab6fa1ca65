"""verl's platform interface for a machine without an accelerator."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import psutil
import torch
from verl.plugin.platform import PlatformBase

__all__ = ["CpuPlatform"]


class _CpuDeviceModule(ModuleType):
    """``torch.cpu`` plus the members of ``torch.cuda`` that verl uses unconditionally."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def is_available(self) -> bool:
        # verl checks this before it frees or measures accelerator memory.
        return False

    def empty_cache(self) -> None:
        """Nothing to free."""

    def ipc_collect(self) -> None:
        """Nothing to collect."""

    def set_per_process_memory_fraction(self, fraction: float, device: Any = None) -> None:
        """Host memory has no quota."""

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        """The operating system's peak cannot be reset."""

    def memory_allocated(self, device: Any = None) -> int:
        """Resident memory of this process, in bytes."""
        return int(psutil.Process().memory_info().rss)

    def max_memory_allocated(self, device: Any = None) -> int:
        """Peak resident memory of this process, in bytes."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    memory_reserved = memory_allocated
    max_memory_reserved = max_memory_allocated

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        """Available and total host memory, in bytes."""
        memory = psutil.virtual_memory()
        return int(memory.available), int(memory.total)

    def get_device_name(self, device: Any = None) -> str:
        """An unknown name, so verl skips throughput estimates."""
        return "CPU"

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        """State of torch's CPU generator."""
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        """Set the state of torch's CPU generator."""
        torch.set_rng_state(state)


_DEVICE_MODULE = _CpuDeviceModule("verl_troll.cpu.torch_cpu")


class CpuPlatform(PlatformBase):
    """The CPU as verl's device.

    It is never detected, only selected (``VERL_PLATFORM=cpu``). verl's scheduler counts only the Ray resource ``GPU``,
    so start Ray with ``num_gpus`` equal to the number of ranks.
    """

    device_name = "cpu"
    vendor_name = "generic"
    device_module = _DEVICE_MODULE

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False

    def current_device(self) -> Any:
        # verl passes this to Tensor.to(); an index would mean cuda:<index>.
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        """One device only."""

    def synchronize(self, device_index: int | None = None) -> None:
        """CPU operations are synchronous."""

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """The host allocator has none of these settings."""

    def empty_cache(self) -> None:
        """Nothing to free."""

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        """No device profiler."""

    def profiler_stop(self) -> None:
        """No device profiler."""

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None
