"""The projection: against the oracle, its guarantees, its edges and its gradient."""

from __future__ import annotations

import dataclasses
import math

import mpmath
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import oracle
from tests.families import FAMILIES, Family, draw
from verl_troll.core.kernels import constants
from verl_troll.core.projection import CAP_REACHED, NOT_A_DISTRIBUTION, Projection, StepSizeGradient, project

INF = math.inf
BOUND = 0.05
# Default relative slack below the bound for accepting float32 and float64 step sizes.
SLACK = {torch.float32: 1e-3, torch.float64: 1e-10}
by_family = pytest.mark.parametrize("family", FAMILIES, ids=str)
MODES: tuple[StepSizeGradient, ...] = ("implicit", "detached")
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def log_softmax_normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=generator(seed), dtype=torch.float64)).log_softmax(-1)


def pair(rows: int, n: int, *, seed: int, shift: float = 1.5) -> tuple[Tensor, Tensor]:
    """``log p, log q [rows, n]`` in float64."""
    log_q = log_softmax_normal(rows, n, seed=seed)
    noise = torch.randn(rows, n, generator=generator(seed + 1), dtype=torch.float64)
    return (log_q + shift * noise).log_softmax(-1), log_q


def normalised(x: Tensor) -> Tensor:
    return x.double().log_softmax(-1)


def rounding_allowance(log_pi: Tensor, log_q: Tensor, dtype: torch.dtype) -> Tensor:
    """First-order change of KL(pi || q) if every log-probability is off by half a unit in the last place."""
    pi = log_pi.exp()
    half_ulp = torch.finfo(dtype).eps * torch.where(pi > 0, log_pi, 0.0).abs()
    log_ratio = torch.where(pi > 0, log_pi - log_q, 0.0)
    centred = log_ratio - (pi * log_ratio).sum(-1, keepdim=True)
    return (pi * half_ulp * centred.abs()).sum(-1)


def assert_whole_region_used(result: Projection, log_p: Tensor, log_q: Tensor, bound: float) -> None:
    """Rows that the solver finished end within the accepted slack of the bound, and what rounding takes of it."""
    log_p, log_q = normalised(log_p), normalised(log_q)
    s = torch.where(log_q > -math.inf, log_p - log_q, 0.0)
    slack = 1.01 * SLACK[result.log_probs.dtype] + 2 * constants.ROUNDING * (s.amax(-1) - s.amin(-1))
    least = (bound * (1 - slack)).to(result.kl.dtype)
    finished = result.converged & (result.kl_before > bound)
    assert bool((result.kl >= least)[finished].all())


def assert_feasible(result: Projection, log_q: Tensor, bound: float) -> None:
    """KL(pi || q) <= bound, both as reported and as recomputed from the result."""
    dtype = result.log_probs.dtype
    assert bool((result.kl <= bound * (1 + 1e-5)).all())
    log_pi, log_q = normalised(result.log_probs), normalised(log_q)
    excess = oracle.kl(log_pi, log_q) - bound * (1 + 1e-5) - rounding_allowance(log_pi, log_q, dtype) - 1e-15
    assert bool((excess <= 0).all())


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


# --- against the oracle -----------------------------------------------------------------------------------------------


@by_family
@by_dtype
def test_families_agree_with_the_oracle(family: Family, dtype: torch.dtype) -> None:
    log_p, log_q = (x.to(dtype) for x in draw(family))
    result = project(log_p, log_q, family.bound)
    log_p, log_q = normalised(log_p), normalised(log_q)
    eta = oracle.multiplier(log_p, log_q, family.bound)
    expected = oracle.interpolate(log_p, log_q, eta)
    t = 1 / (1 + eta)

    active = eta > 0
    assert bool(((result.step_size < 1) == active).all())
    pi, s = expected.exp(), log_p - log_q
    mean = (pi * s).sum(-1)
    variance = (pi * (s - mean.unsqueeze(-1)).square()).sum(-1)
    # Effect of the accepted slack below the bound: dt = dKL / (t v), and sum |d pi| <= sqrt(v) dt.
    slack = torch.where(active, 1.1 * SLACK[dtype] * family.bound, 0.0)
    rounding = 2e-6 if dtype == torch.float32 else 1e-12
    distance = (result.log_probs.double().exp() - pi).abs().sum(-1)
    assert bool((distance <= slack / (t * variance.sqrt()) + rounding).all())
    step_error = (result.step_size.double() - t).abs()
    assert bool((step_error <= slack / (t * variance) + rounding * t).all())
    torch.testing.assert_close(result.kl_before.double(), oracle.kl(log_p, log_q), rtol=rounding, atol=1e-7)
    recomputed = oracle.kl(normalised(result.log_probs), log_q)
    torch.testing.assert_close(result.kl.double(), recomputed, rtol=2e-4 if dtype == torch.float32 else 1e-9, atol=1e-8)


@by_family
@by_dtype
def test_families_are_feasible_and_use_the_whole_region(family: Family, dtype: torch.dtype) -> None:
    log_p, log_q = (x.to(dtype) for x in draw(family))
    result = project(log_p, log_q, family.bound)
    assert_feasible(result, log_q, family.bound)
    assert bool(result.converged.all())
    assert_whole_region_used(result, log_p, log_q, family.bound)
    torch.testing.assert_close(
        result.log_probs.double().logsumexp(-1), torch.zeros(log_p.shape[0], dtype=torch.float64), rtol=0, atol=2e-6
    )


