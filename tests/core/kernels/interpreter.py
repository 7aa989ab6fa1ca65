"""Triton's interpreter, which takes longer the more lanes a program has, whatever it works on."""

from __future__ import annotations

LANES = 64


def shrink() -> None:
    """Give the kernels of this process as few lanes as a tiny vocabulary needs."""
    from verl_troll.core.kernels import logits_triton

    logits_triton.READ_WIDE, logits_triton.READ_TILE_BYTES, logits_triton.WRITE_COLUMNS = 8, 4 * LANES, LANES
    logits_triton.GROUP_COLUMNS = ((1024, 8),)  # type: ignore[assignment]
