# mypy: disable-error-code="no-untyped-def"
"""Solver and gradient of the projection in Triton: one kernel forward, one backward, one program per row.

The algorithm is that of :mod:`~verl_troll.core.kernels.projection_torch`, in float64. Each row stops when it has
converged, so rows inside the region cost one evaluation, and the host never waits. The backward pass recomputes log pi
from the inputs and six numbers per row.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from verl_troll.core.kernels import constants
from verl_troll.core.kernels.logits_triton import on_device
from verl_troll.core.kernels.projection_torch import Fields

# Outcomes per warp: one warp (up to 128 outcomes) needs no barrier for its sums; with more than four float64 numbers of
# each kind per thread, registers run out.
OUTCOMES_PER_WARP = 128

# Flags of a row.
_MOVED = tl.constexpr(1)
_ON_BOUND = tl.constexpr(2)
_BROKEN = tl.constexpr(4)

_LIMIT = tl.constexpr(constants.LOG_PROB_LIMIT)
_CONVERGED = tl.constexpr(constants.CONVERGED)
_CAP_REACHED = tl.constexpr(constants.CAP_REACHED)
_NOT_A_DISTRIBUTION = tl.constexpr(constants.NOT_A_DISTRIBUTION)


class Saved(NamedTuple):
    """What :func:`project_gradient` needs for each row besides the inputs.

    Attributes:
        moments: ``[4, R]`` float64: step size, mean and variance of s under pi, log-normaliser of pi.
        flags: ``[R]`` int32.
    """

    moments: Tensor
    flags: Tensor


def project_rows(new: Tensor, old: Tensor, kl_bound: float, tolerance: float) -> tuple[Fields, Saved]:
    """The fields of :class:`~verl_troll.core.projection.Projection` of ``new, old``, and what its gradient needs."""
    rows, n = new.shape
    log_probs = torch.empty(rows, n, dtype=new.dtype, device=new.device)
    step_size, kl_before, kl = (torch.empty(rows, dtype=new.dtype, device=new.device) for _ in range(3))
    failure = torch.empty(rows, dtype=torch.int32, device=new.device)
    evaluations = torch.empty(rows, dtype=torch.int32, device=new.device)
    moments = torch.empty(4, rows, dtype=torch.float64, device=new.device)
    flags = torch.empty(rows, dtype=torch.int32, device=new.device)
    if rows > 0:
        with on_device(new):
            _project[(rows,)](
                new,
                new.stride(0),
                old,
                old.stride(0),
                solver_limits(kl_bound, tolerance, new.device),
                n,
                log_probs,
                step_size,
                kl_before,
                kl,
                failure,
                evaluations,
                moments,
                flags,
                **solver_constants(),
                **_shape(n),
            )
    return (log_probs, step_size, kl_before, kl, failure, evaluations), Saved(moments, flags)


def project_gradient(grad: Tensor, new: Tensor, old: Tensor, saved: Saved, implicit: bool) -> Tensor:
    """Gradient ``[R, n]`` to ``new`` from ``grad [R, n]`` to log pi."""
    rows, n = new.shape
    grad = grad.contiguous()
    result = torch.empty_like(grad)
    if rows > 0:
        with on_device(new):
            _project_gradient[(rows,)](
                grad,
                new,
                new.stride(0),
                old,
                old.stride(0),
                saved.moments,
                saved.flags,
                n,
                result,
                IMPLICIT=implicit,
                LOG_RATIO_OF_ZERO=constants.LOG_RATIO_OF_ZERO,
                VARIANCE_FLOOR=constants.VARIANCE_FLOOR,
                **_shape(n),
            )
    return result


class Project(torch.autograd.Function):
    """Same as :class:`verl_troll.core.kernels.projection_torch.Project`."""

    @staticmethod
    def forward(ctx: Any, new: Tensor, old: Tensor, kl_bound: float, tolerance: float, implicit: bool) -> Fields:
        new, old = (x if x.stride(-1) == 1 else x.contiguous() for x in (new, old))
        fields, saved = project_rows(new, old, kl_bound, tolerance)
        ctx.save_for_backward(new, old, *saved)
        ctx.implicit = implicit
        ctx.mark_non_differentiable(*fields[1:])
        return fields

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor, None, None, None, None]:
        new, old, *saved = ctx.saved_tensors
        return project_gradient(grad, new, old, Saved(*saved), ctx.implicit), None, None, None, None


def solver_constants() -> dict[str, float]:
    """The constants of :func:`prepare_pair` and :func:`solve`."""
    return {
        "MAX_EVALUATIONS": constants.MAX_EVALUATIONS,
        "PATIENCE": constants.PATIENCE,
        "LEAST_DIVISOR": constants.CURVATURE_RANGE[0],
        "LARGEST_DIVISOR": constants.CURVATURE_RANGE[1],
        "LOG_RATIO_OF_ZERO": constants.LOG_RATIO_OF_ZERO,
    }


def _shape(n: int) -> dict[str, int]:
    width = triton.next_power_of_2(n)
    return {"WIDTH": width, "num_warps": max(1, width // OUTCOMES_PER_WARP), "enable_fp_fusion": True}


@functools.lru_cache(maxsize=16)
def solver_limits(kl_bound: float, tolerance: float, device: torch.device) -> Tensor:
    """The solver's numbers as a float64 tensor: Triton would round them to float32 if passed by value."""
    lower, target, upper = constants.window(kl_bound, tolerance)
    safe = kl_bound * (1 - tolerance)
    # A row whose float32 KL is below this is inside the region: that KL's error is less than 1e-6.
    plainly_inside = 0.99 * kl_bound - 1e-5
    numbers = (kl_bound, upper, lower, target, safe, math.sqrt(8 * safe), 1 - 1e-9, plainly_inside, constants.ROUNDING)
    return torch.tensor(numbers, dtype=torch.float64, device=device)


