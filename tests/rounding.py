"""Tolerances in units of the last place, so that no test rests on one processor's rounding.

Instruction sets differ in how they order a sum and in whether they round between a product and a sum. What is
compared must be allowed some units of the last place of the size that is computed with, which is often not that of the
result: a log-probability of -0.1 is the difference of logits of 100.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def last_place(size: float | Tensor, dtype: torch.dtype = torch.float32) -> float:
    """Distance of neighbouring numbers of ``dtype`` at ``size``, or at the largest entry of a tensor."""
    largest = float(size.detach().abs().max()) if isinstance(size, Tensor) else abs(size)
    assert math.isfinite(largest)
    return 2.0 ** (math.frexp(largest)[1] - 1) * torch.finfo(dtype).eps
