r"""Projection of a categorical policy onto a KL trust region around an old one, with its gradient.

For one token with old policy q, new policy p and bound eps (TROLL, arXiv 2510.03817)::

    pi = argmin KL(pi || p)   subject to   KL(pi || q) <= eps

Write ``s = log p - log q``. The solution interpolates geometrically between the two with a step size t in (0, 1]::

    log pi_i = log q_i + t s_i - A(t),      A(t) = log sum_i q_i exp(t s_i)

    KL(pi_t || q) = t m - A(t),    m = E_pi[s],    d KL / d log t = t^2 v,    v = Var_pi[s]

The paper's multiplier is eta = 1 / t - 1. KL grows with t, so t is 1 where KL(p || q) <= eps and the root of
KL(pi_t || q) = eps elsewhere.

Shapes: R rows (all leading dimensions), n outcomes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from verl_troll.core import kernels

StepSizeGradient = Literal["implicit", "detached"]
STEP_SIZE_GRADIENTS: tuple[str, ...] = get_args(StepSizeGradient)

MAX_EVALUATIONS = 20
# Relative slack below the bound at which a step size is accepted.
TOLERANCE = 1e-3
# From this evaluation on, a step that does not halve the residual is replaced by a bisection.
_PATIENCE = 5
# Least and largest factor by which curvature may divide a Newton step: far from the root it says little.
_CURVATURE_RANGE = (0.3, 4.0)
# Stands in for log(0 / q_i): an outcome that the new policy gives no mass at all.
_LOG_RATIO_OF_ZERO = -1e5
_VARIANCE_FLOOR = 1e-60


@dataclass(frozen=True)
class Projection:
    """Result of :func:`project`; all KL values in nats.

    Attributes:
        log_probs: ``[..., n]`` log pi, normalised; differentiable with respect to the new log-probs.
        step_size: ``[...]`` t in (0, 1]; 1 inside the region.
        kl_before: ``[...]`` KL(p || q).
        kl: ``[...]`` KL(pi || q), never above the bound.
        converged: ``[...]`` bool; False where the step size was not found to tolerance (pi is then still feasible)
            or where the row was not a pair of distributions (all its values are then NaN).
        evaluations: ``[...]`` int32, evaluations of KL(pi_t || q) spent on the row.
    """

    log_probs: Tensor
    step_size: Tensor
    kl_before: Tensor
    kl: Tensor
    converged: Tensor
    evaluations: Tensor


def project(
    new_log_probs: Tensor,
    old_log_probs: Tensor,
    kl_bound: float,
    *,
    step_size_gradient: StepSizeGradient = "implicit",
    tolerance: float | None = None,
) -> Projection:
    """Project ``new_log_probs`` onto ``{pi : KL(pi || old) <= kl_bound}``, row by row.

    Rows inside the region are returned bit for bit. Step sizes are solved for in float64 whatever the input, so that
    ``kl <= kl_bound`` holds in float32 too. One host synchronisation picks the rows outside the region; on an
    accelerator the solver then runs a fixed number of evaluations without another.

    Args:
        new_log_probs: ``[..., n]`` normalised log p. ``-inf`` marks no mass. float32 or float64; lower precisions
            are computed and returned in float32.
        old_log_probs: ``[..., n]`` normalised log q over the same outcomes. ``-inf`` marks "not an outcome here":
            pi has no mass there. No gradient flows to it.
        kl_bound: eps > 0, in nats.
        step_size_gradient: ``implicit`` differentiates through the step size (the paper); ``detached`` treats it as
            a constant.
        tolerance: relative slack below the bound at which a step size is accepted; 1e-3 by default, 1e-10 for
            float64 input.

    Raises:
        ValueError: an argument is out of range or the shapes differ; the message names it.
    """
    _check_arguments(new_log_probs, old_log_probs, kl_bound, step_size_gradient, tolerance)
    dtype = torch.promote_types(new_log_probs.dtype, torch.float32)
    if tolerance is None:
        tolerance = 1e-10 if dtype == torch.float64 else TOLERANCE
    n = new_log_probs.shape[-1]
    leading = new_log_probs.shape[:-1]
    form = kernels.project if kernels.available(new_log_probs.device) else _Project.apply
    log_probs, step_size, kl_before, kl, converged, evaluations = form(
        new_log_probs.to(dtype).reshape(-1, n),
        old_log_probs.detach().to(dtype).reshape(-1, n),
        float(kl_bound),
        float(tolerance),
        step_size_gradient == "implicit",
    )
    return Projection(
        log_probs=log_probs.reshape(*leading, n),
        step_size=step_size.reshape(leading),
        kl_before=kl_before.reshape(leading),
        kl=kl.reshape(leading),
        converged=converged.reshape(leading),
        evaluations=evaluations.reshape(leading),
    )


def _check_arguments(
    new_log_probs: Tensor, old_log_probs: Tensor, kl_bound: float, step_size_gradient: str, tolerance: float | None
) -> None:
    for name, value in (("new_log_probs", new_log_probs), ("old_log_probs", old_log_probs)):
        if not value.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {value.dtype}")
        if value.ndim == 0 or value.shape[-1] == 0:
            raise ValueError(f"{name} must have at least one outcome in its last dimension, got {tuple(value.shape)}")
    if new_log_probs.shape != old_log_probs.shape:
        raise ValueError(
            f"old_log_probs must have the shape of new_log_probs {tuple(new_log_probs.shape)}, "
            f"got {tuple(old_log_probs.shape)}"
        )
    check_projection_settings(kl_bound, step_size_gradient)
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(f"tolerance must lie between 0 and 1, got {tolerance!r}")


def check_projection_settings(kl_bound: float, step_size_gradient: str) -> None:
    """Raise ``ValueError`` naming the setting that is out of range."""
    if not (kl_bound > 0 and math.isfinite(kl_bound)):
        raise ValueError(f"kl_bound must be a finite number above 0 (nats), got {kl_bound!r}")
    if step_size_gradient not in STEP_SIZE_GRADIENTS:
        raise ValueError(f"step_size_gradient must be one of {STEP_SIZE_GRADIENTS}, got {step_size_gradient!r}")


class _Tilted(NamedTuple):
    """pi_t at a given t: its normaliser and the moments of s under it, each ``[R]``."""

    kl: Tensor
    mean: Tensor
    variance: Tensor
    third_moment: Tensor
    log_normaliser: Tensor

    def at(self, rows: Tensor) -> _Tilted:
        return _Tilted(*(x[rows] for x in self))


def _tilt(log_q: Tensor, s: Tensor, t: Tensor) -> _Tilted:
    """Moments of pi_t proportional to q exp(t s), from ``log_q, s [R, n]`` and ``t [R]``."""
    log_normaliser = torch.logsumexp(torch.addcmul(log_q, t.unsqueeze(-1), s), dim=-1)
    log_ratio = t.unsqueeze(-1) * s - log_normaliser.unsqueeze(-1)
    pi = (log_q + log_ratio).exp()
    mean = (pi * s).sum(-1)
    variance, third_moment = _central_moments(pi, s, mean)
    # sum of pi log(pi / q) - (pi - q): no term is negative, whereas t m - A(t) cancels.
    q = log_q.exp()
    gain = torch.where(log_ratio.abs() < 0.5, q * torch.expm1(log_ratio.clamp(-1.0, 1.0)), pi - q)
    kl = (pi * log_ratio - gain).clamp_min(0.0).sum(-1)
    return _Tilted(kl, mean, variance, third_moment, log_normaliser)


def _central_moments(pi: Tensor, s: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Second and third, ``[R]``."""
    centred = s - mean.unsqueeze(-1)
    weighted = centred.square().mul_(pi)
    return weighted.sum(-1), weighted.mul_(centred).sum(-1)


