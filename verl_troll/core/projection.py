r"""Projection of a categorical policy onto a KL trust region around an old one, with its gradient.

For one token with old policy q, new policy p and bound eps (TROLL, arXiv 2510.03817)::

    pi = argmin KL(pi || p)   subject to   KL(pi || q) <= eps

Let ``s = log p - log q``. The solution interpolates geometrically between the two with a step size t in (0, 1]::

    log pi_i = log q_i + t s_i - A(t),      A(t) = log sum_i q_i exp(t s_i)

    KL(pi_t || q) = t m - A(t),    m = E_pi[s],    d KL / d log t = t^2 v,    v = Var_pi[s]

The paper's multiplier is eta = 1 / t - 1. KL grows with t, so t = 1 if KL(p || q) <= eps, and otherwise t is the root
of KL(pi_t || q) = eps. With g the gradient to log pi, the gradient to s (equal to that to log p) is::

    t (g - pi sum(g))  -  t pi (s - m) sum(g (s - m)) / v

The second term, the derivative through t, exists outside the region only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from verl_troll.core import kernels
from verl_troll.core.kernels import constants

StepSizeGradient = Literal["implicit", "detached"]
STEP_SIZE_GRADIENTS: tuple[str, ...] = get_args(StepSizeGradient)


@dataclass(frozen=True)
class Projection:
    """Result of :func:`project`; all KL values in nats.

    Attributes:
        log_probs: log pi, normalised; differentiable with respect to the new log-probs.
        step_size: t in (0, 1]; 1 inside the region.
        kl_before: KL(p || q).
        kl: KL(pi || q), never above the bound.
        failure: int32, 0 where the row was solved, :data:`CAP_REACHED` or :data:`NOT_A_DISTRIBUTION`.
        evaluations: int32, evaluations of KL(pi_t || q) spent on the row.
    """

    log_probs: Float[Tensor, "*leading outcomes"]
    step_size: Float[Tensor, "*leading"]
    kl_before: Float[Tensor, "*leading"]
    kl: Float[Tensor, "*leading"]
    failure: Int[Tensor, "*leading"]
    evaluations: Int[Tensor, "*leading"]

    @property
    def converged(self) -> Bool[Tensor, "*leading"]:
        """Where there was no failure."""
        return self.failure == constants.CONVERGED


CAP_REACHED = constants.CAP_REACHED
"""The step size was not found to tolerance within 20 evaluations; pi is feasible all the same."""
NOT_A_DISTRIBUTION = constants.NOT_A_DISTRIBUTION
"""The row is not a pair of distributions (NaN, a value above 1e12, no common outcome); all its values are NaN."""


def project(
    new_log_probs: Tensor,
    old_log_probs: Tensor,
    kl_bound: float,
    *,
    step_size_gradient: StepSizeGradient = "implicit",
    tolerance: float | None = None,
    form: kernels.Form = "auto",
) -> Projection:
    """Project ``new_log_probs`` onto ``{pi : KL(pi || old) <= kl_bound}``, row by row.

    Rows inside the region are returned bit for bit. Step sizes are solved for in float64 whatever the input, so that
    ``kl <= kl_bound`` holds in float32 too. The torch form synchronises with the host once, to pick the rows outside
    the region; the Triton form never does.

    Args:
        new_log_probs: ``[..., n]`` normalised log p. ``-inf`` means no mass. float32 or float64; lower precisions
            are computed and returned in float32. In both arguments, finite values below -1e12 count as -1e12.
        old_log_probs: ``[..., n]`` normalised log q over the same outcomes. ``-inf`` means "not an outcome here":
            pi has no mass there. No gradient flows to it.
        kl_bound: eps > 0, in nats.
        step_size_gradient: ``implicit`` differentiates through the step size (the paper); ``detached`` treats it as
            a constant.
        tolerance: relative slack below the bound at which a step size is accepted; by default 1e-3, or 1e-10 for
            float64 input.
        form: see :data:`verl_troll.core.kernels.Form`.

    Raises:
        ValueError: an argument is out of range or the shapes differ; the message names it.
    """
    _check_arguments(new_log_probs, old_log_probs, kl_bound, step_size_gradient, tolerance)
    dtype = torch.promote_types(new_log_probs.dtype, torch.float32)
    if tolerance is None:
        tolerance = 1e-10 if dtype == torch.float64 else constants.TOLERANCE
    n = new_log_probs.shape[-1]
    leading = new_log_probs.shape[:-1]
    log_probs, *scalars = kernels.project(
        new_log_probs.to(dtype).reshape(-1, n),
        old_log_probs.detach().to(dtype).reshape(-1, n),
        float(kl_bound),
        float(tolerance),
        step_size_gradient == "implicit",
        form=form,
    )
    return Projection(log_probs.reshape(*leading, n), *(scalar.reshape(leading) for scalar in scalars))


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