@triton.jit
def _read_pair(
    new,
    new_stride,
    old,
    old_stride,
    row,
    n,
    LOG_RATIO_OF_ZERO: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
):
    """:func:`prepare_pair` for a row in memory."""
    lane = tl.arange(0, WIDTH)
    here = lane < n
    log_p = tl.load(new + row * new_stride + lane, mask=here, other=-math.inf).to(tl.float64)
    log_q = tl.load(old + row * old_stride + lane, mask=here, other=-math.inf).to(tl.float64)
    return prepare_pair(log_p, log_q, here, LOG_RATIO_OF_ZERO)


@triton.jit
def prepare_pair(log_p, log_q, here, LOG_RATIO_OF_ZERO: tl.constexpr):  # noqa: N803
    """Normalised log q and ``s = log p - log q``, made harmless where the row cannot be solved; and the row's kind."""
    outcome = log_q > -math.inf
    has_mass = log_p > -math.inf
    live = outcome & has_mass
    wrong = ~((log_p <= _LIMIT) & (log_q <= _LIMIT))
    comparable = _any(live)
    broken = _any(wrong) | (_any(outcome | has_mass) & ~comparable)
    escaped = _any(has_mass & ~outcome)
    skipped = broken | ~_any(outcome)
    log_p = tl.where(has_mass, tl.maximum(log_p, -_LIMIT), -math.inf)
    log_q = tl.where(outcome, tl.maximum(log_q, -_LIMIT), -math.inf)
    log_q = tl.where(skipped, tl.where(here, 0.0, -math.inf).to(tl.float64), log_q)
    highest = tl.max(log_q, 0)
    log_q = log_q - (highest + tl.log(tl.sum(tl.exp(log_q - highest), 0)))
    s = tl.where(has_mass, log_p - log_q, LOG_RATIO_OF_ZERO)
    s = tl.where(outcome & ~skipped, s, 0.0)
    return log_q, s, live, broken, escaped, skipped


@triton.jit
def _any(condition):
    return tl.max(condition.to(tl.int32), 0) > 0


@triton.jit
def _gain(x):
    """``x exp(x) - expm1(x)`` for ``|x| < 0.5``: the series ``sum_i (i - 1) x^i / i!`` from i = 2 to 17, by Horner."""
    total = tl.full(x.shape, 16.0, x.dtype)
    for i in tl.static_range(16, 1, -1):
        total = total * (x * (1.0 / (i + 1))) + (i - 1.0)
    return 0.5 * x * x * total


@triton.jit
def _tilt(log_q, q, s, t):
    """KL(pi_t || q), mean, variance and third central moment of s under pi_t, and log-normaliser."""
    tilted = log_q + t * s
    highest = tl.max(tilted, 0)
    mass = tl.exp(tilted - highest)
    total = tl.sum(mass, 0)
    log_normaliser = highest + tl.log(total)
    pi = mass / total
    mean = tl.sum(pi * s, 0)
    weighted = pi * (s - mean) * (s - mean)
    variance = tl.sum(weighted, 0)
    third_moment = tl.sum(weighted * (s - mean), 0)
    # sum of pi log(pi / q) - (pi - q): no term is negative, whereas t m - A(t) suffers cancellation.
    log_ratio = t * s - log_normaliser
    near = tl.abs(log_ratio) < 0.5
    terms = tl.where(near, q * _gain(tl.where(near, log_ratio, 0.0)), pi * log_ratio - (pi - q))
    kl = tl.sum(tl.maximum(terms, 0.0), 0)
    return kl, mean, variance, third_moment, log_normaliser