@by_dtype
def test_evaluations_are_few_on_the_families(dtype: torch.dtype) -> None:
    means = []
    for family in FAMILIES:
        log_p, log_q = (x.to(dtype) for x in draw(family))
        evaluations = project(log_p, log_q, family.bound).evaluations
        assert evaluations.dtype == torch.int32
        assert int(evaluations.max()) <= constants.MAX_EVALUATIONS == 20
        to_a_thousandth = project(log_p, log_q, family.bound, tolerance=1e-3).evaluations
        assert float(to_a_thousandth.double().mean()) <= 6, str(family)
        means.append(float(evaluations.double().mean()))
    assert sum(means) / len(means) <= 5


@by_family
def test_gradient_agrees_with_the_oracle_on_the_families(family: Family) -> None:
    log_p, log_q = draw(family)
    weight = torch.randn(log_p.shape, generator=generator(3), dtype=torch.float64)
    for implicit in (True, False):
        ours = log_p.clone().requires_grad_()
        theirs = log_p.clone().requires_grad_()
        mode: StepSizeGradient = "implicit" if implicit else "detached"
        pi = project(ours.log_softmax(-1), log_q, family.bound, step_size_gradient=mode, tolerance=1e-12).log_probs
        torch.autograd.backward((pi.exp() * weight).sum())
        reference = oracle.project(theirs.log_softmax(-1), log_q, family.bound, implicit=implicit)
        torch.autograd.backward((reference.exp() * weight).sum())
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-8)


# --- guarantees -------------------------------------------------------------------------------------------------------

logits_of = st.floats(-12, 12, allow_nan=False, width=32)


