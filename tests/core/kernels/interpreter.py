"""Triton's interpreter, whose running time grows with a program's lanes, whatever the data."""

from __future__ import annotations

LANES = 64


def shrink() -> None:
    """Give this process's kernels only the lanes that a tiny vocabulary needs."""
    from verl_troll.core.kernels import logits_triton

    logits_triton.READ_WIDE, logits_triton.READ_TILE_BYTES, logits_triton.WRITE_COLUMNS = 8, 4 * LANES, LANES
    logits_triton.GROUP_COLUMNS = ((1024, 8),)  # type: ignore[assignment]
