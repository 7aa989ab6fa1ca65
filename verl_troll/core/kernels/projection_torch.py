"""Solver and gradient of the projection in torch, for all rows at once.

:mod:`verl_troll.core.projection` has the mathematics. Everything is computed in float64, whatever the input.

Shapes: R rows, n outcomes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from verl_troll.core.kernels import constants

Fields = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""log_probs, step_size, kl_before, kl, failure (codes of :mod:`~verl_troll.core.kernels.constants`), evaluations."""


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
    """Moments of pi_t, proportional to q exp(t s), from ``log_q, s [R, n]`` and ``t [R]``."""
    log_normaliser = torch.logsumexp(torch.addcmul(log_q, t.unsqueeze(-1), s), dim=-1)
    log_ratio = t.unsqueeze(-1) * s - log_normaliser.unsqueeze(-1)
    pi = (log_q + log_ratio).exp()
    mean = (pi * s).sum(-1)
    variance, third_moment = _central_moments(pi, s, mean)
    # sum of pi log(pi / q) - (pi - q): no term is negative, whereas t m - A(t) suffers cancellation.
    q = log_q.exp()
    gain = torch.where(log_ratio.abs() < 0.5, q * torch.expm1(log_ratio.clamp(-1.0, 1.0)), pi - q)
    kl = (pi * log_ratio - gain).clamp_min(0.0).sum(-1)
    return _Tilted(kl, mean, variance, third_moment, log_normaliser)


