"""Prints what the plugin did to this process, as one line of JSON; ``verl-troll doctor`` runs it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf.errors import OmegaConfBaseException
from verl.plugin.platform import get_platform
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.engine import EngineRegistry

from verl_troll.patches import registry
from verl_troll.plugin import backends
from verl_troll.plugin.engines.mixin import TrollEngineMixin
from verl_troll.plugin.settings import LOSS_MODE

SEARCH_PATH = "hydra_plugins.verl_troll_search_path"


def _engine(backend: str) -> dict[str, Any]:
    chosen = EngineRegistry.get_engine_cls(backends.MODEL_TYPE, backend)
    return {
        "name": f"{chosen.__module__}.{chosen.__qualname__}",
        "troll": issubclass(chosen, TrollEngineMixin),
        "registered": [
            key
            for key, engine in backends.registered(backend).items()
            if isinstance(key, tuple) and issubclass(engine, TrollEngineMixin)
        ],
    }


def _search_path_error() -> str | None:
    """Why Hydra does not find the configuration groups by itself; None if it does."""
    if any(plugin.__module__ == SEARCH_PATH for plugin in Plugins.instance().discover(SearchPathPlugin)):
        return None
    spec = find_spec("hydra_plugins")
    if spec is not None and spec.origin is not None:
        return f"{spec.origin} hides the plugins of other packages"
    return f"it did not load {SEARCH_PATH}"


def _config_error() -> str | None:
    """Why verl's configuration does not build with ``+troll=default``; None if it does."""
    overrides = [
        # Whether it is needed is said on its own.
        "hydra.searchpath=[pkg://verl_troll.configs]",
        "+troll=default",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.rollout.name=vllm",
    ]
    try:
        with initialize_config_module("verl.trainer.config", version_base=None):
            config = compose("ppo_trainer", overrides=overrides)
            omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    except (HydraException, OmegaConfBaseException) as error:
        return str(error.__cause__ or error).splitlines()[0]
    return None


def inspect() -> dict[str, Any]:
    """Registrations, patches and the configuration group of this process."""
    loss = get_policy_loss_fn(LOSS_MODE)
    platform = get_platform()
    return {
        "platform": type(platform).__name__,
        "device": platform.device_name,
        "available": platform.is_available(),
        "vendor": platform.vendor_name,
        "policy_loss": f"{loss.__module__}.{loss.__qualname__}",
        "engines": {name: _engine(name) for name, backend in backends.BACKENDS.items() if backend.engine},
        "missing_engines": {name: backend.needs for name, backend in backends.BACKENDS.items() if not backend.engine},
        "search_path_error": _search_path_error(),
        "config_error": _config_error(),
        "patches": [
            {"name": patch.name, "host": patch.host, "why": patch.why, "upstream": patch.upstream}
            for patch in registry.applied()
        ],
    }


if __name__ == "__main__":
    print(json.dumps(inspect()))
