"""The float32 pre-check that spares most tokens the float64 solver (run by ``tests/core/test_kernels.py``)."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.families import FAMILIES, Family, draw
from verl_troll.core.kernels.projection_triton import rough_kl
from verl_troll.core.projection import project

INF, NAN = math.inf, math.nan


@triton.jit
def _rough(new, old, out, n, WIDTH: tl.constexpr):  # noqa: N803
    row = tl.program_id(0)
    place = tl.arange(0, WIDTH)
    here = place < n
    log_p = tl.load(new + row * n + place, mask=here, other=-math.inf)
    log_q = tl.load(old + row * n + place, mask=here, other=-math.inf)
    tl.store(out + row, rough_kl(log_p, log_q))


def rough(new: Tensor, old: Tensor) -> Tensor:
    rows, n = new.shape
    out = torch.full((rows,), 7.0)
    _rough[(rows,)](new.contiguous(), old.contiguous(), out, n, WIDTH=triton.next_power_of_2(n))
    return out


def assert_close_to_float64(log_p: Tensor, log_q: Tensor) -> None:
    """The threshold allows ten times the actual error, near the bound and far below it."""
    exact = project(log_p.double(), log_q.double(), 1e9).kl_before
    found = rough(log_p, log_q).double()
    assert bool(((found - exact).abs() <= 1e-6 + 1e-3 * exact).all()), (found - exact).abs().max()


@pytest.mark.parametrize("family", FAMILIES[::4], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.1, 1e-3])
def test_its_error(family: Family, scale: float) -> None:
    log_p, log_q = (x[:6] for x in draw(family))
    # Ever closer to the old policy.
    log_p = (log_q + scale * (log_p - log_q)).log_softmax(-1)
    assert_close_to_float64(log_p.float(), log_q.float())


def test_unlikely_outcomes_and_unnormalised_rows() -> None:
    generator = torch.Generator().manual_seed(3)
    log_q = torch.randn(40, 66, generator=generator, dtype=torch.float64) * 40
    log_q = log_q.log_softmax(-1)
    log_p = (log_q + 0.3 * torch.randn(40, 66, generator=generator, dtype=torch.float64)).log_softmax(-1)
    log_p[:, ::5] = -INF
    assert_close_to_float64((log_p + 1e-6).float(), (log_q - 1e-6).float())


def test_rows_of_another_kind_are_left_to_the_solver() -> None:
    rows = {
        "escaped mass": ([0.5, 0.4, 0.1], [0.5, 0.5, 0.0]),
        "nothing in common": ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0]),
        "no number, new": ([NAN, 0.5, 0.5], [0.3, 0.3, 0.4]),
        "no number, old": ([0.3, 0.3, 0.4], [NAN, 0.5, 0.5]),
        "infinite": ([INF, 0.5, 0.5], [0.3, 0.3, 0.4]),
        "empty": ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
    }
    log_p, log_q = (torch.tensor(x).log() for x in zip(*rows.values(), strict=True))
    assert bool(rough(log_p, log_q).isnan().all())
    same = torch.tensor([[0.2, 0.3, 0.5]]).log()
    assert rough(same, same).item() == 0
