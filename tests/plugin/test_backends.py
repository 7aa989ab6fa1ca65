"""A backend is one entry of the table, which everything that handles backends reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from verl.workers.engine import EngineRegistry

from verl_troll.plugin import backends, inspection
from verl_troll.plugin.actor_config import TrollFSDPActorConfig, TrollPolicyLossConfig
from verl_troll.plugin.backends import Backend, actor_config, check_engine, register
from verl_troll.plugin.engines.fsdp import TrollFSDPEngine
from verl_troll.plugin.settings import HostSettings, TrollConfig, TrollConfigError

NAME = "made_up"


class MadeUpEngine(TrollFSDPEngine):
    """An engine unknown to verl."""


@dataclass
class MadeUpActorConfig(TrollFSDPActorConfig):
    """Its actor configuration."""


def settings() -> dict[str, object]:
    troll = TrollConfig(host=HostSettings(external_lib="verl_troll.plugin"))
    return {
        "strategy": NAME,
        "rollout_n": 1,
        "ppo_micro_batch_size_per_gpu": 1,
        "policy_loss": TrollPolicyLossConfig(loss_mode="troll", troll=troll),
    }


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Add the entry; restore verl's registry afterwards."""
    monkeypatch.setitem(
        backends.BACKENDS, NAME, Backend(MadeUpEngine, (("cuda", "generic"), ("made", "up")), MadeUpActorConfig)
    )
    yield
    EngineRegistry._engines[backends.MODEL_TYPE].pop(NAME, None)


def test_backend_outside_of_the_table_is_refused() -> None:
    with pytest.raises(TrollConfigError, match=r"strategy='made_up'.*: allowed is fsdp or fsdp2 or megatron"):
        actor_config(**settings())


@pytest.mark.usefixtures("made_up")
def test_backend_in_the_table_is_registered_configured_and_reported() -> None:
    register()
    register()
    assert backends.registered(NAME) == {("cuda", "generic"): MadeUpEngine, ("made", "up"): MadeUpEngine}
    check_engine(NAME)
    config = actor_config(**settings())
    assert type(config) is MadeUpActorConfig
    assert config.engine.troll is config.policy_loss.troll
    facts = inspection.inspect()
    assert facts["missing_engines"] == {}
    assert facts["engines"][NAME] == {
        "name": f"{__name__}.MadeUpEngine",
        "troll": True,
        "registered": [("cuda", "generic"), ("made", "up")],
    }


@pytest.mark.usefixtures("made_up")
def test_backend_whose_engine_is_not_installed_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Backend(None, (("cuda", "generic"),), MadeUpActorConfig, needs="the package made-up")
    monkeypatch.setitem(backends.BACKENDS, NAME, missing)
    register()
    assert backends.registered(NAME) == {}
    with pytest.raises(RuntimeError, match=r"no made_up engine in this environment. Install the package made-up\."):
        actor_config(**settings())
    facts = inspection.inspect()
    assert NAME not in facts["engines"]
    assert facts["missing_engines"] == {NAME: "the package made-up"}
