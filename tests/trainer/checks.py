"""What every training run with TROLL must show."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

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
