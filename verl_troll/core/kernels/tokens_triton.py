# mypy: disable-error-code="no-untyped-def"
"""Per-token work in Triton, one program each: choosing the kept ids, and the two terms with their gradient.

The torch forms are :func:`verl_troll.core.support.keep_most_probable`, and :func:`verl_troll.core.comparison.compare`
followed by :func:`verl_troll.core.loss.token_terms`.

Shapes: R rows, one per token; W ids kept of the old policy, M of the new one, V ids of both.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from verl_troll.core.kernels import constants
from verl_troll.core.kernels.logits_triton import on_device
from verl_troll.core.kernels.projection_triton import (
    OUTCOMES_PER_WARP,
    prepare_pair,
    pull_back,
    rough_kl,
    solve,
    solver_constants,
    solver_limits,
)

# Ids per warp of the kernels without a solver.
IDS_PER_WARP = 256
TERMS = 3


def keep(
    ids: Tensor,
    values: Tensor,
    sampled_ids: Tensor,
    sampled_values: Tensor,
    max_logit: Tensor,
    sumexp: Tensor,
    mass_to_keep: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of :class:`verl_troll.core.support.SparsePolicy` from the k largest logits of each row.

    Args:
        ids, values: ``[R, k]`` int64 and float32, by falling value; ``-inf`` where there are fewer.
        sampled_ids, sampled_values: ``[R]`` int64 and ``[R, 1]`` float32.
        max_logit, sumexp: ``[R]`` float32, over the whole vocabulary.
        mass_to_keep: ids are kept while the mass of the more probable ones is below this.

    Returns:
        ids ``[R, k + 1]`` int64, log_probs ``[R, k + 1]`` float32, sampled ``[R]`` int64.
    """
    rows, k = ids.shape
    kept_ids = torch.empty(rows, k + 1, dtype=torch.int64, device=ids.device)
    log_probs = torch.empty(rows, k + 1, dtype=torch.float32, device=ids.device)
    sampled = torch.empty(rows, dtype=torch.int64, device=ids.device)
    if rows > 0:
        width = triton.next_power_of_2(k)
        inputs = (x.contiguous() for x in (ids, values, sampled_ids, sampled_values, max_logit, sumexp))
        with on_device(ids):
            _keep[(rows,)](
                *inputs,
                mass_to_keep,
                kept_ids,
                log_probs,
                sampled,
                k,
                WIDTH=width,
                num_warps=max(1, width // IDS_PER_WARP),
                enable_fp_fusion=False,
            )
    return kept_ids, log_probs, sampled


def terms(
    old_ids: Tensor,
    old_log_probs: Tensor,
    sampled: Tensor,
    new_ids: Tensor | None,
    new_values: Tensor,
    max_logit: Tensor,
    sumexp: Tensor,
    *,
    kl_bound: float,
    tolerance: float,
    implicit: bool,
    vocab_size: int,
    k: int,
    mass_to_keep: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The terms of :func:`verl_troll.core.loss.policy_terms` and their gradients to log-probabilities.

    Args:
        old_ids, old_log_probs: ``[R, W]`` int64 and float32.
        sampled: ``[R]`` int64.
        new_ids: ``[R, M]`` int64, ids kept of the new policy (``union``); None for ``anchored``.
        new_values: ``[R, M]`` their log-probabilities, or ``[R, W]`` logits at ``old_ids``.
        max_logit, sumexp: ``[R]`` of the new policy, over the whole vocabulary.
        kl_bound, tolerance, implicit: as in :func:`verl_troll.core.kernels.project`.
        vocab_size, k, mass_to_keep: those the support was selected with.

    Returns:
        values: ``[3, R]`` log-ratio, regression KL, log-probability of the sampled id.
        statistics: ``[12, R]``, see :data:`verl_troll.core.kernels.constants.STATISTICS`.
        ids: ``[R, V]`` int64 ids whose log-probability the terms depend on, V being W or W + M; negative for none.
        ratio_gradient, regression_gradient: ``[R, V]``, gradients of the first two values to these log-probabilities.
    """
    rows, old_width = old_ids.shape
    new_width = 0 if new_ids is None else new_ids.shape[1]
    device = old_ids.device
    values = torch.empty(TERMS, rows, dtype=torch.float32, device=device)
    statistics = torch.empty(len(constants.STATISTICS), rows, dtype=torch.float32, device=device)
    width = old_width + new_width
    ids = old_ids if new_ids is None else torch.empty(rows, width, dtype=torch.int64, device=device)
    ratio_gradient, regression_gradient = (torch.empty(rows, width, device=device) for _ in range(2))
    if rows > 0:
        lanes = triton.next_power_of_2(width if new_ids is not None else width + 1)
        inputs = (x.contiguous() for x in (old_ids, old_log_probs, sampled))
        new_inputs = (x.contiguous() for x in (old_ids if new_ids is None else new_ids, new_values, max_logit, sumexp))
        with on_device(old_ids):
            _terms[(rows,)](
                *inputs,
                old_width,
                *new_inputs,
                new_width,
                solver_limits(kl_bound, tolerance, device),
                vocab_size,
                k,
                mass_to_keep,
                values,
                statistics,
                ids,
                ratio_gradient,
                regression_gradient,
                UNION=new_ids is not None,
                IMPLICIT=implicit,
                LOG_MISSING=constants.LOG_MISSING,
                REST_FLOOR=constants.REST_FLOOR,
                VARIANCE_FLOOR=constants.VARIANCE_FLOOR,
                **solver_constants(),
                WIDTH=lanes,
                num_warps=max(1, lanes // OUTCOMES_PER_WARP),
                enable_fp_fusion=False,
            )
    return values, statistics, ids, ratio_gradient, regression_gradient


def combine(
    grads: tuple[Tensor, Tensor, Tensor],
    grad_entropy: Tensor | None,
    ratio_gradient: Tensor,
    regression_gradient: Tensor,
    sampled: Tensor,
    sumexp: Tensor,
    energy: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments of :func:`verl_troll.core.kernels.write_gradient`, from gradients to the values of :func:`terms`.

    Args:
        grads: three of ``[R]``, in the order of the values.
        grad_entropy: ``[R]``, or None.
        ratio_gradient, regression_gradient: as :func:`terms` returned them.
        sampled: ``[R]`` int64.
        sumexp, energy: ``[R]`` of the new policy.

    Returns:
        corrections ``[R, V]``, level ``[R]`` and slope ``[R]``, None without the entropy.
    """
    rows, width = ratio_gradient.shape
    sumexp, energy = sumexp.contiguous(), energy.contiguous()
    corrections = torch.empty_like(ratio_gradient)
    level = torch.empty_like(sumexp)
    slope = None if grad_entropy is None else torch.empty_like(sumexp)
    if rows > 0:
        lanes = triton.next_power_of_2(width)
        inputs = [x.contiguous() for x in (*grads, grads[0] if grad_entropy is None else grad_entropy)]
        with on_device(sumexp):
            _combine[(rows,)](
                *inputs,
                ratio_gradient,
                regression_gradient,
                sampled,
                sumexp,
                energy,
                width,
                corrections,
                level,
                level if slope is None else slope,
                SLOPE=slope is not None,
                WIDTH=lanes,
                num_warps=max(1, lanes // IDS_PER_WARP),
                enable_fp_fusion=False,
            )
    return corrections, level, slope


@triton.jit
def _keep(
    ids,
    values,
    sampled_ids,
    sampled_values,
    max_logit_in,
    sumexp_in,
    mass_to_keep,
    ids_out,
    log_probs_out,
    sampled_out,
    k,
    WIDTH: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    here = lane < k
    max_logit = tl.load(max_logit_in + row)
    log_sumexp = tl.log(tl.load(sumexp_in + row))
    log_probs = (tl.load(values + row * k + lane, mask=here, other=-math.inf) - max_logit) - log_sumexp
    has_mass = log_probs > -math.inf
    # Columns without mass come last; their ids are meaningless.
    own = tl.where(has_mass, tl.load(ids + row * k + lane, mask=here, other=-1), -1)
    probs = tl.where(has_mass, tl.exp(log_probs), 0.0)
    before = tl.cumsum(probs, 0) - probs
    kept = (has_mass & (before < mass_to_keep)) | (lane == 0)
    own = tl.where(kept, own, -1)
    log_probs = tl.where(kept, log_probs, -math.inf)

    sampled_id = tl.load(sampled_ids + row)
    sampled_log_prob = (tl.load(sampled_values + row) - max_logit) - log_sumexp
    at = tl.sum(tl.where(own == sampled_id, lane + 1, 0), 0)
    missing = at == 0
    out = row * (k + 1)
    tl.store(ids_out + out + lane, own, mask=here)
    tl.store(log_probs_out + out + lane, log_probs, mask=here)
    tl.store(ids_out + out + k, tl.where(missing, sampled_id, -1))
    tl.store(log_probs_out + out + k, tl.where(missing, sampled_log_prob, -math.inf))
    tl.store(sampled_out + row, tl.where(missing, k, at - 1).to(tl.int64))


@triton.jit
def _log_normaliser(x):
    highest = tl.max(x, 0)
    return highest + tl.log(tl.sum(tl.exp(x - highest), 0))


@triton.jit
def _log_rest(kept_mass, has_rest, REST_FLOOR: tl.constexpr):  # noqa: N803
    rest = tl.log(tl.where(has_rest, tl.maximum(1.0 - kept_mass, REST_FLOOR), 1.0))
    return tl.where(has_rest, rest, -math.inf)


@triton.jit
def _on_union(
    ids,
    log_q,
    at_sampled,
    lane,
    old_ids,
    old_width,
    new_ids,
    new_log_probs,
    row,
    new_width,
    LOG_MISSING: tl.constexpr,  # noqa: N803
):
    """Both policies on the union of their ids: the old policy's first, then those only in the new one's.

    ``ids`` and ``log_q`` hold the old policy's; ``old_ids`` points to them in memory.
    """
    support = ids >= 0
    own = lane - old_width
    in_new = (own >= 0) & (own < new_width)
    new_row = row * new_width
    own_ids = tl.load(new_ids + new_row + own, mask=in_new, other=-1)
    log_p = tl.load(new_log_probs + new_row + own, mask=in_new, other=-math.inf)
    new_mass = tl.sum(tl.exp(log_p), 0)
    # Used lanes come first, except the sampled id's, which may be the last.
    old_used = tl.max(tl.where(support & (lane < old_width - 1), lane + 1, 0), 0)
    known = (own_ids < 0) | (own_ids == tl.load(old_ids + old_width - 1))
    for i in range(old_used):
        known |= own_ids == tl.load(old_ids + i)
    kept = ~known
    ids = tl.where(kept, own_ids, ids)
    new_used = tl.max(tl.where((own_ids >= 0) & (own < new_width - 1), own + 1, 0), 0)
    for step in range(new_used + 1):
        j = tl.where(step < new_used, step, new_width - 1)
        match = support & (ids == tl.load(new_ids + new_row + j))
        log_p = tl.where(match, tl.load(new_log_probs + new_row + j), log_p)
        kept |= match
    used = ids >= 0
    log_p = tl.where(kept, log_p, tl.where(used, LOG_MISSING, -math.inf))
    log_q = tl.where(support, log_q, tl.where(used, LOG_MISSING, -math.inf))
    sampled_log_prob = tl.sum(tl.where(at_sampled, log_p, 0.0), 0)
    log_p = log_p - _log_normaliser(log_p)
    log_q = log_q - _log_normaliser(log_q)
    return ids, kept, log_p, log_q, new_mass, sampled_log_prob, tl.sum(used.to(tl.int32), 0)


@triton.jit
def _terms(
    old_ids,
    old_log_probs,
    sampled_in,
    old_width,
    new_ids,
    new_values,
    max_logit_in,
    sumexp_in,
    new_width,
    limits,
    vocab_size,
    k,
    mass_to_keep,
    values_out,
    statistics_out,
    ids_out,
    ratio_out,
    regression_out,
    UNION: tl.constexpr,  # noqa: N803
    IMPLICIT: tl.constexpr,  # noqa: N803
    LOG_MISSING: tl.constexpr,  # noqa: N803
    REST_FLOOR: tl.constexpr,  # noqa: N803
    VARIANCE_FLOOR: tl.constexpr,  # noqa: N803
    MAX_EVALUATIONS: tl.constexpr,  # noqa: N803
    PATIENCE: tl.constexpr,  # noqa: N803
    LEAST_DIVISOR: tl.constexpr,  # noqa: N803
    LARGEST_DIVISOR: tl.constexpr,  # noqa: N803
    LOG_RATIO_OF_ZERO: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    in_old = lane < old_width
    ids = tl.load(old_ids + row * old_width + lane, mask=in_old, other=-1)
    support = ids >= 0
    log_q = tl.load(old_log_probs + row * old_width + lane, mask=in_old, other=-math.inf)
    log_q = tl.where(support, log_q, -math.inf)
    at_sampled = lane == tl.load(sampled_in + row)
    q = tl.exp(log_q)
    old_mass = tl.sum(q, 0)
    support_size = tl.sum(support.to(tl.int32), 0)
    # The sampled id, if it was added, comes after the k selected ones.
    selected_mass = tl.sum(tl.where(lane < k, q, 0.0), 0)
    cap_hit = (support_size >= k) & (support_size < vocab_size) & (selected_mass < mass_to_keep)

    if UNION:
        own_row = old_ids + row * old_width
        ids, kept, log_p, log_q, new_mass, sampled_log_prob, outcomes = _on_union(
            ids, log_q, at_sampled, lane, own_row, old_width, new_ids, new_values, row, new_width, LOG_MISSING
        )
        here = lane < old_width + new_width
    else:
        value = tl.load(new_values + row * old_width + lane, mask=in_old, other=0.0)
        log_p = (value - tl.load(max_logit_in + row)) - tl.log(tl.load(sumexp_in + row))
        log_p = tl.where(support, log_p, -math.inf)
        sampled_log_prob = tl.sum(tl.where(at_sampled, log_p, 0.0), 0)
        p_ids = tl.exp(log_p)
        new_mass = tl.sum(p_ids, 0)
        has_rest = support_size < vocab_size
        at_rest = lane == old_width
        log_p = tl.where(at_rest, _log_rest(new_mass, has_rest, REST_FLOOR), log_p)
        log_q = tl.where(at_rest, _log_rest(old_mass, has_rest, REST_FLOOR), log_q)
        outcomes = support_size + has_rest.to(tl.int32)
        here = lane < old_width + 1

    # Most tokens are well inside the region and need no float64, which is up to 30 times slower on some GPUs.
    rough = rough_kl(log_p, log_q)
    log_pi = log_p
    of_ratio = tl.where((log_p > -math.inf) & (log_q > -math.inf) & at_sampled, 1.0, 0.0)
    kl_before = rough.to(tl.float64)
    kl = kl_before
    t = kl_before * 0.0 + 1.0
    outside = rough > math.inf
    broken = rough > math.inf
    done = rough < math.inf
    evaluations = tl.full((), 1, tl.int32)
    nan = rough * 0.0
    if ~(rough.to(tl.float64) <= tl.load(limits + 7)):
        log_q64, s, live, broken, escaped, skipped = prepare_pair(
            log_p.to(tl.float64), log_q.to(tl.float64), here, LOG_RATIO_OF_ZERO
        )
        t, kl_before, kl, outside, done, evaluations, mean, variance, log_normaliser = solve(
            log_q64, s, broken, escaped, skipped, limits, MAX_EVALUATIONS, PATIENCE, LEAST_DIVISOR, LARGEST_DIVISOR
        )
        nan = tl.where(broken, math.nan, 0.0)
        if (escaped & ~broken) | outside:
            log_pi = (log_q64 + t * s - log_normaliser).to(tl.float32)
            of_ratio = pull_back(
                of_ratio.to(tl.float64),
                log_q64,
                s,
                live,
                t,
                mean,
                variance,
                log_normaliser,
                outside,
                IMPLICIT=IMPLICIT,
                VARIANCE_FLOOR=VARIANCE_FLOOR,
            ).to(tl.float32)
    log_pi = log_pi + nan
    of_ratio = of_ratio + nan
    log_ratio = tl.sum(tl.where(at_sampled, log_pi - log_q, 0.0), 0)
    # Via an integer: Triton's interpreter cannot broadcast the result of comparing two floats.
    projected = ((kl_before > tl.load(limits)) | broken).to(tl.int32) > 0
    # Inside the region p = pi, and unused lanes have no mass: avoid -inf - (-inf) in both cases.
    counted = projected & (log_p > -math.inf)
    p = tl.where(counted, tl.exp(log_p), 0.0)
    gap = tl.where(counted, log_p - log_pi, 0.0)
    regression = tl.sum(p * gap, 0)

    of_regression = p * (gap + 1.0)
    width = old_width + new_width
    if UNION:
        normalised = tl.exp(log_p)
        of_ratio = tl.where(kept, of_ratio - normalised * tl.sum(of_ratio, 0), 0.0)
        of_regression = tl.where(kept, of_regression - normalised * tl.sum(of_regression, 0), 0.0)
        tl.store(ids_out + row * width + lane, tl.where(kept, ids, -1), mask=lane < width)
    else:
        # d log(1 - sum p) / d log p_i; 0 where the floor applies.
        outer = 1.0 - new_mass
        weight = tl.where(has_rest & (outer >= REST_FLOOR), p_ids / tl.maximum(outer, REST_FLOOR), 0.0)
        of_ratio = of_ratio - weight * tl.sum(tl.where(at_rest, of_ratio, 0.0), 0)
        of_regression = of_regression - weight * tl.sum(tl.where(at_rest, of_regression, 0.0), 0)
    tl.store(ratio_out + row * width + lane, of_ratio, mask=lane < width)
    tl.store(regression_out + row * width + lane, of_regression, mask=lane < width)

    tl.store(values_out + row, log_ratio)
    tl.store(values_out + rows + row, regression)
    tl.store(values_out + 2 * rows + row, sampled_log_prob)
    out = statistics_out + row
    tl.store(out, kl_before.to(tl.float32) + nan)
    tl.store(out + rows, kl.to(tl.float32) + nan)
    tl.store(out + 2 * rows, projected.to(tl.float32))
    tl.store(out + 3 * rows, (projected & (outcomes == 2)).to(tl.float32))
    tl.store(out + 4 * rows, t.to(tl.float32) + nan)
    tl.store(out + 5 * rows, regression)
    tl.store(out + 6 * rows, support_size.to(tl.float32))
    tl.store(out + 7 * rows, old_mass)
    tl.store(out + 8 * rows, new_mass)
    tl.store(out + 9 * rows, cap_hit.to(tl.float32))
    tl.store(out + 10 * rows, evaluations.to(tl.float32))
    tl.store(out + 11 * rows, (~done).to(tl.float32))


@triton.jit
def _combine(
    grad_ratio,
    grad_regression,
    grad_sampled,
    grad_entropy,
    of_ratio,
    of_regression,
    sampled,
    sumexp_in,
    energy_in,
    width,
    corrections_out,
    level_out,
    slope_out,
    SLOPE: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    here = lane < width
    correction = tl.load(grad_ratio + row) * tl.load(of_ratio + row * width + lane, mask=here, other=0.0)
    correction += tl.load(grad_regression + row) * tl.load(of_regression + row * width + lane, mask=here, other=0.0)
    correction += tl.where(lane == tl.load(sampled + row), tl.load(grad_sampled + row), 0.0)
    sumexp = tl.load(sumexp_in + row)
    level = -tl.sum(correction, 0) / sumexp
    if SLOPE:
        # dH / dx_j = -p_j (log p_j + H), and H = log sumexp - energy / sumexp.
        slope = -tl.load(grad_entropy + row) / sumexp
        level -= slope * (tl.load(energy_in + row) / sumexp)
        tl.store(slope_out + row, slope)
    tl.store(corrections_out + row * width + lane, correction, mask=here)
    tl.store(level_out + row, level)
