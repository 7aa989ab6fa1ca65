"""The table of backends: the engine with TROLL, the devices that it is registered for, the actor's configuration.

A backend is one entry of :data:`BACKENDS`. Registration, the check of the host, the actor's configuration and
``verl-troll doctor`` read it from there.

verl looks an engine up by (device, vendor) before device alone, so that registering under vendor keys takes precedence
without replacing anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verl.workers import engine as verl_engines
from verl.workers.config import ActorConfig
from verl.workers.engine import EngineRegistry

from verl_troll.plugin.actor_config import TrollFSDPActorConfig, TrollMegatronActorConfig
from verl_troll.plugin.engines.fsdp import TrollFSDPEngine
from verl_troll.plugin.engines.mixin import TrollEngineMixin
from verl_troll.plugin.settings import refusal

__all__ = ["BACKENDS", "MODEL_TYPE", "Backend", "actor_config", "check_engine", "register", "registered"]

MODEL_TYPE = "language_model"
# Vendors that verl's platforms name; generic is CPU mode, which runs the engines registered for cuda.
_GPUS = (("cuda", "nvidia"), ("cuda", "amd"), ("cuda", "generic"))
_NPUS = (("npu", "huawei"),)


@dataclass(frozen=True)
class Backend:
    """What belongs to one value of ``actor_rollout_ref.actor.strategy``.

    Attributes:
        engine: verl's engine with TROLL; None where a package that verl's own needs is missing.
        devices: (device, vendor) pairs that the engine is registered for.
        actor_config: verl's actor configuration with the checks of this backend.
        needs: the missing package and how to install it, for messages.
    """

    engine: type[TrollEngineMixin] | None
    devices: tuple[tuple[str, str], ...]
    actor_config: type[ActorConfig]
    needs: str = ""


def _megatron_engine() -> type[TrollEngineMixin] | None:
    # None where megatron-core is not installed.
    if verl_engines.MegatronEngineWithLMHead is None:
        return None
    from verl_troll.plugin.engines.megatron import TrollMegatronEngine

    return TrollMegatronEngine


BACKENDS: dict[str, Backend] = {
    "fsdp": Backend(TrollFSDPEngine, _GPUS + _NPUS, TrollFSDPActorConfig),
    "fsdp2": Backend(TrollFSDPEngine, _GPUS + _NPUS, TrollFSDPActorConfig),
    # On NPUs verl has an engine of its own for this backend (MindSpeed).
    "megatron": Backend(
        _megatron_engine(), _GPUS, TrollMegatronActorConfig, needs="megatron-core ('pip install verl[mcore]')"
    ),
}


def registered(backend: str) -> dict[Any, type]:
    """verl's engines for ``backend`` by (device, vendor), or by device alone."""
    engines: dict[Any, type] = EngineRegistry._engines[MODEL_TYPE].get(backend, {})
    return engines


def register() -> None:
    """Register the engines under every known (device, vendor); once per process."""
    for name, backend in BACKENDS.items():
        for device, vendor in backend.devices if backend.engine is not None else ():
            if registered(name).get((device, vendor)) is not backend.engine:
                EngineRegistry.register(MODEL_TYPE, name, device=device, vendor=vendor)(backend.engine)


def check_engine(strategy: str) -> None:
    """Refuse a host on which verl would pick another engine than TROLL's.

    Raises:
        RuntimeError: naming the engine that verl would use, or the package that is missing.
    """
    backend = BACKENDS[strategy]
    if backend.engine is None:
        raise RuntimeError(
            f"actor_rollout_ref.actor.strategy={strategy}: verl has no {strategy} engine in this environment. "
            f"Install {backend.needs}."
        )
    chosen = EngineRegistry.get_engine_cls(MODEL_TYPE, strategy)
    if not issubclass(chosen, TrollEngineMixin):
        raise RuntimeError(
            f"verl would run the actor on {chosen.__module__}.{chosen.__qualname__}, not on a TROLL engine: this "
            f"host's device and vendor are not among {backend.devices}. Check VERL_PLATFORM, VERL_ENGINE_DEVICE "
            f"and VERL_ENGINE_VENDOR."
        )


def actor_config(**settings: Any) -> ActorConfig:
    """Actor settings of the strategy in use; the ``_target_`` of ``actor_rollout_ref.actor`` under ``+troll=default``.

    Raises:
        TrollConfigError: the strategy is not supported, or a setting is refused.
        RuntimeError: verl would not run the actor on a TROLL engine here.
    """
    strategy = settings.get("strategy")
    backend = BACKENDS.get(str(strategy))
    if backend is None:
        raise refusal("actor_rollout_ref.actor.strategy", strategy, " or ".join(BACKENDS))
    config = backend.actor_config(**settings)
    check_engine(config.strategy)
    return config