def _safe_step_size(log_q: Tensor, s: Tensor, kl_bound: float) -> Tensor:
    """Largest of two step sizes ``[R]`` at which KL(pi_t || q) is known not to exceed the bound.

    By Jensen KL(t) <= t (max s - E_q[s]); by Popoviciu v <= range(s)^2 / 4, so KL(t) <= t^2 range(s)^2 / 8.
    """
    outcome = log_q > -math.inf
    largest = s.masked_fill(~outcome, -math.inf).amax(-1)
    smallest = s.masked_fill(~outcome, math.inf).amin(-1)
    drift = largest - (log_q.exp() * s).sum(-1)
    by_jensen = kl_bound / drift
    by_popoviciu = math.sqrt(8 * kl_bound) / (largest - smallest)
    # A hair less, so that rounding cannot break the bound.
    return torch.maximum(by_jensen, by_popoviciu).mul(1 - 1e-9).clamp(max=1.0)


def _solve(
    log_q: Tensor, s: Tensor, at_one: _Tilted, kl_bound: float, tolerance: float
) -> tuple[Tensor, _Tilted, Tensor, Tensor]:
    """Step sizes of rows whose KL exceeds the bound at t = 1 (already evaluated once).

    Halley's method on log KL against log t, that is Newton's with curvature, inside a bracket that every evaluation
    shrinks. With ``a = t^2 v`` and the third central moment c of s under pi_t::

        d log KL / d log t = a / KL,      d^2 log KL / d (log t)^2 = (2 a + t^3 c) / KL - (a / KL)^2

    Returns:
        ``t [R]``, the moments there, converged ``[R]`` and evaluations ``[R]``.
    """
    # The window ends short of the bound, so that rounding the result to float32 cannot carry it across.
    upper = math.log(kl_bound) + math.log1p(-0.1 * tolerance)
    lower = math.log(kl_bound) + math.log1p(-tolerance)
    target = 0.5 * (upper + lower)

    # Feasible from the start, and not above the window.
    log_lo = _safe_step_size(log_q, s, kl_bound * (1 - tolerance)).log()
    log_hi = torch.zeros_like(log_lo)
    log_t = torch.zeros_like(log_lo)
    here = at_one
    log_kl = here.kl.log()
    previous = torch.full_like(log_kl, math.inf)
    done = torch.zeros_like(log_lo, dtype=torch.bool)
    evaluations = torch.ones_like(log_lo, dtype=torch.int32)

    for evaluation in range(2, MAX_EVALUATIONS + 1):
        residual = log_kl - target
        above = residual > 0
        log_hi = torch.where(above & ~done, log_t, log_hi)
        log_lo = torch.where(~above & ~done, torch.maximum(log_t, log_lo), log_lo)
        curved = (2 * log_t).exp() * here.variance
        # The second derivative over the square of the first.
        bend = here.kl * (2 + log_t.exp() * here.third_moment / here.variance) / curved - 1
        divisor = (1 - 0.5 * residual * bend).clamp(*_CURVATURE_RANGE)
        halley = log_t - residual * here.kl / (curved * divisor)
        bisect = ~((halley > log_lo) & (halley < log_hi))
        if evaluation > _PATIENCE:
            bisect |= residual.abs() > 0.5 * previous
        previous = residual.abs()
        proposal = torch.where(bisect, 0.5 * (log_lo + log_hi), halley)
        if evaluation == MAX_EVALUATIONS:
            # What has not converged by now ends on the feasible end of its bracket.
            proposal = log_lo
        log_t = torch.where(done, log_t, proposal)
        here = _tilt(log_q, s, log_t.exp())
        log_kl = here.kl.log()
        evaluations += (~done).int()
        done |= (log_kl <= upper) & (log_kl >= lower)
        # Reading a flag stalls an accelerator but is free on the host.
        if done.device.type == "cpu" and bool(done.all()):
            break

    return log_t.exp(), here, done, evaluations


