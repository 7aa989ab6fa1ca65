"""TROLL on verl's engines: stock, unless the engine's configuration carries TROLL settings.

verl's registry looks a class up by (device, vendor) before device alone, so that registering under vendor keys takes
precedence without replacing anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.engine import BaseEngine, EngineRegistry, FSDPEngineWithLMHead

from verl_troll.plugin.passes import LossFunction, OldPolicyPass, UpdatePass
from verl_troll.plugin.settings import TrollConfig

MODEL_TYPE = "language_model"
# Vendors that verl's platforms name; generic is CPU mode, which runs the engines registered for cuda.
DEVICES = (("cuda", "nvidia"), ("cuda", "amd"), ("cuda", "generic"), ("npu", "huawei"))


class TrollEngineMixin(BaseEngine):
    """Puts :class:`OldPolicyPass` and :class:`UpdatePass` where verl's engine shows its logits."""

    _adapter_disabled = False

    @property
    def troll(self) -> TrollConfig | None:
        """Settings that the actor's configuration left in the engine's; None on any other engine."""
        settings: TrollConfig | None = getattr(self.engine_config, "troll", None)
        return settings

    def forward_backward_batch(
        self, data: TensorDict, loss_function: LossFunction | None, forward_only: bool = False
    ) -> Any:
        """verl's pass, with TROLL's reading of the logits in the old-log-prob pass and in the update."""
        settings = self.troll
        # With a LoRA reference inside the actor, the reference pass comes through this engine too.
        if settings is not None and not self.engine_config.forward_only and not self._adapter_disabled:
            if not forward_only:
                if loss_function is None:
                    raise TypeError("loss_function is missing")
                loss_function = UpdatePass(settings, loss_function)
            elif loss_function is None:
                loss_function = OldPolicyPass(settings)
            if isinstance(loss_function, OldPolicyPass | UpdatePass):
                if tu.get_non_tensor_data(data, key="use_fused_kernels", default=False):
                    raise ValueError("use_fused_kernels=True is not supported with TROLL: set it to False")
                tu.assign_non_tensor(data, distillation_use_topk=True, distillation_only=True)
        return super().forward_backward_batch(data, loss_function, forward_only=forward_only)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """verl's context, remembered: a pass without the adapter is the reference's, not the old policy's."""
        with super().disable_adapter():
            self._adapter_disabled = True
            try:
                yield
            finally:
                self._adapter_disabled = False


class TrollFSDPEngine(TrollEngineMixin, FSDPEngineWithLMHead):
    """verl's FSDP and FSDP2 engine with TROLL."""


BACKENDS: dict[str, type[TrollEngineMixin]] = {"fsdp": TrollFSDPEngine, "fsdp2": TrollFSDPEngine}


def register() -> None:
    """Register the engines under every known (device, vendor); once per process."""
    for backend, engine in BACKENDS.items():
        registered = EngineRegistry._engines[MODEL_TYPE][backend]
        for device, vendor in DEVICES:
            if registered.get((device, vendor)) is not engine:
                EngineRegistry.register(MODEL_TYPE, backend, device=device, vendor=vendor)(engine)


def check_engine(strategy: str) -> None:
    """Refuse a host on which verl would pick another engine than TROLL's.

    Raises:
        RuntimeError: naming the engine that verl would use.
    """
    chosen = EngineRegistry.get_engine_cls(MODEL_TYPE, strategy)
    if not issubclass(chosen, TrollEngineMixin):
        raise RuntimeError(
            f"verl would run the actor on {chosen.__module__}.{chosen.__qualname__}, not on a TROLL engine: this "
            f"host's device and vendor are not among {DEVICES}. Check VERL_PLATFORM, VERL_ENGINE_DEVICE and "
            f"VERL_ENGINE_VENDOR."
        )
