"""What every training run with TROLL must show."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.run import probe_lines

BOUND = 0.05 * (1 + 1e-5)


def assert_projected_within_bound(rows: list[dict[str, Any]]) -> None:
    """The trust region held in every step, and was active."""
    assert all(row["troll/kl_after_max"] <= BOUND for row in rows)
    assert all(row["troll/unconverged"] == 0 for row in rows)
    assert any(row["troll/projected_share"] > 0.01 for row in rows)
    assert all(row["troll/kl_after"] <= row["troll/kl_before"] for row in rows)


def assert_side_channel_exact(out: Path, steps: int, samples: int, epochs: int, copies: int = 1) -> None:
    """Every sample's support enters each epoch's update bit for bit as it left the old pass.

    Args:
        copies: number of ranks that see a sample's logits, or part of them.
    """
    lines = probe_lines(out)
    old = Counter(line["digest"] for line in lines if line["pass"] == "old")
    update = Counter(line["digest"] for line in lines if line["pass"] == "update")
    assert sum(old.values()) == steps * samples * copies
    assert all(line["kept"] > 0 for line in lines)
    assert update == Counter({digest: count * epochs for digest, count in old.items()})


def assert_every_update_has_the_rollouts_support(out: Path, steps: int, samples: int) -> None:
    """No old pass ran, and every sample entered one update with a support."""
    lines = probe_lines(out)
    assert {line["pass"] for line in lines} == {"update"}
    assert len(lines) == steps * samples
    assert all(line["kept"] > 0 for line in lines)


def assert_ages_are_those_of_the_tokens(out: Path, rows: list[dict[str, Any]], samples: int, updates: int) -> None:
    """The logged ages are those of the tokens in the updates, and agree with verl's staleness of whole trajectories.

    Args:
        samples: of a step, on one rank.
        updates: mini-batches of a step.
    """
    lines = [line for line in probe_lines(out) if line["pass"] == "update"]
    assert len(lines) == len(rows) * samples
    size = samples // updates
    for number, row in enumerate(rows):
        step = lines[number * samples : (number + 1) * samples]
        assert {line["trained"] for line in step} == {row["step"] - 1}
        batches = [
            [line["trained"] - version for line in step[start : start + size] for version in line["versions"]]
            for start in range(0, samples, size)
        ]
        bounds = {"0": (0, 0), "1": (1, 1), "2": (2, 2), "3_4": (3, 4), "5_8": (5, 8), "above_8": (9, 10**9)}
        expected = {
            "troll/age": sum(sum(ages) / len(ages) for ages in batches) / updates,
            "troll/age_max": max(map(max, batches)),
            **{
                f"troll/age_{name}_share": sum(sum(low <= age <= high for age in ages) / len(ages) for ages in batches)
                / updates
                for name, (low, high) in bounds.items()
            },
        }
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-6)
        assert sum(row[f"troll/age_{name}_share"] for name in bounds) == pytest.approx(1, rel=1e-6)
        staleness = "training/off_policy/trajectory_staleness"
        freshest = [line["trained"] - max(line["versions"]) for line in step]
        assert sum(freshest) / samples == pytest.approx(row[f"{staleness}/mean"], rel=1e-6)
        # verl also counts the versions of attempts that were interrupted before their first token.
        assert row[f"{staleness}/max"] <= row["troll/age_max"] <= row[f"{staleness}_worst/max"]