@triton.jit
def rough_kl(log_p, log_q):
    """KL(p || q) of float32 log-probabilities, normalised over the outcomes of q; NaN for any other kind of row."""
    outcome = log_q > -math.inf
    has_mass = log_p > -math.inf
    live = outcome & has_mass
    wrong = ~((log_p <= _LIMIT) & (log_q <= _LIMIT)) | (has_mass & ~outcome)
    regular = _any(live) & ~_any(wrong)
    log_p = tl.where(live, log_p, -math.inf)
    highest_p = tl.max(log_p, 0)
    highest_q = tl.max(log_q, 0)
    p = tl.exp(log_p - highest_p)
    q = tl.exp(log_q - highest_q)
    mass_p = tl.sum(p, 0)
    mass_q = tl.sum(q, 0)
    offset = (highest_p - highest_q) + (tl.log(mass_p) - tl.log(mass_q))
    p = p / mass_p
    q = q / mass_q
    log_ratio = tl.where(live, (log_p - log_q) - offset, 0.0)
    near = live & (tl.abs(log_ratio) < 0.5)
    terms = tl.where(near, q * _gain(tl.where(near, log_ratio, 0.0)), p * log_ratio - (p - q))
    kl = tl.sum(tl.where(outcome, tl.maximum(terms, 0.0), 0.0), 0)
    return tl.where(regular, kl, math.nan)


@triton.jit
def solve(
    log_q,
    s,
    broken,
    escaped,
    skipped,
    limits,
    MAX_EVALUATIONS: tl.constexpr,  # noqa: N803
    PATIENCE: tl.constexpr,  # noqa: N803
    LEAST_DIVISOR: tl.constexpr,  # noqa: N803
    LARGEST_DIVISOR: tl.constexpr,  # noqa: N803
):
    """Step size for one row of :func:`prepare_pair`, the KL at both ends of the step, and the moments of s there."""
    q = tl.exp(log_q)
    kl_bound = tl.load(limits)
    upper = tl.load(limits + 1)
    lower = tl.load(limits + 2)
    target = tl.load(limits + 3)

    zero = kl_bound * 0.0
    t = zero + 1.0
    kl, mean, variance, third_moment, log_normaliser = _tilt(log_q, q, s, t)
    kl_before = tl.where(escaped, math.inf, kl)
    outside = (kl > kl_bound) & ~skipped

    # Halley's method on log KL against log t inside a bracket that every evaluation shrinks; feasible from the start,
    # by Jensen and by Popoviciu.
    outcome = log_q > -math.inf
    largest = tl.max(tl.where(outcome, s, -math.inf), 0)
    smallest = tl.min(tl.where(outcome, s, math.inf), 0)
    by_jensen = tl.load(limits + 4) / (largest - tl.sum(q * s, 0))
    by_popoviciu = tl.load(limits + 5) / (largest - smallest)
    # Slightly less, so that rounding cannot break the bound.
    log_lo = tl.log(tl.minimum(tl.maximum(by_jensen, by_popoviciu) * tl.load(limits + 6), 1.0))
    # Added to log KL, so that rounding cannot break the bound.
    margin = tl.load(limits + 8) * (largest - smallest)
    log_hi = zero
    log_t = zero
    previous = zero + math.inf
    done = ~broken
    evaluations = tl.where(skipped, 0, 1)
    running = outside
    while running:
        log_kl = tl.log(kl) + margin
        residual = log_kl - target
        log_hi = tl.where(residual > 0, log_t, log_hi)
        log_lo = tl.where(residual > 0, log_lo, tl.maximum(log_t, log_lo))
        curved = t * t * variance
        bend = kl * (2.0 + t * third_moment / variance) / curved - 1.0
        divisor = tl.minimum(tl.maximum(1.0 - 0.5 * residual * bend, LEAST_DIVISOR), LARGEST_DIVISOR)
        halley = log_t - residual * kl / (curved * divisor)
        slow = (evaluations >= PATIENCE) & (tl.abs(residual) > 0.5 * previous)
        inside = (halley > log_lo) & (halley < log_hi)
        log_t = tl.where(inside & ~slow, halley, 0.5 * (log_lo + log_hi))
        # A row that has not converged by now takes the feasible end of its bracket.
        log_t = tl.where(evaluations == MAX_EVALUATIONS - 1, log_lo, log_t)
        previous = tl.abs(residual)
        t = tl.exp(log_t)
        kl, mean, variance, third_moment, log_normaliser = _tilt(log_q, q, s, t)
        evaluations += 1
        found = tl.log(kl) + margin
        done = (found <= upper) & (found >= lower)
        running = ~done & (evaluations < MAX_EVALUATIONS)
    return t, kl_before, kl, outside, done, evaluations, mean, variance, log_normaliser


