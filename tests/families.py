"""Synthetic pairs of distributions: 45 families over 96 outcomes, from barely moved to far apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

OUTCOMES = 96
ROWS = 24
SHIFTS = (0.1, 0.3, 1.0, 3.0, 8.0)
BOUNDS = (0.005, 0.05, 0.25)
KINDS = ("flat", "peaked", "defaults")


@dataclass(frozen=True)
class Family:
    """New logits are the old ones plus N(0, shift). ``defaults`` gives ids kept by one side 1e-12 on the other."""

    kind: str
    shift: float
    bound: float

    def __str__(self) -> str:
        return f"{self.kind}-shift{self.shift}-bound{self.bound}"


FAMILIES = tuple(Family(kind, shift, bound) for kind in KINDS for shift in SHIFTS for bound in BOUNDS)


def draw(family: Family) -> tuple[Tensor, Tensor]:
    """``log p, log q [24, 96]`` in float64, normalised."""
    generator = torch.Generator().manual_seed(1 + FAMILIES.index(family))
    scale = 4.0 if family.kind == "peaked" else 1.5
    old = scale * torch.randn(ROWS, OUTCOMES, generator=generator, dtype=torch.float64)
    new = old + family.shift * torch.randn(ROWS, OUTCOMES, generator=generator, dtype=torch.float64)
    log_p, log_q = new.log_softmax(-1), old.log_softmax(-1)
    if family.kind == "defaults":
        side = torch.rand(ROWS, OUTCOMES, generator=generator)
        log_p = torch.where(side < 0.15, math.log(1e-12), log_p).log_softmax(-1)
        log_q = torch.where(side > 0.85, math.log(1e-12), log_q).log_softmax(-1)
    return log_p, log_q