class _Project(torch.autograd.Function):
    """``new, old [R, n]`` to the fields of :class:`Projection`; closed-form gradient to ``new``."""

    @staticmethod
    def forward(
        ctx: Any, new: Tensor, old: Tensor, kl_bound: float, tolerance: float, implicit: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        log_p, log_q = new.double(), old.double()
        outcome = log_q > -math.inf
        has_mass = log_p > -math.inf
        broken = ((log_p == math.inf) | log_p.isnan() | (log_q == math.inf) | log_q.isnan()).any(-1)
        broken |= (outcome | has_mass).any(-1) & ~(outcome & has_mass).any(-1)
        escaped = (has_mass & ~outcome).any(-1)
        empty = ~outcome.any(-1)
        skipped = broken | empty
        # Rows that cannot be solved are replaced by a harmless one, so that they do not touch their neighbours.
        log_q = torch.where(skipped.unsqueeze(-1), 0.0, log_q)
        log_q = log_q - torch.logsumexp(log_q, dim=-1, keepdim=True)
        s = torch.where(has_mass, log_p - log_q, _LOG_RATIO_OF_ZERO)
        s = torch.where(outcome & ~skipped.unsqueeze(-1), s, 0.0)

        step_size = torch.ones_like(s[:, 0])
        at_one = _tilt(log_q, s, step_size)
        kl_before = torch.where(escaped, math.inf, at_one.kl)
        kl = at_one.kl.clone()
        converged = ~broken
        evaluations = (~skipped).int()

        outside = (at_one.kl > kl_bound) & ~skipped
        # All other rows stay as they are.
        moved = (outside | (escaped & ~broken)).nonzero().squeeze(-1)
        log_probs = torch.where(broken.unsqueeze(-1), math.nan, new)
        log_q, s, on_bound = log_q[moved], s[moved], outside[moved]
        t = torch.ones_like(s[:, 0])
        there = at_one.at(moved)
        if moved.numel() > 0:
            found, solved, done, count = _solve(log_q[on_bound], s[on_bound], there.at(on_bound), kl_bound, tolerance)
            solved_rows = moved[on_bound]
            t[on_bound] = found
            there = _Tilted(*(x.index_put((on_bound,), y) for x, y in zip(there, solved, strict=True)))
            step_size[solved_rows] = found
            kl[solved_rows] = solved.kl
            converged[solved_rows] = done
            evaluations[solved_rows] = count
        log_pi = torch.addcmul(log_q, t.unsqueeze(-1), s) - there.log_normaliser.unsqueeze(-1)
        log_probs[moved] = log_pi.to(new.dtype)

        ctx.save_for_backward(log_pi, s, t, there.mean, there.variance, moved, on_bound, has_mass & outcome, broken)
        ctx.implicit = implicit
        nan = torch.where(broken, math.nan, 0.0)
        scalars = [(x + nan).to(new.dtype) for x in (step_size, kl_before, kl)]
        ctx.mark_non_differentiable(*scalars, converged, evaluations)
        return log_probs, scalars[0], scalars[1], scalars[2], converged, evaluations

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor, None, None, None, None]:
        log_pi, s, t, mean, variance, moved, on_bound, live, broken = ctx.saved_tensors
        result = torch.where(live, grad, 0.0)
        g = result[moved].double()
        pi = log_pi.exp()
        t = t.unsqueeze(-1)
        # d log pi_j / d s_i at a fixed step size.
        grad_s = t * (g - pi * g.sum(-1, keepdim=True))
        if ctx.implicit:
            # dt / ds_i = -t pi_i (s_i - m) / v   and   d log pi_j / dt = s_j - m
            centred = s - mean.unsqueeze(-1)
            flat = variance <= _VARIANCE_FLOOR
            inverse = torch.where(flat | ~on_bound, 0.0, 1.0 / torch.where(flat, 1.0, variance))
            along_t = (g * centred).sum(-1, keepdim=True)
            grad_s = grad_s - t * pi * centred * inverse.unsqueeze(-1) * along_t
        result[moved] = torch.where(live[moved], grad_s, 0.0).to(grad.dtype)
        return torch.where(broken.unsqueeze(-1), math.nan, result), None, None, None, None
