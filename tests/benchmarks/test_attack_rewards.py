"""The attacks on the rewards hold at a small scale, and fall where the product has a fault."""

from __future__ import annotations

import math
from pathlib import Path
from unittest import mock

import pytest

from benchmarks.attack import rewards
from benchmarks.attack.attack import Attack, Extent, Outcome
from tests.tasks import hostile
from verl_troll.tasks.rewards import cases, sandbox


def attack(name: str, scale: float, folder: Path = Path("/nowhere")) -> Outcome:
    known: dict[str, Attack] = {attack.name: attack for attack in rewards.ATTACKS}
    return known[name].run(Extent(folder, scale))


@pytest.mark.parametrize(
    ("name", "scale"),
    [("reward_numbers", 0.02), ("sandbox_programs", 0.02), ("sandbox_calls", 0.05), ("sandbox_filters", 0.01)],
)
def test_attack_holds(name: str, scale: float, tmp_path: Path) -> None:
    outcome = attack(name, scale, tmp_path)
    assert (outcome.fell, outcome.examples) == (0, [])
    assert outcome.tried > 0


def test_tolerance_for_integers_is_found() -> None:
    def close(got: str, expected: str) -> bool:
        return math.isclose(float(got.split()[1]), float(expected.split()[1]), rel_tol=1e-6)

    with mock.patch.object(cases, "same_text", close):
        assert attack("reward_numbers", 0.005).fell > 0


def test_readable_files_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sandbox.WITHOUT, "landlock")
    monkeypatch.setattr(hostile, "CAN_BE_ANOTHER_USER", False)
    with mock.patch.object(hostile, "PROGRAMS", {"read": ""}):
        outcome = attack("sandbox_programs", 1)
    assert outcome.fell == outcome.tried > 0
    assert "read, for this user" in outcome.examples[0]


@pytest.mark.parametrize("name", ["sandbox_calls", "sandbox_filters"])
def test_allowed_calls_are_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostile, "CAN_BE_ANOTHER_USER", False)
    more = " socket bind listen connect accept sendto recvfrom shutdown"
    sandbox.system_call_filter.cache_clear()
    try:
        with mock.patch.object(sandbox, "ALLOWED_CALLS", sandbox.ALLOWED_CALLS + more):
            assert attack(name, 0.05, tmp_path).fell > 0
    finally:
        sandbox.system_call_filter.cache_clear()
