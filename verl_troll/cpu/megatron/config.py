"""The engine configuration that enables Megatron in CPU mode."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings
from dataclasses import dataclass

from verl.workers.config import McoreEngineConfig

from verl_troll.cpu import is_active
from verl_troll.cpu.megatron.engine import run_on_cpu
from verl_troll.patches import registry
from verl_troll.patches.cpu import verl_megatron_engine
from verl_troll.versions import OVERRIDE_VARIABLE, TESTED, goes_on_untested

__all__ = ["CpuMcoreEngineConfig"]


@dataclass
class CpuMcoreEngineConfig(McoreEngineConfig):
    """verl's Megatron engine configuration, for the CPU.

    Creating one patches this process's Megatron engines for the CPU before any is built
    (:mod:`verl_troll.patches.cpu.verl_megatron_engine`).

    Args:
        dtype: float32, which verl does not allow for Megatron, or any dtype that verl allows.
        vanilla_mbridge: must be True; Megatron-Bridge imports TransformerEngine.

    Raises:
        RuntimeError: not in CPU mode.
        ImportError: Megatron is not installed, or in a version that the stand-ins for its layers were not made for.
        ValueError: CPU mode does not support a setting.
    """

    _mutable_fields = McoreEngineConfig._mutable_fields | {"dtype"}

    dtype: str = "float32"
    vanilla_mbridge: bool = True

    def __post_init__(self) -> None:
        if not is_active():
            raise RuntimeError(
                f"{type(self).__name__} is for CPU mode: leave out +cpu=... on an accelerator; otherwise set "
                "VERL_PLATFORM=cpu VERL_USE_EXTERNAL_MODULES=verl_troll.cpu"
            )
        missing = [name for name in ("megatron.core", "mbridge", "einops") if not _installed(name)]
        if missing:
            raise ImportError(f"Megatron in CPU mode needs {', '.join(missing)}: see docs/cpu_mode.md")
        _check_versions()
        expert_tensor = self.expert_tensor_parallel_size or self.tensor_model_parallel_size
        for name, supported in (
            ("vanilla_mbridge", self.vanilla_mbridge),
            ("use_megatron_fsdp", not self.use_megatron_fsdp),
            ("param_offload", not self.param_offload),
            ("optimizer_offload", not self.optimizer_offload),
            # A reference policy would use verl's fused kernel, which needs a GPU; the actor uses TROLL's.
            ("use_fused_kernels", not (self.use_fused_kernels and self.forward_only)),
            ("dynamic_context_parallel", not self.dynamic_context_parallel),
            # gloo only gathers equal numbers of tokens.
            ("expert_tensor_parallel_size", self.expert_model_parallel_size == 1 or expert_tensor == 1),
        ):
            if not supported:
                whose = " of a reference policy" if name == "use_fused_kernels" else ""
                raise ValueError(f"{name}={getattr(self, name)!r}{whose} is not supported by Megatron in CPU mode")
        wanted = self.dtype
        if wanted == "float32":
            self.dtype = "bfloat16"  # passes verl's check
        with warnings.catch_warnings():
            # Hides two warnings: mbridge is deprecated, and sequence parallelism is off on one rank.
            warnings.simplefilter("ignore")
            super().__post_init__()
        self.dtype = wanted
        registry.apply(verl_megatron_engine.PATCH, run_on_cpu)


def _check_versions() -> None:
    """Refuse another megatron-core or mbridge, whose layers and models are subclassed.

    Raises:
        ImportError: it is installed, and the user did not allow it.
    """
    for name in ("megatron-core", "mbridge"):
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed = "of an unknown version"
        message = (
            f"Megatron in CPU mode subclasses {name} {TESTED[name]}, but {name} {installed} is installed; "
            "'verl-troll doctor' says what differs."
        )
        if installed != TESTED[name] and not goes_on_untested(message):
            raise ImportError(
                f"{message} pip install '{name}=={TESTED[name]}', or set {OVERRIDE_VARIABLE}=1 to go on at your own "
                "risk."
            )


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
