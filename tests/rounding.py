"""Tolerances in units of the last place, so that no test depends on one processor's rounding.

Instruction sets differ in the order of sums and in whether they round between a product and a sum. Comparisons must
allow some units in the last place of the operands, which are often larger than the result: a log-probability of -0.1
is the difference of logits of 100.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def last_place(size: float | Tensor, dtype: torch.dtype = torch.float32) -> float:
    """Spacing of ``dtype`` numbers at ``size``, or at a tensor's largest entry."""
    largest = float(size.detach().abs().max()) if isinstance(size, Tensor) else abs(size)
    assert math.isfinite(largest)
    return 2.0 ** (math.frexp(largest)[1] - 1) * torch.finfo(dtype).eps
