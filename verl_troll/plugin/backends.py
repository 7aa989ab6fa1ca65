"""The table of backends: engine with TROLL, devices it is registered for, actor configuration.

A backend is one entry of :data:`BACKENDS`, which registration, the host check, the actor's configuration and
``verl-troll doctor`` read.

verl looks up engines by (device, vendor) before device alone, so engines registered under vendor keys take precedence
and replace nothing.
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
# Vendor names of verl's platforms. generic is CPU mode, which runs the engines registered for cuda.
_GPUS = (("cuda", "nvidia"), ("cuda", "amd"), ("cuda", "generic"))
_NPUS = (("npu", "huawei"),)


@dataclass(frozen=True)
class Backend:
    """Everything for one value of ``actor_rollout_ref.actor.strategy``.

    Attributes:
        engine: verl's engine with TROLL; None if a package that verl's engine needs is missing.
        devices: (device, vendor) pairs to register the engine for.
        actor_config: verl's actor configuration with the checks of this backend.
        needs: that package and where to get it, for messages.
    """

    engine: type[TrollEngineMixin] | None
    devices: tuple[tuple[str, str], ...]
    actor_config: type[ActorConfig]
    needs: str = ""


def _megatron_engine() -> type[TrollEngineMixin] | None:
    # None if megatron-core is not installed.
    if verl_engines.MegatronEngineWithLMHead is None:
        return None
    from verl_troll.plugin.engines.megatron import TrollMegatronEngine

    return TrollMegatronEngine


BACKENDS: dict[str, Backend] = {
    "fsdp": Backend(TrollFSDPEngine, _GPUS + _NPUS, TrollFSDPActorConfig),
    "fsdp2": Backend(TrollFSDPEngine, _GPUS + _NPUS, TrollFSDPActorConfig),
    # On NPUs verl has its own engine for this backend (MindSpeed).
    "megatron": Backend(
        _megatron_engine(),
        _GPUS,
        TrollMegatronActorConfig,
        needs="megatron-core with a bridge, as in verl's image or its uv.lock; 'verl[mcore]' is not enough "
        "(docs/megatron.md, 'Installation')",
    ),
}


def registered(backend: str) -> dict[Any, type]:
    """verl's engines for ``backend`` by (device, vendor), or by device alone."""
    engines: dict[Any, type] = EngineRegistry._engines[MODEL_TYPE].get(backend, {})
    return engines


def register() -> None:
    """Register each engine for its (device, vendor) pairs, once per process."""
    for name, backend in BACKENDS.items():
        for device, vendor in backend.devices if backend.engine is not None else ():
            if registered(name).get((device, vendor)) is not backend.engine:
                EngineRegistry.register(MODEL_TYPE, name, device=device, vendor=vendor)(backend.engine)


def check_engine(strategy: str) -> None:
    """Refuse a host on which verl would not pick TROLL's engine.

    Raises:
        RuntimeError: names the engine that verl would use, or the missing package.
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
            f"and VERL_ENGINE_VENDOR, or choose another actor_rollout_ref.actor.strategy."
        )


def actor_config(**settings: Any) -> ActorConfig:
    """Actor settings for the chosen strategy; ``+troll=default`` makes this the ``_target_`` of the actor.

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
