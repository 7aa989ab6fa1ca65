"""Triton's interpreter, which takes longer the more lanes a program has, whatever it works on."""

from __future__ import annotations

LANES = 64


def shrink() -> None:
    """Give the kernels of this process as few lanes as a tiny vocabulary needs."""
    from verl_troll.kernels import logits

    logits.READ_LANES = logits.READ_TABLE = logits.WRITE_COLUMNS = LANES
