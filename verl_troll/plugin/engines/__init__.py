"""verl's engines with TROLL, and their places in verl's registry.

verl looks a class up by (device, vendor) before device alone, so that registering under vendor keys takes precedence
without replacing anything.
"""

from __future__ import annotations

from verl.workers import engine as verl_engines
from verl.workers.engine import EngineRegistry

from verl_troll.plugin.engines.fsdp import TrollFSDPEngine
from verl_troll.plugin.engines.mixin import TrollEngineMixin

__all__ = ["BACKENDS", "MODEL_TYPE", "TrollEngineMixin", "TrollFSDPEngine", "check_engine", "register"]

MODEL_TYPE = "language_model"
# Vendors that verl's platforms name; generic is CPU mode, which runs the engines registered for cuda.
_GPUS = (("cuda", "nvidia"), ("cuda", "amd"), ("cuda", "generic"))
_NPUS = (("npu", "huawei"),)

BACKENDS: dict[str, type[TrollEngineMixin]] = {"fsdp": TrollFSDPEngine, "fsdp2": TrollFSDPEngine}
DEVICES: dict[str, tuple[tuple[str, str], ...]] = {"fsdp": _GPUS + _NPUS, "fsdp2": _GPUS + _NPUS}

# None where megatron-core is not installed.
if verl_engines.MegatronEngineWithLMHead is not None:
    from verl_troll.plugin.engines.megatron import TrollMegatronEngine

    # On NPUs verl has an engine of its own for this backend (MindSpeed).
    BACKENDS["megatron"], DEVICES["megatron"] = TrollMegatronEngine, _GPUS


def register() -> None:
    """Register the engines under every known (device, vendor); once per process."""
    for backend, engine in BACKENDS.items():
        registered = EngineRegistry._engines[MODEL_TYPE][backend]
        for device, vendor in DEVICES[backend]:
            if registered.get((device, vendor)) is not engine:
                EngineRegistry.register(MODEL_TYPE, backend, device=device, vendor=vendor)(engine)


def check_engine(strategy: str) -> None:
    """Refuse a host on which verl would pick another engine than TROLL's.

    Raises:
        RuntimeError: naming the engine that verl would use, or the package that is missing.
    """
    if strategy not in BACKENDS:
        raise RuntimeError(
            f"actor_rollout_ref.actor.strategy={strategy}: verl has no {strategy} engine in this environment. "
            f"Install megatron-core and verl's other requirements for it ('pip install verl[mcore]')."
        )
    chosen = EngineRegistry.get_engine_cls(MODEL_TYPE, strategy)
    if not issubclass(chosen, TrollEngineMixin):
        raise RuntimeError(
            f"verl would run the actor on {chosen.__module__}.{chosen.__qualname__}, not on a TROLL engine: this "
            f"host's device and vendor are not among {DEVICES[strategy]}. Check VERL_PLATFORM, VERL_ENGINE_DEVICE "
            f"and VERL_ENGINE_VENDOR."
        )