def _central_moments(pi: Tensor, s: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Second and third central moments, each ``[R]``."""
    centred = s - mean.unsqueeze(-1)
    weighted = centred.square().mul_(pi)
    return weighted.sum(-1), weighted.mul_(centred).sum(-1)


def _safe_step_size(log_q: Tensor, s: Tensor, kl_bound: float) -> tuple[Tensor, Tensor]:
    """The larger of two step sizes ``[R]`` at which KL(pi_t || q) is known not to exceed the bound, and range(s).

    By Jensen KL(t) <= t (max s - E_q[s]); by Popoviciu v <= range(s)^2 / 4, so KL(t) <= t^2 range(s)^2 / 8.
    """
    outcome = log_q > -math.inf
    largest = s.masked_fill(~outcome, -math.inf).amax(-1)
    smallest = s.masked_fill(~outcome, math.inf).amin(-1)
    drift = largest - (log_q.exp() * s).sum(-1)
    by_jensen = kl_bound / drift
    by_popoviciu = math.sqrt(8 * kl_bound) / (largest - smallest)
    # Slightly less, so that rounding cannot break the bound.
    return torch.maximum(by_jensen, by_popoviciu).mul(1 - 1e-9).clamp(max=1.0), largest - smallest


def _solve(
    log_q: Tensor, s: Tensor, at_one: _Tilted, kl_bound: float, tolerance: float
) -> tuple[Tensor, _Tilted, Tensor, Tensor]:
    """Step sizes of rows whose KL exceeds the bound at t = 1 (already evaluated once).

    Halley's method (Newton's with curvature) on log KL against log t, inside a bracket that every evaluation
    shrinks. With ``a = t^2 v`` and the third central moment c of s under pi_t::

        d log KL / d log t = a / KL,      d^2 log KL / d (log t)^2 = (2 a + t^3 c) / KL - (a / KL)^2

    Returns:
        ``t [R]``, the moments there, converged ``[R]`` and evaluations ``[R]``.
    """
    lower, target, upper = constants.window(kl_bound, tolerance)

    # Feasible from the start, and not above the window.
    safe, spread = _safe_step_size(log_q, s, kl_bound * (1 - tolerance))
    log_lo = safe.log()
    # Added to log KL, so that rounding cannot break the bound.
    margin = constants.ROUNDING * spread
    log_hi = torch.zeros_like(log_lo)
    log_t = torch.zeros_like(log_lo)
    here = at_one
    log_kl = here.kl.log() + margin
    previous = torch.full_like(log_kl, math.inf)
    done = torch.zeros_like(log_lo, dtype=torch.bool)
    evaluations = torch.ones_like(log_lo, dtype=torch.int32)

    for evaluation in range(2, constants.MAX_EVALUATIONS + 1):
        residual = log_kl - target
        above = residual > 0
        log_hi = torch.where(above & ~done, log_t, log_hi)
        log_lo = torch.where(~above & ~done, torch.maximum(log_t, log_lo), log_lo)
        curved = (2 * log_t).exp() * here.variance
        # Second derivative over squared first derivative.
        bend = here.kl * (2 + log_t.exp() * here.third_moment / here.variance) / curved - 1
        divisor = (1 - 0.5 * residual * bend).clamp(*constants.CURVATURE_RANGE)
        halley = log_t - residual * here.kl / (curved * divisor)
        bisect = ~((halley > log_lo) & (halley < log_hi))
        if evaluation > constants.PATIENCE:
            bisect |= residual.abs() > 0.5 * previous
        previous = residual.abs()
        proposal = torch.where(bisect, 0.5 * (log_lo + log_hi), halley)
        if evaluation == constants.MAX_EVALUATIONS:
            # A row that has not converged by now takes the feasible end of its bracket.
            proposal = log_lo
        log_t = torch.where(done, log_t, proposal)
        here = _tilt(log_q, s, log_t.exp())
        log_kl = here.kl.log() + margin
        evaluations += (~done).int()
        done |= (log_kl <= upper) & (log_kl >= lower)
        # Reading a flag stalls an accelerator but is free on the host.
        if done.device.type == "cpu" and bool(done.all()):
            break

    return log_t.exp(), here, done, evaluations


class Project(torch.autograd.Function):
    """Maps ``new, old [R, n]`` to the fields of :class:`Projection`; closed-form gradient to ``new``."""

    @staticmethod
    def forward(
        ctx: Any, new: Tensor, old: Tensor, kl_bound: float, tolerance: float, implicit: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        log_p, log_q = new.double(), old.double()
        outcome = log_q > -math.inf
        has_mass = log_p > -math.inf
        broken = ~((log_p <= constants.LOG_PROB_LIMIT) & (log_q <= constants.LOG_PROB_LIMIT)).all(-1)
        broken |= (outcome | has_mass).any(-1) & ~(outcome & has_mass).any(-1)
        escaped = (has_mass & ~outcome).any(-1)
        empty = ~outcome.any(-1)
        skipped = broken | empty
        log_p = torch.where(has_mass, log_p.clamp_min(-constants.LOG_PROB_LIMIT), -math.inf)
        log_q = torch.where(outcome, log_q.clamp_min(-constants.LOG_PROB_LIMIT), -math.inf)
        # Rows that cannot be solved are replaced by harmless ones, so that they do not affect the others.
        log_q = torch.where(skipped.unsqueeze(-1), 0.0, log_q)
        log_q = log_q - torch.logsumexp(log_q, dim=-1, keepdim=True)
        s = torch.where(has_mass, log_p - log_q, constants.LOG_RATIO_OF_ZERO)
        s = torch.where(outcome & ~skipped.unsqueeze(-1), s, 0.0)

        step_size = torch.ones_like(s[:, 0])
        at_one = _tilt(log_q, s, step_size)
        kl_before = torch.where(escaped, math.inf, at_one.kl)
        kl = at_one.kl.clone()
        failure = torch.where(broken, constants.NOT_A_DISTRIBUTION, constants.CONVERGED).int()
        evaluations = (~skipped).int()

        outside = (at_one.kl > kl_bound) & ~skipped
        # All other rows stay unchanged.
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
            failure[solved_rows] = torch.where(done, constants.CONVERGED, constants.CAP_REACHED).int()
            evaluations[solved_rows] = count
        log_pi = torch.addcmul(log_q, t.unsqueeze(-1), s) - there.log_normaliser.unsqueeze(-1)
        log_probs[moved] = log_pi.to(new.dtype)

        ctx.save_for_backward(log_pi, s, t, there.mean, there.variance, moved, on_bound, has_mass & outcome, broken)
        ctx.implicit = implicit
        nan = torch.where(broken, math.nan, 0.0)
        scalars = [(x + nan).to(new.dtype) for x in (step_size, kl_before, kl)]
        ctx.mark_non_differentiable(*scalars, failure, evaluations)
        return log_probs, scalars[0], scalars[1], scalars[2], failure, evaluations

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
            flat = variance <= constants.VARIANCE_FLOOR
            inverse = torch.where(flat | ~on_bound, 0.0, 1.0 / torch.where(flat, 1.0, variance))
            along_t = (g * centred).sum(-1, keepdim=True)
            grad_s = grad_s - t * pi * centred * inverse.unsqueeze(-1) * along_t
        result[moved] = torch.where(live[moved], grad_s, 0.0).to(grad.dtype)
        return torch.where(broken.unsqueeze(-1), math.nan, result), None, None, None, None
