"""The attacks run at a small scale, and an attack that finds a fault says so."""

from __future__ import annotations

from unittest import mock

import pytest

from benchmarks.attack import __main__ as command
from benchmarks.attack.attack import Attack, Extent, Outcome


def test_what_fell_is_counted_and_ends_in_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    def half(extent: Extent) -> Outcome:
        outcome = Outcome()
        for number in range(extent.tries(20)):
            outcome.record(number % 2 == 0, f"number {number}")
        return outcome

    known = {
        "half": Attack("half", "numbers are even", half),
        "none": Attack("none", "a GPU", lambda _: Outcome(skipped="no GPU")),
    }
    with mock.patch.object(command, "attacks", return_value=known):
        assert command.main(["--scale", "0.5", "--markdown"]) == 1
        assert command.main(["--only", "none"]) == 0
    printed = capsys.readouterr().out
    assert "tried 10, held 5, fell 5" in printed
    assert "number 1\n" in printed
    assert "| `half` | numbers are even | 10 | 5 | 5 |" in printed
    assert "not tried: no GPU" in printed


@pytest.mark.parametrize("name", ["support"])
def test_at_a_small_scale(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--only", name, "--scale", "0.01"]) == 0
    assert "fell 0" in capsys.readouterr().out
