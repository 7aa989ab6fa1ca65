"""The version check of a Ray cluster's nodes, on a fake Ray; ``trainer/test_two_nodes.py`` uses a real one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

import verl_troll
from verl_troll.plugin import cluster_check
from verl_troll.plugin.cluster_check import ClusterError, check_cluster

A, B, C, D = (letter * 56 for letter in "abcd")
HERE = {"verl_troll": verl_troll.__version__, "verl": importlib.metadata.version("verl")}


@pytest.fixture(autouse=True)
def at_exit(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the process would do when it exits."""
    registered: list[Any] = []
    monkeypatch.setattr("atexit.register", lambda *call: registered.append(call))
    return registered


class FakeRay:
    """Stands in for Ray: answers by node id; the driver runs on the first node."""

    def __init__(self, answers: dict[str, dict[str, str]], idle: tuple[dict[str, Any], ...] = ()) -> None:
        self.answers = answers
        self.idle = idle
        self.asked: list[str] = []
        self.resources: dict[str, Any] = {}

    def nodes(self) -> list[dict[str, Any]]:
        living = [
            {"NodeID": name, "NodeManagerAddress": f"10.0.0.{i}", "Alive": True, "Resources": {"CPU": 4.0}}
            for i, name in enumerate(self.answers)
        ]
        return [*living, *self.idle]

    def get_runtime_context(self) -> FakeRay:
        return self

    def get_node_id(self) -> str:
        return next(iter(self.answers))

    def remote(self, **resources: Any) -> Callable[[Callable[[], dict[str, str]]], Any]:
        self.resources = resources

        def wrap(question: Callable[[], dict[str, str]]) -> Any:
            assert question() == HERE
            # Ray sends the function's code, so running it needs nothing from this package.
            assert question.__qualname__.endswith("<locals>.versions") and question.__closure__ is None
            return SimpleNamespace(options=self.options)

        return wrap

    def options(self, scheduling_strategy: Any) -> Any:
        assert not scheduling_strategy.soft
        node = scheduling_strategy.node_id
        self.asked.append(node)
        return SimpleNamespace(remote=lambda: self.answers[node])

    def get(self, answers: list[dict[str, str]]) -> list[dict[str, str]]:
        return answers


def check(monkeypatch: pytest.MonkeyPatch, fake: FakeRay) -> list[str]:
    """Run the check; the nodes that were asked."""
    monkeypatch.setattr(cluster_check, "ray", fake)
    check_cluster()
    return fake.asked


def test_nodes_like_the_driver_pass_and_take_no_resources(monkeypatch: pytest.MonkeyPatch, at_exit: list[Any]) -> None:
    fake = FakeRay({A: HERE, B: HERE, C: HERE})
    assert check(monkeypatch, fake) == [A, B, C]
    assert fake.resources == {"num_cpus": 0}
    assert at_exit == [(cluster_check.name_lost, fake.nodes())]


def test_the_drivers_own_node_alone_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(monkeypatch, FakeRay({A: HERE})) == []


def test_nodes_that_verl_cannot_use_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    idle = (
        {"NodeID": "dead", "NodeManagerAddress": "10.0.1.0", "Alive": False, "Resources": {"CPU": 4.0}},
        {"NodeID": "head", "NodeManagerAddress": "10.0.1.1", "Alive": True, "Resources": {}},
        {"NodeID": "none", "NodeManagerAddress": "10.0.1.2", "Alive": True, "Resources": {"CPU": 0.0}},
    )
    assert check(monkeypatch, FakeRay({A: HERE}, idle)) == []
    assert check(monkeypatch, FakeRay({A: HERE, B: HERE}, idle)) == [A, B]


def test_every_node_that_differs_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay({A: HERE, B: {**HERE, "verl": "0.1"}, C: HERE, D: {**HERE, "verl_troll": "missing"}})
    with pytest.raises(ClusterError) as raised:
        check(monkeypatch, fake)
    first, *differing, last = str(raised.value).splitlines()
    versions = f"verl_troll {HERE['verl_troll']}, verl {HERE['verl']}"
    assert first == f"2 of 4 nodes of the Ray cluster do not have this driver's {versions}:"
    assert differing == [
        f"  node 10.0.0.1 ({B}): verl_troll {HERE['verl_troll']}, verl 0.1",
        f"  node 10.0.0.3 ({D}): verl_troll missing, verl {HERE['verl']}",
    ]
    assert last.endswith(
        f"pip install 'verl=={HERE['verl']}', and verl_troll {HERE['verl_troll']} from the driver's clone or wheel"
    )


def test_a_node_alone_that_is_not_the_drivers_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver connects from outside the cluster."""
    fake = FakeRay({A: {**HERE, "verl": "0.1"}})
    monkeypatch.setattr(fake, "get_node_id", lambda: D)
    with pytest.raises(ClusterError, match="1 of 1 nodes"):
        check(monkeypatch, fake)


def test_what_is_not_installed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", unknown)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cluster_check._question()() == {"verl_troll": "missing", "verl": "missing"}


def test_a_node_that_was_lost_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as here, socket.create_server(("127.0.0.1", 0)) as gone:
        ports = [server.getsockname()[1] for server in (here, gone)]
        gone.close()
        cluster_check.name_lost(
            {"NodeID": name, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port}
            for name, port in zip(("here", "gone"), ports, strict=True)
        )
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("node 127.0.0.1 (gone) of the Ray cluster does not answer")