@st.composite
def pairs(draw_from: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Unequal ``log p, log q [rows, n]`` in float32; either may have outcomes with almost no mass."""
    n = draw_from(st.integers(1, 12))
    rows = draw_from(st.integers(1, 4))
    values = draw_from(st.lists(logits_of, min_size=2 * rows * n, max_size=2 * rows * n))
    scale = draw_from(st.sampled_from([0.01, 0.1, 1.0, 10.0, 1000.0]))
    both = (scale * torch.tensor(values, dtype=torch.float32)).reshape(2, rows, n).log_softmax(-1)
    if draw_from(st.booleans()):
        low = torch.tensor(draw_from(st.lists(st.booleans(), min_size=both.numel(), max_size=both.numel())))
        both = torch.where(low.reshape(both.shape), math.log(1e-12), both).log_softmax(-1)
    return both[0], both[1]


bounds = st.sampled_from([1e-4, 0.005, 0.05, 0.25, 1.0, 5.0])


far = (
    torch.tensor([[-10859.375] * 5 + [-27.631, -27.631, -27.631, -10859.375, 0.0, -20109.375, -10859.375]]),
    torch.tensor([[-12000.0] * 5 + [-26.9379, -26.9379, -10250.0, 0.0, -26.9379, -26.9379, -12000.0]]),
)


@settings(deadline=None, max_examples=150)
@given(pairs(), bounds, st.sampled_from([torch.float32, torch.float64]))
@example(far, 0.005, torch.float64)
def test_any_input_is_projected_into_the_region(both: tuple[Tensor, Tensor], bound: float, dtype: torch.dtype) -> None:
    log_p, log_q = (x.to(dtype) for x in both)
    result = project(log_p, log_q, bound)
    assert_feasible(result, log_q, bound)
    assert bool(result.log_probs.isfinite().all())
    assert bool(((result.step_size > 0) & (result.step_size <= 1)).all())
    assert int(result.evaluations.max()) <= constants.MAX_EVALUATIONS
    inside = result.kl_before <= bound
    assert same_bits(result.log_probs[inside], log_p[inside])
    assert_whole_region_used(result, log_p, log_q, bound)


@settings(deadline=None, max_examples=60)
@given(pairs(), bounds)
def test_any_gradient_is_finite(both: tuple[Tensor, Tensor], bound: float) -> None:
    logits = both[0].clone().requires_grad_()
    result = project(logits.log_softmax(-1), both[1], bound)
    torch.autograd.backward(result.log_probs.exp().square().sum())
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("cap", [2, 3, 4])
def test_a_row_cut_short_ends_inside_the_region(monkeypatch: pytest.MonkeyPatch, cap: int) -> None:
    monkeypatch.setattr(constants, "MAX_EVALUATIONS", cap)
    unfinished = 0
    for family in FAMILIES:
        log_p, log_q = draw(family)
        result = project(log_p, log_q, family.bound)
        assert_feasible(result, log_q, family.bound)
        assert int(result.evaluations.max()) <= cap
        assert bool((result.converged | (result.kl_before > family.bound)).all())
        assert bool((result.failure[~result.converged] == CAP_REACHED).all())
        unfinished += int((~result.converged).sum())
    assert unfinished > 0


def test_a_row_cut_short_where_nothing_varies_passes_finite_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "MAX_EVALUATIONS", 2)
    log_q = torch.tensor([[0.0, -800.0]], dtype=torch.float64)
    log_p = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log().requires_grad_()
    result = project(log_p, log_q, BOUND)
    assert not bool(result.converged)
    assert bool((result.kl <= BOUND).all())
    torch.autograd.backward(result.log_probs.sum())
    assert log_p.grad is not None
    assert bool(log_p.grad.isfinite().all())


@pytest.mark.parametrize("tolerance", [1e-15, 1e-12, 0.5])
def test_any_tolerance_is_feasible(tolerance: float) -> None:
    log_p, log_q = pair(32, 20, seed=5)
    result = project(log_p, log_q, BOUND, tolerance=tolerance)
    assert_feasible(result, log_q, BOUND)
    assert int(result.evaluations.max()) <= constants.MAX_EVALUATIONS


def test_a_tighter_tolerance_ends_nearer_the_bound() -> None:
    log_p, log_q = pair(32, 20, seed=6)
    for tolerance in (0.3, 1e-2, 1e-5, 1e-9):
        result = project(log_p, log_q, BOUND, tolerance=tolerance)
        active = result.kl_before > BOUND
        assert bool(result.converged.all())
        assert int(active.sum()) > 16
        assert bool((result.kl[active] >= BOUND * (1 - 1.01 * tolerance)).all())


@by_dtype
def test_rows_inside_the_region_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    log_p, log_q = (x.to(dtype) for x in pair(64, 20, seed=7, shift=0.1))
    # Not quite normalised, like float32 log-probabilities, yet returned unchanged.
    log_p = log_p + 1e-6 * torch.randn(64, 1, generator=generator(8)).to(dtype)
    given_rows = log_p.clone().requires_grad_()
    result = project(given_rows, log_q, BOUND)
    assert bool((result.kl_before <= BOUND).all())
    assert same_bits(result.log_probs.detach(), log_p)
    assert bool((result.step_size == 1).all())
    assert bool((result.evaluations == 1).all())
    assert bool((result.kl == result.kl_before).all())
    weight = torch.randn(64, 20, generator=generator(9)).to(dtype)
    torch.autograd.backward((result.log_probs * weight).sum())
    assert given_rows.grad is not None
    assert same_bits(given_rows.grad, weight)


def test_equal_policies_have_no_divergence_at_all() -> None:
    log_p = log_softmax_normal(16, 30, seed=10, scale=3.0).float()
    result = project(log_p, log_p.clone(), 1e-12)
    assert bool((result.kl_before.abs() <= 1e-13).all())
    assert same_bits(result.log_probs, log_p)


@settings(deadline=None, max_examples=40)
@given(st.randoms(use_true_random=False), bounds)
def test_the_order_of_outcomes_does_not_matter(random: object, bound: float) -> None:
    log_p, log_q = pair(6, 9, seed=11)
    order = list(range(9))
    random.shuffle(order)  # type: ignore[attr-defined]
    plain = project(log_p, log_q, bound)
    permuted = project(log_p[:, order], log_q[:, order], bound)
    torch.testing.assert_close(permuted.log_probs, plain.log_probs[:, order], rtol=0, atol=1e-9)
    torch.testing.assert_close(permuted.step_size, plain.step_size, rtol=1e-9, atol=0)


def test_kl_and_step_size_grow_with_the_bound() -> None:
    log_p, log_q = pair(40, 30, seed=12)
    previous: Projection | None = None
    for bound in (1e-6, 1e-4, 0.005, 0.01, 0.05, 0.25, 1.0, 4.0):
        result = project(log_p, log_q, bound)
        if previous is not None:
            assert bool((result.kl >= previous.kl).all())
            assert bool((result.step_size >= previous.step_size).all())
            grew = previous.step_size < 1
            assert bool((result.kl[grew] > previous.kl[grew]).all())
            assert bool((result.step_size[grew] > previous.step_size[grew]).all())
        previous = result
    assert previous is not None
    assert bool((previous.step_size == 1).any())


# --- ends and edges ---------------------------------------------------------------------------------------------------


def test_a_policy_just_outside_the_region_hardly_moves() -> None:
    log_p, log_q = pair(32, 20, seed=13)
    for row in range(32):
        bound = float(oracle.kl(log_p[row], log_q[row])) * (1 - 1e-6)
        result = project(log_p[row], log_q[row], bound)
        assert 1 - 1e-5 < float(result.step_size) < 1
        torch.testing.assert_close(result.log_probs, log_p[row], rtol=0, atol=1e-4)
        above = project(log_p[row], log_q[row], bound * (1 + 2e-6))
        assert same_bits(above.log_probs, log_p[row])


@pytest.mark.parametrize("bound", [1e-6, 1e-9, 1e-12])
def test_a_tiny_bound_returns_nearly_the_old_policy(bound: float) -> None:
    log_p, log_q = pair(32, 20, seed=14, shift=3.0)
    # Float64 cannot resolve the default tolerance in a KL of 1e-12.
    result = project(log_p, log_q, bound, tolerance=1e-3)
    assert bool(result.converged.all())
    # By Pinsker |pi - q|_1 <= sqrt(2 KL).
    distance = (result.log_probs.exp() - log_q.exp()).abs().sum(-1)
    assert float(distance.max()) <= math.sqrt(2 * bound) * (1 + 1e-4)
    assert float(result.step_size.max()) <= 10 * math.sqrt(bound)
    assert_feasible(result, log_q, bound)


@pytest.mark.parametrize("bound", [1e-30, 1e-300])
def test_a_vanishing_bound_gives_finite_values_and_gradients(bound: float) -> None:
    log_p, log_q = pair(8, 6, seed=15)
    logits = log_p.clone().requires_grad_()
    result = project(logits.log_softmax(-1), log_q, bound)
    torch.autograd.backward(result.log_probs[:, 0].sum())
    assert bool(result.log_probs.isfinite().all())
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


@by_dtype
def test_an_outcome_the_new_policy_dropped_keeps_no_mass(dtype: torch.dtype) -> None:
    log_p, log_q = pair(16, 12, seed=16)
    # Little old mass on the dropped outcomes, so the bound can be met.
    log_q = torch.cat([log_q[:, :-1], torch.full((16, 1), -8.0, dtype=torch.float64)], dim=-1).log_softmax(-1)
    log_p = torch.cat([log_p[:, :-1], torch.full((16, 1), -INF, dtype=torch.float64)], dim=-1).log_softmax(-1)
    result = project(log_p.to(dtype), log_q.to(dtype), BOUND)
    assert bool(result.converged.all())
    assert bool((result.log_probs[:, -1].exp() < 1e-20).all())
    expected = oracle.project(normalised(log_p.to(dtype)), normalised(log_q.to(dtype)), BOUND)
    atol = 2e-3 if dtype == torch.float32 else 1e-8
    torch.testing.assert_close(result.log_probs.double()[:, :-1], expected[:, :-1], rtol=0, atol=atol)
    assert_feasible(result, log_q.to(dtype), BOUND)


def test_dropping_most_of_the_old_mass_stays_feasible_with_finite_gradients() -> None:
    log_q = torch.tensor([[0.9, 0.06, 0.04], [0.5, 0.3, 0.2]]).log()
    logits = torch.tensor([[-INF, 0.0, 1.0], [-INF, 2.0, -1.0]], requires_grad=True)
    result = project(logits.log_softmax(-1), log_q, BOUND)
    assert bool((result.kl <= BOUND).all())
    assert bool((oracle.kl(normalised(result.log_probs), normalised(log_q)) <= BOUND * (1 + 1e-4)).all())
    torch.autograd.backward(result.log_probs[:, 1].sum())
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("bound", [0.01, 1e-3, 3e-4, 1e-4, 1e-5])
def test_two_evenly_split_outcomes_converge_as_fast_as_others(bound: float) -> None:
    # KL(t) <= t^2 range(s)^2 / 8 is nearly an equality here.
    log_q = torch.tensor([[0.5, 0.5]]).log()
    result = project(torch.tensor([[0.95, 0.05]]).log(), log_q, bound)
    assert bool(result.converged.all())
    assert int(result.evaluations.max()) <= 8
    assert_feasible(result, log_q, bound)


def test_outcomes_with_tiny_old_mass_are_solved() -> None:
    log_p, log_q = pair(16, 12, seed=17)
    log_q = log_q.clone()
    log_q[:, 3] = -40.0
    log_q[:, 7] = -90.0
    log_q = log_q.log_softmax(-1)
    result = project(log_p, log_q, BOUND)
    assert bool(result.converged.all())
    assert_feasible(result, log_q, BOUND)
    torch.testing.assert_close(result.log_probs, oracle.project(log_p, log_q, BOUND), rtol=0, atol=1e-7)


@pytest.mark.parametrize("shift", [0.05, 2.0])
def test_outcomes_impossible_under_the_old_policy_get_no_mass(shift: float) -> None:
    log_p, log_q = pair(16, 12, seed=18, shift=shift)
    log_q = log_q.clone()
    log_q[:, [2, 9]] = -INF
    log_q = log_q.log_softmax(-1)
    given_rows = log_p.clone().requires_grad_()
    result = project(given_rows, log_q, BOUND)
    assert bool((result.kl_before == INF).all())
    assert bool(result.converged.all())
    assert bool((result.log_probs[:, [2, 9]] == -INF).all())
    live = [i for i in range(12) if i not in (2, 9)]
    expected = oracle.project(log_p[:, live].log_softmax(-1), log_q[:, live], BOUND)
    torch.testing.assert_close(result.log_probs.detach()[:, live], expected, rtol=0, atol=1e-8)
    torch.autograd.backward(result.log_probs[:, live].square().sum())
    reference = log_p.clone().requires_grad_()
    torch.autograd.backward(oracle.project(reference[:, live].log_softmax(-1), log_q[:, live], BOUND).square().sum())
    assert given_rows.grad is not None
    assert reference.grad is not None
    torch.testing.assert_close(given_rows.grad, reference.grad, rtol=1e-6, atol=1e-6)


@by_dtype
def test_padding_outcomes_change_nothing(dtype: torch.dtype) -> None:
    log_p, log_q = (x.to(dtype) for x in pair(24, 10, seed=19, shift=0.6))
    wide = [torch.cat([x, torch.full((24, 5), -INF, dtype=dtype)], dim=-1) for x in (log_p, log_q)]
    narrow_in, wide_in = log_p.clone().requires_grad_(), wide[0].clone().requires_grad_()
    narrow, padded = project(narrow_in, log_q, BOUND), project(wide_in, wide[1], BOUND)
    assert 0 < int((narrow.step_size < 1).sum()) < 24
    tiny = 1e-6 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(padded.log_probs[:, :10], narrow.log_probs, rtol=0, atol=tiny)
    assert bool((padded.log_probs[:, 10:] == -INF).all())
    torch.testing.assert_close(padded.kl, narrow.kl, rtol=tiny, atol=tiny)
    assert torch.equal(padded.converged, narrow.converged)
    weight = torch.randn(24, 10, generator=generator(20)).to(dtype)
    torch.autograd.backward((narrow.log_probs * weight).sum())
    torch.autograd.backward((padded.log_probs[:, :10] * weight).sum())
    assert narrow_in.grad is not None
    assert wide_in.grad is not None
    torch.testing.assert_close(wide_in.grad[:, :10], narrow_in.grad, rtol=1e-4, atol=10 * tiny)
    assert bool((wide_in.grad[:, 10:] == 0).all())


def test_a_single_outcome_is_left_alone() -> None:
    zeros = torch.zeros(3, 1, requires_grad=True)
    result = project(zeros, torch.zeros(3, 1), BOUND)
    assert same_bits(result.log_probs.detach(), torch.zeros(3, 1))
    assert bool((result.kl == 0).all())
    assert bool(result.converged.all())
    torch.autograd.backward(result.log_probs.sum())
    padded = torch.tensor([[0.0, -INF, -INF]])
    assert same_bits(project(padded, padded.clone(), BOUND).log_probs, padded)


def test_a_single_common_outcome_takes_all_mass_and_passes_no_gradient() -> None:
    log_p = torch.tensor([[0.3, 0.7]]).log().requires_grad_()
    result = project(log_p, torch.tensor([[0.0, -INF]]), BOUND)
    assert result.log_probs.tolist() == [[0.0, -INF]]
    torch.autograd.backward(result.log_probs[:, 0].sum())
    assert log_p.grad is not None
    assert bool((log_p.grad == 0).all())


def test_uniform_policies_are_inside_and_a_uniform_new_policy_is_projected() -> None:
    uniform = torch.zeros(4, 50).log_softmax(-1)
    assert same_bits(project(uniform, uniform.clone(), 1e-9).log_probs, uniform)
    log_q = log_softmax_normal(4, 50, seed=21, scale=3.0).float()
    result = project(uniform, log_q, BOUND)
    assert bool(result.converged.all())
    assert_feasible(result, log_q, BOUND)


@by_dtype
def test_huge_logits_are_solved(dtype: torch.dtype) -> None:
    new = 1e4 * torch.randn(32, 20, generator=generator(22), dtype=torch.float64).to(dtype)
    old = 1e4 * torch.randn(32, 20, generator=generator(23), dtype=torch.float64).to(dtype)
    given_rows = new.clone().requires_grad_()
    result = project(given_rows.log_softmax(-1), old.log_softmax(-1), BOUND)
    assert bool((result.kl <= BOUND * (1 + 1e-5)).all())
    assert bool(result.converged.all())
    assert_feasible(result, old.log_softmax(-1), BOUND)
    torch.autograd.backward(result.log_probs.exp().square().sum())
    assert given_rows.grad is not None
    assert bool(given_rows.grad.isfinite().all())


def exact_kl(log_pi: Tensor, log_q: Tensor) -> float:
    """KL in nats with 60 digits; q is normalised first, finite values below -1e12 counting as -1e12."""
    with mpmath.workdps(60):
        old = [mpmath.mpf(max(x, -1e12)) if x > -INF else None for x in log_q.tolist()]
        total = mpmath.log(mpmath.fsum(mpmath.exp(x) for x in old if x is not None))
        new = [(mpmath.mpf(x), y) for x, y in zip(log_pi.tolist(), old, strict=True) if x > -INF]
        assert all(y is not None for _, y in new)
        return float(mpmath.fsum(mpmath.exp(x) * (x - (y - total)) for x, y in new))


@by_dtype
@pytest.mark.parametrize("magnitude", [1e5, 1e9, 1e12, 1e15, 1e17, 1e19, 1e25, 1e37])
def test_log_probabilities_of_any_size_are_solved(dtype: torch.dtype, magnitude: float) -> None:
    """As finite masks of logits are (torch.finfo(...).min), besides what a network returns."""
    random = generator(26)
    new, old = (magnitude * torch.randn(60, 5, generator=random, dtype=torch.float64) for _ in range(2))
    # Extreme on both sides, only in the old policy, only in the new one.
    new[20:40], old[40:] = new[20:40] / magnitude, old[40:] / magnitude
    given = new.log_softmax(-1).to(dtype).requires_grad_()
    log_q = old.log_softmax(-1).to(dtype)
    result = project(given, log_q, BOUND)
    assert bool(result.log_probs.exp().sum(-1).sub(1).abs().max() < 1e-5)
    assert bool((result.evaluations <= 20).all())
    assert bool((result.failure != NOT_A_DISTRIBUTION).all())
    for log_pi, row, kl in zip(result.log_probs.detach(), log_q, result.kl, strict=True):
        exact = exact_kl(log_pi.double(), row.double())
        assert exact <= BOUND * (1 + 1e-6)
        assert exact == pytest.approx(float(kl), abs=2e-5)
    torch.autograd.backward(result.log_probs.exp().square().sum())
    assert given.grad is not None
    assert bool(given.grad.isfinite().all())


@by_dtype
def test_the_lowest_number_serves_as_a_mask(dtype: torch.dtype) -> None:
    lowest = torch.finfo(dtype).min
    log_p, log_q = pair(16, 6, seed=27)

    def with_two_more(x: Tensor, value: float) -> Tensor:
        return torch.cat([x.to(dtype), torch.full((16, 2), value, dtype=dtype)], dim=-1)

    own, expected = (
        project(with_two_more(log_p, value), with_two_more(log_q, value), BOUND) for value in (lowest, -INF)
    )
    torch.testing.assert_close(own.log_probs[:, :6], expected.log_probs[:, :6])
    assert bool((own.log_probs[:, 6:] < -1e11).all())
    assert bool(own.converged.all())


@pytest.mark.parametrize("value", [1e13, INF])
def test_a_value_far_above_zero_is_not_a_log_probability(value: float) -> None:
    log_p, log_q = pair(4, 5, seed=28)
    log_p[1, 2] = log_q[3, 0] = value
    result = project(log_p, log_q, BOUND)
    assert result.failure.tolist() == [0, NOT_A_DISTRIBUTION, 0, NOT_A_DISTRIBUTION]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_lower_precisions_are_computed_in_float32(dtype: torch.dtype) -> None:
    log_p, log_q = (x.to(dtype) for x in pair(16, 12, seed=24))
    half = log_p.clone().requires_grad_()
    single = log_p.float().requires_grad_()
    low, full = project(half, log_q, BOUND), project(single, log_q.float(), BOUND)
    for field in dataclasses.fields(Projection):
        assert same_bits(getattr(low, field.name).detach(), getattr(full, field.name).detach()), field.name
    assert low.log_probs.dtype == low.step_size.dtype == low.kl.dtype == low.kl_before.dtype == torch.float32
    torch.autograd.backward(low.log_probs[:, 0].sum())
    torch.autograd.backward(full.log_probs[:, 0].sum())
    assert half.grad is not None
    assert single.grad is not None
    assert same_bits(half.grad, single.grad.to(dtype))


@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 3), (2, 0, 3), (2, 1, 2, 2)], ids=str)
def test_any_leading_dimensions(leading: tuple[int, ...]) -> None:
    rows = math.prod(leading)
    log_p, log_q = pair(max(rows, 1), 7, seed=25)
    flat = project(log_p[:rows], log_q[:rows], BOUND)
    given_rows = log_p[:rows].reshape(*leading, 7).clone().requires_grad_()
    shaped = project(given_rows, log_q[:rows].reshape(*leading, 7), BOUND)
    assert shaped.log_probs.shape == (*leading, 7)
    assert same_bits(shaped.log_probs.detach().reshape(-1, 7), flat.log_probs)
    for name in ("step_size", "kl_before", "kl", "converged", "evaluations"):
        assert getattr(shaped, name).shape == leading, name
        assert same_bits(getattr(shaped, name).reshape(-1), getattr(flat, name)), name
    assert shaped.converged.dtype == torch.bool
    torch.autograd.backward(shaped.log_probs.sum())
    assert given_rows.grad is not None
    assert given_rows.grad.shape == given_rows.shape


@pytest.mark.parametrize("side", ["new", "old"])
@pytest.mark.parametrize("value", [math.nan, INF, "no mass"], ids=str)
def test_a_broken_row_is_reported_and_touches_no_other(side: str, value: float | str) -> None:
    log_p, log_q = pair(6, 8, seed=26)
    bad_p, bad_q = log_p.clone(), log_q.clone()
    target = bad_p if side == "new" else bad_q
    if isinstance(value, str):
        target[2] = -INF
    else:
        target[2, 3] = value
    good = [0, 1, 3, 4, 5]
    clean_in, broken_in = log_p.clone().requires_grad_(), bad_p.clone().requires_grad_()
    clean, broken = project(clean_in, log_q, BOUND), project(broken_in, bad_q, BOUND)
    assert broken.failure.tolist() == [0, 0, NOT_A_DISTRIBUTION, 0, 0, 0]
    assert broken.converged.tolist() == [True, True, False, True, True, True]
    for name in ("log_probs", "step_size", "kl_before", "kl"):
        assert bool(getattr(broken, name)[2].isnan().all()), name
        assert torch.equal(getattr(broken, name)[good], getattr(clean, name)[good]), name
    assert torch.equal(broken.evaluations[good], clean.evaluations[good])
    weight = torch.randn(6, 8, generator=generator(27), dtype=torch.float64)
    torch.autograd.backward((clean.log_probs * weight).sum())
    torch.autograd.backward((broken.log_probs * weight).sum())
    assert clean_in.grad is not None
    assert broken_in.grad is not None
    assert torch.equal(broken_in.grad[good], clean_in.grad[good])
    assert bool(clean_in.grad.isfinite().all())


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [0.0, -0.05, math.nan, INF])
def test_a_bad_bound_is_named(bound: float) -> None:
    log_p, log_q = pair(2, 3, seed=28)
    with pytest.raises(ValueError, match="kl_bound"):
        project(log_p, log_q, bound)


@pytest.mark.parametrize("tolerance", [0.0, -1e-3, 1.0, 2.0, math.nan])
def test_a_bad_tolerance_is_named(tolerance: float) -> None:
    log_p, log_q = pair(2, 3, seed=28)
    with pytest.raises(ValueError, match="tolerance"):
        project(log_p, log_q, BOUND, tolerance=tolerance)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("mode", ["explicit", "", None])
def test_a_bad_step_size_gradient_is_named(mode: str | None) -> None:
    log_p, log_q = pair(2, 3, seed=28)
    with pytest.raises(ValueError, match="step_size_gradient"):
        project(log_p, log_q, BOUND, step_size_gradient=mode)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2, 4), (3, 3), (3,), (1, 2, 3)], ids=str)
def test_a_shape_mismatch_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="old_log_probs"):
        project(torch.zeros(2, 3), torch.zeros(*shape), BOUND)


def test_tensors_that_hold_no_distributions_are_named() -> None:
    with pytest.raises(ValueError, match="new_log_probs"):
        project(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), BOUND)
    with pytest.raises(ValueError, match="old_log_probs"):
        project(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), BOUND)
    with pytest.raises(ValueError, match="new_log_probs"):
        project(torch.zeros(()), torch.zeros(()), BOUND)
    with pytest.raises(ValueError, match="new_log_probs"):
        project(torch.zeros(2, 0), torch.zeros(2, 0), BOUND)


def test_the_result_is_frozen() -> None:
    result = project(*pair(2, 3, seed=28), BOUND)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.kl = torch.zeros(2)  # type: ignore[misc]


def test_the_inputs_are_not_written_to() -> None:
    log_p, log_q = pair(8, 6, seed=29)
    before = log_p.clone(), log_q.clone()
    project(log_p, log_q, BOUND)
    assert same_bits(log_p, before[0])
    assert same_bits(log_q, before[1])


# --- gradient ---------------------------------------------------------------------------------------------------------


def mixed_rows() -> tuple[Tensor, Tensor]:
    """Three rows far outside the region, three well inside."""
    far_p, far_q = pair(3, 6, seed=30, shift=2.0)
    near_p, near_q = pair(3, 6, seed=32, shift=0.1)
    log_p, log_q = torch.cat([far_p, near_p]), torch.cat([far_q, near_q])
    kl = oracle.kl(log_p, log_q)
    assert bool((kl[:3] > 2 * BOUND).all())
    assert bool((kl[3:] < 0.5 * BOUND).all())
    return log_p, log_q


def test_gradcheck_with_respect_to_new_log_probs() -> None:
    log_p, log_q = mixed_rows()

    def function(x: Tensor) -> Tensor:
        return project(x, log_q, BOUND, tolerance=1e-13).log_probs

    assert torch.autograd.gradcheck(function, (log_p.requires_grad_(),), eps=1e-5, atol=1e-7, rtol=1e-5)


def test_gradcheck_from_the_logits() -> None:
    log_p, log_q = mixed_rows()

    def function(x: Tensor) -> Tensor:
        return project(x.log_softmax(-1), log_q, BOUND, tolerance=1e-13).log_probs

    logits = (log_p + 0.7).requires_grad_()
    assert torch.autograd.gradcheck(function, (logits,), eps=1e-5, atol=1e-7, rtol=1e-5)


def test_gradcheck_of_the_finite_outcomes_beside_dropped_ones() -> None:
    log_p, log_q = mixed_rows()
    log_q = torch.cat([log_q, torch.full((6, 1), -9.0, dtype=torch.float64)], dim=-1).log_softmax(-1)

    def function(x: Tensor) -> Tensor:
        wide = torch.cat([x, torch.full((6, 1), -INF, dtype=torch.float64)], dim=-1)
        return project(wide.log_softmax(-1), log_q, BOUND, tolerance=1e-13).log_probs[:, :6]

    assert torch.autograd.gradcheck(function, (log_p.requires_grad_(),), eps=1e-5, atol=1e-7, rtol=1e-5)


def test_the_detached_gradient_is_autograd_at_a_fixed_step_size() -> None:
    log_p, log_q = mixed_rows()
    weight = torch.randn(6, 6, generator=generator(34), dtype=torch.float64)
    ours = log_p.clone().requires_grad_()
    result = project(ours.log_softmax(-1), log_q, BOUND, step_size_gradient="detached")
    torch.autograd.backward((result.log_probs * weight).sum())
    theirs = log_p.clone().requires_grad_()
    t = result.step_size.unsqueeze(-1)
    tilted = (log_q + t * (theirs.log_softmax(-1) - log_q)).log_softmax(-1)
    torch.testing.assert_close(result.log_probs, tilted, rtol=0, atol=1e-12)
    torch.autograd.backward((tilted * weight).sum())
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def gradient(log_p: Tensor, log_q: Tensor, weight: Tensor, mode: str | None) -> Tensor:
    leaf = log_p.clone().requires_grad_()
    options = {} if mode is None else {"step_size_gradient": mode}
    result = project(leaf.log_softmax(-1), log_q, BOUND, **options)  # type: ignore[arg-type]
    torch.autograd.backward((result.log_probs * weight).sum())
    assert leaf.grad is not None
    return leaf.grad


def test_implicit_is_the_default_and_differs_from_detached_outside_the_region_only() -> None:
    log_p, log_q = mixed_rows()
    weight = torch.randn(6, 6, generator=generator(35), dtype=torch.float64)
    implicit, detached = (gradient(log_p, log_q, weight, mode) for mode in ("implicit", "detached"))
    assert torch.equal(gradient(log_p, log_q, weight, None), implicit)
    assert bool(((implicit - detached)[:3].norm(dim=-1) > 1e-2 * detached[:3].norm(dim=-1)).all())
    assert torch.equal(implicit[3:], detached[3:])


def test_the_mode_changes_the_gradient_and_not_the_values() -> None:
    log_p, log_q = mixed_rows()
    implicit = project(log_p, log_q, BOUND, step_size_gradient="implicit")
    detached = project(log_p, log_q, BOUND, step_size_gradient="detached")
    for field in dataclasses.fields(Projection):
        assert same_bits(getattr(implicit, field.name), getattr(detached, field.name)), field.name


@by_dtype
def test_two_outcomes_on_the_bound_have_no_policy_gradient_and_three_have(dtype: torch.dtype) -> None:
    for n in (2, 3):
        log_q = log_softmax_normal(16, n, seed=36).to(dtype)
        new = 4 * torch.randn(16, n, generator=generator(37), dtype=torch.float64).to(dtype)
        new = new[oracle.kl(normalised(new), normalised(log_q)) > 2 * BOUND]
        log_q = log_q[: new.shape[0]]
        keep = oracle.kl(normalised(new), normalised(log_q)) > 2 * BOUND
        new, log_q = new[keep].requires_grad_(), log_q[keep]
        assert new.shape[0] >= 4
        norms: dict[str, Tensor] = {}
        for mode in MODES:
            result = project(new.log_softmax(-1), log_q, BOUND, step_size_gradient=mode)
            norms[mode] = torch.autograd.grad(result.log_probs[:, 0].sum(), new)[0].norm(dim=-1)
        assert bool((norms["detached"] > 1e-3).all())
        if n == 2:
            assert bool((norms["implicit"] < (1e-6 if dtype == torch.float32 else 1e-13)).all())
        else:
            assert bool((norms["implicit"] > 1e-4).all())


def test_no_gradient_reaches_the_old_policy() -> None:
    log_p, log_q = mixed_rows()
    log_p.requires_grad_()
    log_q.requires_grad_()
    result = project(log_p, log_q, BOUND)
    torch.autograd.backward(result.log_probs.sum())
    assert log_p.grad is not None
    assert log_q.grad is None
    assert not project(log_p.detach(), log_q, BOUND).log_probs.requires_grad


def test_only_the_log_probs_are_differentiable() -> None:
    log_p, log_q = mixed_rows()
    result = project(log_p.requires_grad_(), log_q, BOUND)
    assert result.log_probs.requires_grad
    for name in ("step_size", "kl_before", "kl", "converged", "evaluations"):
        assert not getattr(result, name).requires_grad, name


def test_a_second_derivative_is_right_or_refused() -> None:
    log_p, log_q = mixed_rows()
    weight = torch.randn(6, 6, generator=generator(40), dtype=torch.float64)

    def slope(logits: Tensor) -> Tensor:
        pi = project(logits.log_softmax(-1), log_q, BOUND, tolerance=1e-13).log_probs
        return torch.autograd.grad((pi.exp() * weight).sum(), logits, create_graph=True)[0]

    leaf = log_p.clone().requires_grad_()
    try:
        torch.autograd.backward((slope(leaf) * weight).sum())
    except RuntimeError:
        return
    assert leaf.grad is not None
    step = 1e-4 * weight
    ahead, behind = (slope((log_p + sign * step).requires_grad_()).detach() for sign in (1, -1))
    torch.testing.assert_close(leaf.grad, (ahead - behind) / 2e-4, rtol=1e-3, atol=1e-5)


def test_float32_gradients_agree_with_float64() -> None:
    log_p, log_q = pair(32, 40, seed=38)
    weight = torch.randn(32, 40, generator=generator(39), dtype=torch.float64)
    double = gradient(log_p, log_q, weight, "implicit")
    single = gradient(log_p.float(), log_q.float(), weight.float(), "implicit")
    # The default float32 tolerance moves the step size by up to a thousandth.
    torch.testing.assert_close(single.double(), double, rtol=2e-3, atol=2e-3 * float(double.abs().max()))
