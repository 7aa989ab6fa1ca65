"""The critic in CPU mode: ``critic.fsdp._target_`` of ``+cpu=default``.

verl builds the critic's settings on the driver and sends them to the worker. Both import this module for that, and the
import applies the patch, so processes without a critic pay nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from verl.workers.config import FSDPEngineConfig

from verl_troll.cpu import is_active
from verl_troll.patches import registry
from verl_troll.patches.cpu import verl_value_model

__all__ = ["CpuCriticEngineConfig"]


@dataclass
class CpuCriticEngineConfig(FSDPEngineConfig):
    """verl's FSDP engine configuration, for a critic on the CPU.

    Raises:
        RuntimeError: not in CPU mode.
    """

    def __post_init__(self) -> None:
        if not is_active():
            raise RuntimeError(
                f"{type(self).__name__} is for CPU mode: leave out +cpu=... on an accelerator; otherwise set "
                "VERL_PLATFORM=cpu VERL_USE_EXTERNAL_MODULES=verl_troll.cpu"
            )
        super().__post_init__()


if is_active():
    registry.apply(verl_value_model.PATCH)