@triton.jit
def pull_back(
    g,
    log_q,
    s,
    live,
    t,
    mean,
    variance,
    log_normaliser,
    on_bound,
    IMPLICIT: tl.constexpr,  # noqa: N803
    VARIANCE_FLOOR: tl.constexpr,  # noqa: N803
):
    """The gradient to log p of a row that was projected, from ``g``, its gradient to log pi."""
    pi = tl.exp(log_q + t * s - log_normaliser)
    # d log pi_j / d s_i at a fixed step size.
    grad_s = t * (g - pi * tl.sum(g, 0))
    if IMPLICIT:
        # dt / ds_i = -t pi_i (s_i - m) / v   and   d log pi_j / dt = s_j - m
        centred = s - mean
        curved = (variance > VARIANCE_FLOOR) & on_bound
        inverse = tl.where(curved, 1.0 / tl.where(curved, variance, 1.0), 0.0)
        grad_s = grad_s - t * pi * centred * inverse * tl.sum(g * centred, 0)
    return tl.where(live, grad_s, 0.0)


@triton.jit
def _project(
    new,
    new_stride,
    old,
    old_stride,
    limits,
    n,
    log_probs_out,
    step_size_out,
    kl_before_out,
    kl_out,
    failure_out,
    evaluations_out,
    moments_out,
    flags_out,
    MAX_EVALUATIONS: tl.constexpr,  # noqa: N803
    PATIENCE: tl.constexpr,  # noqa: N803
    LEAST_DIVISOR: tl.constexpr,  # noqa: N803
    LARGEST_DIVISOR: tl.constexpr,  # noqa: N803
    LOG_RATIO_OF_ZERO: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    log_q, s, _live, broken, escaped, skipped = _read_pair(
        new, new_stride, old, old_stride, row, n, LOG_RATIO_OF_ZERO, WIDTH
    )
    t, kl_before, kl, outside, done, evaluations, mean, variance, log_normaliser = solve(
        log_q, s, broken, escaped, skipped, limits, MAX_EVALUATIONS, PATIENCE, LEAST_DIVISOR, LARGEST_DIVISOR
    )
    moved = (escaped & ~broken) | outside
    lane = tl.arange(0, WIDTH)
    here = lane < n
    dtype: tl.constexpr = log_probs_out.dtype.element_ty
    nan = tl.where(broken, math.nan, 0.0).to(dtype)
    log_pi = (log_q + t * s - log_normaliser).to(dtype)
    log_p = tl.load(new + row * new_stride + lane, mask=here, other=-math.inf)
    tl.store(log_probs_out + row * n + lane, tl.where(moved, log_pi, log_p) + nan, mask=here)
    tl.store(step_size_out + row, t.to(dtype) + nan)
    tl.store(kl_before_out + row, kl_before.to(dtype) + nan)
    tl.store(kl_out + row, kl.to(dtype) + nan)
    tl.store(failure_out + row, tl.where(broken, _NOT_A_DISTRIBUTION, tl.where(done, _CONVERGED, _CAP_REACHED)))
    tl.store(evaluations_out + row, evaluations)
    tl.store(moments_out + row, t)
    tl.store(moments_out + rows + row, mean)
    tl.store(moments_out + 2 * rows + row, variance)
    tl.store(moments_out + 3 * rows + row, log_normaliser)
    flags = tl.where(moved, _MOVED, 0) | tl.where(outside, _ON_BOUND, 0) | tl.where(broken, _BROKEN, 0)
    tl.store(flags_out + row, flags)


@triton.jit
def _project_gradient(
    grad,
    new,
    new_stride,
    old,
    old_stride,
    moments,
    flags_in,
    n,
    result,
    IMPLICIT: tl.constexpr,  # noqa: N803
    LOG_RATIO_OF_ZERO: tl.constexpr,  # noqa: N803
    VARIANCE_FLOOR: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    log_q, s, live, _broken, _escaped, _skipped = _read_pair(
        new, new_stride, old, old_stride, row, n, LOG_RATIO_OF_ZERO, WIDTH
    )
    t = tl.load(moments + row)
    mean = tl.load(moments + rows + row)
    variance = tl.load(moments + 2 * rows + row)
    log_normaliser = tl.load(moments + 3 * rows + row)
    flags = tl.load(flags_in + row)
    lane = tl.arange(0, WIDTH)
    here = lane < n
    g = tl.load(grad + row * n + lane, mask=here, other=0.0).to(tl.float64)
    g = tl.where(live, g, 0.0)
    on_bound = (flags & _ON_BOUND) != 0
    grad_s = pull_back(
        g, log_q, s, live, t, mean, variance, log_normaliser, on_bound, IMPLICIT=IMPLICIT, VARIANCE_FLOOR=VARIANCE_FLOOR
    )
    gradient = tl.where((flags & _MOVED) != 0, grad_s, g)
    gradient = tl.where((flags & _BROKEN) != 0, math.nan, gradient)
    tl.store(result + row * n + lane, gradient.to(result.dtype.element_ty), mask=here)
