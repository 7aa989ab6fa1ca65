"""The projection in Triton's interpreter (run by ``tests/core/test_kernels.py``)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import FAMILIES, Family, draw
from verl_troll.core import kernels
from verl_troll.core.kernels import projection_torch
from verl_troll.core.kernels.constants import CAP_REACHED, NOT_A_DISTRIBUTION

INF = math.inf
NAN = math.nan
BOUND = 0.05
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-10}
Fields = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Form = Callable[[Tensor, Tensor, float, float, bool], Fields]
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
by_gradient = pytest.mark.parametrize("implicit", [True, False], ids=["implicit", "detached"])


def reference(new: Tensor, old: Tensor, kl_bound: float, tolerance: float, implicit: bool) -> Fields:
    fields: Fields = projection_torch.Project.apply(new, old, kl_bound, tolerance, implicit)
    return fields


def run(form: Form, new: Tensor, old: Tensor, bound: float, implicit: bool, grad: Tensor) -> tuple[Fields, Tensor]:
    new = new.clone().requires_grad_()
    fields = form(new, old, bound, TOLERANCE[new.dtype], implicit)
    assert fields[0].requires_grad and not any(x.requires_grad for x in fields[1:])
    (result,) = torch.autograd.grad(fields[0], new, grad)
    return fields, result


def assert_agree(new: Tensor, old: Tensor, bound: float = BOUND, implicit: bool = True) -> Fields:
    """The torch form's fields and gradient, up to rounding; both search step sizes in the same way."""
    grad = torch.randn(new.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(new.dtype)
    fields, gradient = run(kernels.project, new, old, bound, implicit, grad)
    expected, expected_gradient = run(reference, new, old, bound, implicit, grad)
    close: dict[str, Any] = dict(rtol=1e-9, atol=1e-12) if new.dtype == torch.float64 else dict(rtol=1e-6, atol=1e-6)
    for field, value in zip(fields, expected, strict=True):
        assert field.dtype == value.dtype and field.shape == value.shape
        torch.testing.assert_close(field, value, equal_nan=True, **close)
    torch.testing.assert_close(gradient, expected_gradient, equal_nan=True, **close)
    return fields


@by_dtype
@pytest.mark.parametrize("magnitude", [1e9, 1e12, 1e17, 1e19, 1e37])
def test_log_probabilities_of_any_size(magnitude: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    new, old = (magnitude * torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    new[2:4], old[4:] = new[2:4] / magnitude, old[4:] / magnitude
    new, old = new.log_softmax(-1).to(dtype), old.log_softmax(-1).to(dtype)
    own, gradient = run(kernels.project, new, old, BOUND, True, torch.ones_like(new))
    expected, _ = run(reference, new, old, BOUND, True, torch.ones_like(new))
    # float64 resolves a tilted log-probability to 1e-15 of the largest log-ratio, at most 2e12.
    rounding = 4e-15 * min(magnitude, 1e12)
    torch.testing.assert_close(own[0], expected[0], rtol=1e-5, atol=1e-6 + rounding)
    torch.testing.assert_close(own[3], expected[3], rtol=0, atol=1e-3 * BOUND)
    assert bool((own[3] <= BOUND).all())
    assert bool(gradient.isfinite().all())


@by_dtype
@by_gradient
@pytest.mark.parametrize("family", FAMILIES[::6], ids=str)
def test_families(family: Family, dtype: torch.dtype, implicit: bool) -> None:
    log_p, log_q = (x[:2].to(dtype) for x in draw(family))
    assert_agree(log_p, log_q, family.bound, implicit)


@by_dtype
@pytest.mark.parametrize("n", [1, 2, 7, 300])
def test_widths(n: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n)
    log_q = (2 * torch.randn(3, n, generator=generator, dtype=torch.float64)).log_softmax(-1)
    log_p = (log_q + 2 * torch.randn(3, n, generator=generator, dtype=torch.float64)).log_softmax(-1)
    assert_agree(log_p.to(dtype), log_q.to(dtype))


@by_dtype
@by_gradient
def test_rows_of_every_kind(dtype: torch.dtype, implicit: bool) -> None:
    far = [0.9, 0.04, 0.03, 0.02, 0.01]
    rows = {
        "inside": ([0.2, 0.2, 0.2, 0.2, 0.2], [0.21, 0.19, 0.2, 0.2, 0.2]),
        "outside": (far, [0.2, 0.2, 0.2, 0.2, 0.2]),
        "equal": (far, far),
        "not an outcome here": ([*far[:3], 0.03, 0.0], [0.3, 0.3, 0.2, 0.2, 0.0]),
        "no new mass": ([0.5, 0.5, 0.0, 0.0, 0.0], [0.4, 0.3, 0.1, 0.1, 0.1]),
        "escaped mass, inside": ([0.25, 0.25, 0.25, 0.24, 0.01], [0.25, 0.25, 0.25, 0.25, 0.0]),
        "escaped mass, outside": ([0.01, 0.01, 0.01, 0.01, 0.96], [0.7, 0.1, 0.1, 0.1, 0.0]),
        "one outcome": ([1.0, 0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]),
        "empty": ([0.0] * 5, [0.0] * 5),
        "no outcome": (far, [0.0] * 5),
        "no mass": ([0.0] * 5, far),
        "nothing in common": ([1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0]),
        "new is no number": ([NAN, 0.5, 0.5, 0.0, 0.0], far),
        "old is no number": (far, [NAN, 0.5, 0.5, 0.0, 0.0]),
        "new is infinite": ([INF, 0.5, 0.5, 0.0, 0.0], far),
        "old is infinite": (far, [INF, 0.5, 0.5, 0.0, 0.0]),
    }
    log_p, log_q = (torch.tensor(x, dtype=torch.float64).log().to(dtype) for x in zip(*rows.values(), strict=True))
    log_probs, *_, failure, _ = assert_agree(log_p, log_q, implicit=implicit)
    broken = list(rows)[9:]
    assert bool(log_probs[9:].isnan().all()) and bool((failure[9:] == NOT_A_DISTRIBUTION).all()), broken
    for name in ("inside", "equal", "one outcome", "empty"):
        at = list(rows).index(name)
        assert torch.equal(log_probs[at], log_p[at]), name


@by_dtype
def test_what_is_not_solved_to_tolerance_is_feasible(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verl_troll.core.kernels.constants.MAX_EVALUATIONS", 3)
    log_p, log_q = (x[:3].to(dtype) for x in draw(FAMILIES[13]))
    _, _, kl_before, kl, failure, evaluations = assert_agree(log_p, log_q, FAMILIES[13].bound)
    assert bool((kl_before > FAMILIES[13].bound).all()) and bool((failure == CAP_REACHED).any())
    assert bool((kl <= FAMILIES[13].bound).all()) and bool((evaluations[failure == CAP_REACHED] == 3).all())


@by_gradient
def test_gradient_against_finite_differences(implicit: bool) -> None:
    log_p, log_q = (x[:1, :12].log_softmax(-1) for x in draw(FAMILIES[7]))
    grad = torch.randn(12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (log_probs, t, *_), gradient = run(kernels.project, log_p, log_q, BOUND, implicit, grad.unsqueeze(0))
    assert float(t) < 1

    h = 1e-4
    nudged = torch.cat([log_p + h * torch.eye(12), log_p - h * torch.eye(12)])
    if implicit:
        values = kernels.project(nudged, log_q.expand(24, -1).contiguous(), BOUND, 1e-13, True)[0]
    else:
        values = (log_q + t.unsqueeze(-1) * (nudged - log_q)).log_softmax(-1)
        torch.testing.assert_close((log_q + t.unsqueeze(-1) * (log_p - log_q)).log_softmax(-1), log_probs)
    up, down = (values @ grad).chunk(2)
    torch.testing.assert_close(gradient.squeeze(0), (up - down) / (2 * h), rtol=1e-5, atol=1e-7)


@by_dtype
def test_strides(dtype: torch.dtype) -> None:
    log_p, log_q = (x[:2].to(dtype) for x in draw(FAMILIES[10]))
    wide = torch.full((2, 200), NAN, dtype=dtype)
    wide[:, :96] = log_p
    fields = kernels.project(log_p, log_q, BOUND, 1e-3, True)
    for new, old in ((wide[:, :96], log_q), (log_p.T.contiguous().T, log_q.T.contiguous().T)):
        for field, value in zip(kernels.project(new, old, BOUND, 1e-3, True), fields, strict=True):
            assert torch.equal(field, value)
    new = log_p.clone().requires_grad_()
    (expanded,) = torch.autograd.grad(kernels.project(new, log_q, BOUND, 1e-3, True)[0].sum(), new)
    (dense,) = torch.autograd.grad(kernels.project(new, log_q, BOUND, 1e-3, True)[0], new, torch.ones_like(new))
    assert torch.equal(expanded, dense)


def test_no_rows() -> None:
    none = torch.zeros(0, 5, requires_grad=True)
    fields = kernels.project(none, torch.zeros(0, 5), BOUND, 1e-3, True)
    assert [x.shape[0] for x in fields] == [0] * 6
    fields[0].sum().backward()
    assert none.grad is not None and none.grad.shape == (0, 5)


def test_the_gradient_is_not_differentiable() -> None:
    log_p, log_q = (x[:1, :8].log_softmax(-1) for x in draw(FAMILIES[7]))
    new = log_p.clone().requires_grad_()
    squares = kernels.project(new, log_q, BOUND, 1e-3, True)[0].square().sum()
    (gradient,) = torch.autograd.grad(squares, new, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
