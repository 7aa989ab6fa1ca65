"""Patches match the host source they were written for, check the version, and apply once."""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
from omegaconf import OmegaConf

from verl_troll.patches import registry, transfer_queue_lost, verl_trained_version
from verl_troll.patches.registry import Patch, PatchError, source_fingerprint
from verl_troll.versions import OVERRIDE_VARIABLE

PATCHES = registry.every()


def _installed(host: str) -> bool:
    return any(True for _ in importlib.metadata.distributions(name=host))


# A patch is checked if its host is installed; tests/run.sh also runs this file next to vLLM.
HERE = [patch for patch in PATCHES if _installed(patch.host)]


def _patch(install: Callable[[], None], name: str, versions: str) -> Patch[[]]:
    return Patch(name=name, host="torch", versions=versions, why="test", upstream="none", install=install)


@pytest.mark.parametrize("patch", HERE, ids=lambda patch: patch.name)
def test_host_source_is_the_one_that_was_read(patch: Patch[...]) -> None:
    assert patch.replaces, "a patch names what it stands in for"
    for target, fingerprint in patch.replaces.items():
        assert source_fingerprint(target) == fingerprint, (
            f"{patch.host} changed {target}: read it again, decide whether patch {patch.name!r} is still right or "
            f"still needed ({patch.upstream}), then update its fingerprint"
        )


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_patch_says_why_and_where_upstream_could_end_it(patch: Patch[...]) -> None:
    assert patch.why
    assert patch.upstream
    assert patch.versions


def test_fingerprint_follows_the_source() -> None:
    target = "verl.utils.py_functional:rename_dict"
    assert source_fingerprint(target) == source_fingerprint(target)
    assert source_fingerprint(target) != source_fingerprint("verl.utils.py_functional:append_to_dict")
    for missing in ("verl.utils.py_functional:no_such", "verl.no_such_module:x", "no_such_package.x:y"):
        with pytest.raises(LookupError):
            source_fingerprint(missing)


def test_patch_is_applied_once() -> None:
    calls: list[int] = []
    patch = _patch(lambda: calls.append(1), "test-once", ">=1")
    registry.apply(patch)
    registry.apply(patch)
    assert calls == [1]
    assert patch in registry.applied()


def test_patch_is_handed_what_it_calls() -> None:
    calls: list[str] = []

    def install(call: Callable[[str], None]) -> None:
        call("handed over")

    patch = Patch(name="test-handed", host="torch", versions=">=1", why="test", upstream="none", install=install)
    registry.apply(patch, calls.append)
    assert calls == ["handed over"]


def test_patch_for_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OVERRIDE_VARIABLE, raising=False)
    with pytest.raises(PatchError, match=r"written for torch <1.* or set VERL_TROLL_ALLOW_UNTESTED=1"):
        registry.apply(_patch(lambda: None, "test-version", "<1"))


def test_metric_names_keep_their_namespace() -> None:
    from verl.trainer.ppo.v1 import trainer_base
    from verl.utils import py_functional

    import verl_troll.plugin  # noqa: F401

    for function in (py_functional.rename_dict, trainer_base.rename_dict):
        assert function({"troll/kl_before": 1, "lr": 2, "actor/pg_loss": 3}, "actor/") == {
            "troll/kl_before": 1,
            "actor/lr": 2,
            "actor/pg_loss": 3,
        }


def test_the_update_is_told_which_version_it_trains() -> None:
    """By verl's own method, with a worker group that keeps what it is sent."""
    from transfer_queue import KVBatchMeta
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    from verl_troll.plugin import carry

    registry.apply(verl_trained_version.PATCH, carry.TRAINED_VERSION)
    actor = {
        "ppo_mini_batch_size": 4,
        "calculate_entropy": False,
        "entropy_coeff": 0.0,
        "ppo_epochs": 1,
        "data_loader_seed": 1,
        "shuffle": False,
    }
    trainer, metrics = mock.Mock(global_steps=5), dict[str, Any]()
    trainer.config = OmegaConf.create({"actor_rollout_ref": {"actor": actor, "rollout": {"n": 2, "temperature": 0.7}}})
    trainer.actor_rollout_wg.update_actor.return_value = {"metrics": {"mfu": [0.5], "pg_loss": [0.25]}}
    batch = KVBatchMeta(keys=["a"], tags=[{}], partition_id="train")
    assert PPOTrainer._update_actor(trainer, batch, metrics=metrics) is batch
    (sent,) = trainer.actor_rollout_wg.update_actor.call_args.args
    assert sent.extra_info[carry.TRAINED_VERSION] == 4
    assert sent.extra_info["global_batch_size"] == 8
    assert metrics == {"perf/mfu/actor": 0.5, "actor/pg_loss": 0.25}


class Actor:
    """Of TransferQueue, as Ray's handle of it."""

    def __init__(self, *, dies: bool = False, busy: bool = False) -> None:
        self.dies, self.busy, self.asked = dies, busy, 0
        self.get_zmq_server_info = self

    def remote(self) -> Actor:
        self.asked += 1
        return self

    @property
    def dead(self) -> bool:
        return self.dies and self.asked > 2


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of TransferQueue that is connected to nothing; Ray knows :class:`Actor`."""
    import ray
    from transfer_queue.client import TransferQueueClient

    import verl_troll.plugin  # noqa: F401

    def get(actor: Actor) -> None:
        if actor.dead:
            raise ray.exceptions.ActorDiedError

    monkeypatch.setattr(transfer_queue_lost, "PATIENCE", 0.01)
    monkeypatch.setattr(ray, "wait", lambda actors, **_: ([actor for actor in actors if not actor.busy], []))
    monkeypatch.setattr(ray, "get", get)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield functools.partial(TransferQueueClient._run_coroutine, mock.Mock(_loop=loop))
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def use(monkeypatch: pytest.MonkeyPatch, controller: Actor, *units: Actor) -> None:
    from transfer_queue import interface

    monkeypatch.setattr(interface, "_TQ_CONTROLLER", controller)
    named = {f"TransferQueueStorageUnit#{number}": unit for number, unit in enumerate(units)}
    monkeypatch.setattr(interface, "_TQ_STORAGE", {"SimpleStorage": named} if units else None)


async def never() -> None:
    await asyncio.Event().wait()


async def at_once() -> str:
    return "answer"


def ask_for_ever(client: Any, request: Callable[[], Any]) -> None:
    while True:
        client(request())


@pytest.mark.parametrize("request_", [never, at_once])
def test_a_lost_actor_of_transfer_queue_is_named(monkeypatch: pytest.MonkeyPatch, client: Any, request_: Any) -> None:
    use(monkeypatch, Actor(dies=True))
    with pytest.raises(RuntimeError, match="has lost its actor TransferQueueController: "):
        ask_for_ever(client, request_)
    use(monkeypatch, Actor(busy=True), Actor(), Actor(dies=True))
    with pytest.raises(RuntimeError, match="has lost its actor TransferQueueStorageUnit#1: "):
        ask_for_ever(client, request_)


def test_transfer_queue_may_take_its_time(monkeypatch: pytest.MonkeyPatch, client: Any) -> None:
    controller = Actor()
    use(monkeypatch, controller)

    async def slow(answer: list[str]) -> str:
        begun = controller.asked
        while controller.asked < begun + 2:
            await asyncio.sleep(0.01)
        return answer.pop()

    assert client(slow(["finished"])) == "finished"
    with pytest.raises(IndexError):
        client(slow([]))
