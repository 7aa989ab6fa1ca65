"""Both policies on common outcomes: against the reference, and the guarantees that follow."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import oracle
from tests.core.test_support import BOUND, by_rule, generator, integers, normal, used
from verl_troll.core.comparison import RULES, Comparison, SupportRule, compare
from verl_troll.core.kernels import logits_torch as logits_module
from verl_troll.core.kernels.constants import REST_FLOOR
from verl_troll.core.loss import policy_terms, token_terms
from verl_troll.core.projection import project
from verl_troll.core.support import Selection, SparsePolicy, select
from verl_troll.core.vocab import VocabLogits

INF = math.inf


def test_an_unknown_rule_is_named() -> None:
    logits, rows = normal(2, 30, seed=19), torch.arange(2)
    policy = select(VocabLogits.of(logits, rows), rows, Selection(3, 1e-5))
    with pytest.raises(ValueError, match="support"):
        compare("intersection", VocabLogits.of(logits, rows), policy, Selection(3, 1e-5))
    assert set(RULES) == {"union", "anchored"}


# --- compare ----------------------------------------------------------------------------------------------------------


def old_and_new(
    rows: int, vocab: int, *, seed: int, scale: float = 2.0, shift: float = 0.7, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Old logits, new logits and ids sampled from the old policy."""
    old = normal(rows, vocab, seed=seed, scale=scale, dtype=dtype)
    new = old + normal(rows, vocab, seed=seed + 1, scale=shift, dtype=dtype)
    sampled = torch.multinomial(old.double().softmax(-1), 1, generator=generator(seed + 2)).squeeze(-1)
    return old, new, sampled


def both(rule: str, old: Tensor, new: Tensor, sampled: Tensor, *, k: int, dropped_mass: float) -> Comparison:
    rows = torch.arange(old.shape[0])
    policy = select(VocabLogits.of(old, rows), sampled, Selection(k, dropped_mass))
    return compare(rule, VocabLogits.of(new, rows), policy, Selection(k, dropped_mass))


@by_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("k", "dropped_mass"), [(1, 1e-5), (4, 1e-4), (12, 0.1), (12, 1e-3), (50, 0.02), (60, 0.0)])
def test_compare_matches_the_oracle(rule: str, dtype: torch.dtype, k: int, dropped_mass: float) -> None:
    old, new, sampled = old_and_new(24, 60, seed=20, dtype=dtype)
    sampled[:4] = old[:4].argmin(-1)
    result = both(rule, old, new, sampled, k=k, dropped_mass=dropped_mass)
    atol = 1e-10 if dtype == torch.float64 else 1e-5
    for row in range(24):
        o = int(sampled[row])
        expected = oracle.outcomes(rule, new[row], old[row], o, k=k, dropped_mass=dropped_mass, vocab_size=60)
        live = result.old_log_probs[row] > -INF
        assert torch.equal(live, result.new_log_probs[row] > -INF)
        assert int(live.sum()) == int(result.outcomes[row]) == len(expected.ids)
        mine_p, mine_q = result.new_log_probs[row].double(), result.old_log_probs[row].double()
        place = int(result.sampled[row])
        torch.testing.assert_close(mine_p[place], expected.log_p[expected.place], rtol=0, atol=atol)
        torch.testing.assert_close(mine_q[place], expected.log_q[expected.place], rtol=0, atol=atol)
        # The same outcomes in any order: compare pairs sorted by old, then new probability.
        ours = sorted(zip(mine_q[live].tolist(), mine_p[live].tolist(), strict=True))
        theirs = sorted(zip(expected.log_q.tolist(), expected.log_p.tolist(), strict=True))
        if rule == "anchored":
            rest = float(expected.log_p[-1].exp().minimum(expected.log_q[-1].exp()))
            assert expected.ids[-1] >= 0 or rest > 10 * REST_FLOOR
            # The rest is a difference, so its rounding error is absolute in the mass.
            loose = atol if expected.ids[-1] >= 0 else atol + 2e-6 / rest * (dtype == torch.float32)
        else:
            loose = atol
        torch.testing.assert_close(
            torch.tensor(ours, dtype=torch.float64),
            torch.tensor(theirs, dtype=torch.float64),
            rtol=0,
            atol=float(loose),
        )
        log_p, log_q = (x[row].double().log_softmax(-1) for x in (new, old))
        torch.testing.assert_close(result.sampled_log_probs[row].double(), log_p[o], rtol=0, atol=atol)
        kept_new = expected.old.ids if expected.new is None else expected.new.ids
        assert float(result.old_kept_mass[row]) == pytest.approx(float(log_q[expected.old.ids].exp().sum()), abs=1e-5)
        assert float(result.new_kept_mass[row]) == pytest.approx(float(log_p[kept_new].exp().sum()), abs=1e-5)
        assert int(result.support_size[row]) == len(expected.old.ids)
    for side in (result.new_log_probs, result.old_log_probs):
        torch.testing.assert_close(side.logsumexp(-1), torch.zeros(24, dtype=dtype), rtol=0, atol=1e-5)


@by_rule
@pytest.mark.parametrize("sampled_at", ["top", "bottom", "next"])
@pytest.mark.parametrize(("k", "dropped_mass"), [(4, 0.3), (8, 0.02), (8, 0.3), (20, 1e-3), (20, 0.0), (40, 0.0)])
def test_a_binding_cap_is_reported(rule: str, sampled_at: str, k: int, dropped_mass: float) -> None:
    old = normal(40, 20, seed=21, scale=2.0)
    ranked = old.sort(-1, descending=True).indices
    sampled = {"top": ranked[:, 0], "bottom": ranked[:, -1], "next": ranked[:, min(k, 19)]}[sampled_at]
    result = both(rule, old, old, sampled, k=k, dropped_mass=dropped_mass)
    expected = [
        oracle.keep(old[row], int(sampled[row]), k=k, dropped_mass=dropped_mass, vocab_size=20) for row in range(40)
    ]
    assert result.cap_hit.tolist() == [kept.capped for kept in expected]


@by_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["f32", "bf16", "f64"])
@pytest.mark.parametrize(("k", "dropped_mass"), [(8, 1e-5), (64, 1e-5), (64, 1e-2), (400, 0.0)])
def test_equal_policies_have_ratio_one_and_no_regression(
    rule: str, dtype: torch.dtype, k: int, dropped_mass: float
) -> None:
    for scale in (0.5, 4.0, 30.0):
        old = normal(32, 400, seed=22, scale=scale, dtype=dtype)
        sampled = integers(400, (32,), 23)
        new = old.clone().requires_grad_()
        terms = token_terms(both(rule, old, new, sampled, k=k, dropped_mass=dropped_mass), 1e-6)
        assert bool((terms.log_ratio == 0.0).all())
        assert bool((terms.regression_kl == 0.0).all())
        assert not bool(terms.projected.any())
        assert bool((terms.projection.kl_before.abs() < 1e-12).all())


@by_rule
def test_equal_policies_have_ratio_one_however_the_rows_are_packed(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old = normal(32, 400, seed=24, scale=3.0)
    sampled = integers(400, (32,), 25)
    policy = select(VocabLogits.of(old, torch.arange(32)), sampled, Selection(16, 1e-5))
    monkeypatch.setattr(logits_module, "_HOST_BLOCK", 1200)
    rows = torch.tensor([30, 2, 17, 5, 6])
    packed = SparsePolicy(policy.ids[rows], policy.log_probs[rows], policy.sampled[rows])
    terms = token_terms(compare(rule, VocabLogits.of(old, rows), packed, Selection(16, 1e-5)), 1e-6)
    assert bool((terms.log_ratio == 0.0).all())
    assert bool((terms.regression_kl == 0.0).all())


@by_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_the_whole_vocabulary_kept_equals_the_dense_projection(rule: str, dtype: torch.dtype) -> None:
    old, new, sampled = old_and_new(20, 40, seed=26, dtype=dtype, shift=0.4)
    place = sampled.unsqueeze(-1)
    sparse_in, dense_in = new.clone().requires_grad_(), new.clone().requires_grad_()
    comparison = both(rule, old, sparse_in, sampled, k=40, dropped_mass=0.0)
    assert bool((comparison.outcomes == 40).all())
    terms = token_terms(comparison, BOUND)
    log_p, log_q = dense_in.log_softmax(-1), old.log_softmax(-1)
    dense = project(log_p, log_q, BOUND)
    assert 0 < int(terms.projected.sum()) < 20
    assert torch.equal(terms.projected, dense.kl_before > BOUND)
    log_ratio = (dense.log_probs - log_q).gather(-1, place).squeeze(-1)
    regression = oracle.kl(log_p, dense.log_probs.detach())
    tiny = 1e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(terms.log_ratio, log_ratio, rtol=tiny, atol=tiny)
    torch.testing.assert_close(terms.regression_kl, regression, rtol=10 * tiny, atol=tiny)
    torch.autograd.backward((terms.log_ratio.exp() + terms.regression_kl).sum())
    torch.autograd.backward((log_ratio.exp() + regression).sum())
    assert sparse_in.grad is not None
    assert dense_in.grad is not None
    torch.testing.assert_close(sparse_in.grad, dense_in.grad, rtol=10 * tiny, atol=10 * tiny)


def test_the_gradient_under_union_reaches_the_kept_logits_only() -> None:
    old, new, sampled = old_and_new(6, 60, seed=27)
    leaf = new.clone().requires_grad_()
    comparison = both("union", old, leaf, sampled, k=8, dropped_mass=1e-5)
    # Only ids that the new policy kept: a weight on a defaulted id would act on the whole kept mass.
    held = comparison.new_log_probs > math.log(1e-10)
    weight = normal(*comparison.new_log_probs.shape, seed=28)
    torch.autograd.backward((torch.where(held, comparison.new_log_probs, 0.0) * weight).sum())
    assert leaf.grad is not None
    for row in range(6):
        kept = oracle.keep(new[row], int(sampled[row]), k=8, dropped_mass=1e-5, vocab_size=60)
        outside = [i for i in range(60) if i not in kept.ids]
        assert bool((leaf.grad[row, kept.ids] != 0).all())
        assert float(leaf.grad[row, outside].abs().max()) <= 1e-6 * float(leaf.grad[row].abs().max())


def test_ids_only_one_side_keeps_have_the_default_on_the_other() -> None:
    old = torch.tensor([[6.0, 5.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    new = torch.tensor([[6.0, 1.0, 5.0, 0.0, -1.0]], dtype=torch.float64)
    result = both("union", old, new, torch.tensor([0]), k=2, dropped_mass=1e-5)
    live = result.old_log_probs[0] > -INF
    log_q, log_p = result.old_log_probs[0][live], result.new_log_probs[0][live]
    top = 1 / (1 + math.exp(-1.0))
    # Mass of the two kept ids over the whole row; the default is added, then both renormalised.
    mass = float(old.softmax(-1)[0, :2].sum())
    total = mass + 1e-12
    expected_q = torch.tensor([top * mass, (1 - top) * mass, 1e-12], dtype=torch.float64).div(total).log()
    torch.testing.assert_close(log_q, expected_q, rtol=0, atol=1e-9)
    torch.testing.assert_close(log_p, expected_q[[0, 2, 1]], rtol=0, atol=1e-9)


@by_rule
def test_the_sampled_id_outside_both_selections_is_compared(rule: str) -> None:
    old, new, _ = old_and_new(12, 60, seed=29, dtype=torch.float64)
    sampled = (old + new).argmin(-1)
    result = both(rule, old, new, sampled, k=5, dropped_mass=1e-5)
    place = result.sampled.unsqueeze(-1)
    p, q = (x.gather(-1, place).squeeze(-1) for x in (result.new_log_probs, result.old_log_probs))
    truth = (new.log_softmax(-1) - old.log_softmax(-1)).gather(-1, sampled.unsqueeze(-1)).squeeze(-1)
    if rule == "union":
        # Each policy is renormalised over its own kept mass.
        truth = truth - result.new_kept_mass.log() + result.old_kept_mass.log()
    torch.testing.assert_close(p - q, truth, rtol=0, atol=1e-8)


# --- guarantees on the whole vocabulary -------------------------------------------------------------------------------


@st.composite
def vocab_pairs(data: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    n = data(st.integers(2, 24))
    values = data(st.lists(st.floats(-4, 4, width=32), min_size=2 * n, max_size=2 * n))
    old, new = torch.tensor(values, dtype=torch.float64).reshape(2, 1, n)
    return old, new, data(st.integers(0, n - 1))


@settings(deadline=None, max_examples=80)
@given(vocab_pairs(), st.integers(1, 24), st.sampled_from([0.5, 0.1, 1e-2, 1e-3]))
def test_the_anchored_divergence_never_exceeds_the_true_one(
    rows: tuple[Tensor, Tensor, int], k: int, dropped_mass: float
) -> None:
    old, new, sampled = rows
    result = both("anchored", old, new, torch.tensor([sampled]), k=k, dropped_mass=dropped_mass)
    coarse = project(result.new_log_probs, result.old_log_probs, BOUND).kl_before
    # The floor of the rest may add its mass times the log-ratio there.
    assert float(coarse) <= float(oracle.kl(new.log_softmax(-1), old.log_softmax(-1))) + 20 * REST_FLOOR


def test_the_floor_keeps_a_vanishing_rest_finite() -> None:
    old = torch.tensor([[0.0, -60.0, -200.0, -300.0]])
    new = torch.tensor([[0.0, -60.0, -3.0, -300.0]], requires_grad=True)
    result = both("anchored", old, new, torch.tensor([0]), k=1, dropped_mass=1e-5)
    terms = token_terms(result, BOUND)
    torch.autograd.backward((terms.log_ratio + terms.regression_kl).sum())
    # Mass that moves to ids never kept still counts.
    assert bool(terms.projected.all())
    assert float(result.old_log_probs[0, -1].detach().exp()) == pytest.approx(REST_FLOOR, rel=1e-4)
    assert new.grad is not None
    assert bool(new.grad.isfinite().all())
    assert float(terms.projection.kl) <= BOUND


def lifted(log_pi: Tensor, ids: list[int], log_p: Tensor) -> Tensor:
    """``[V]`` projected coarse policy, with the new policy's conditional distribution inside the rest."""
    full = log_p.clone()
    outside = [i for i in range(log_p.shape[0]) if i not in ids]
    full[outside] = log_pi[-1] + log_p[outside] - log_p[outside].logsumexp(-1)
    full[ids] = log_pi[: len(ids)]
    return full


def test_the_anchored_bound_and_the_rest_make_up_the_true_divergence() -> None:
    old, new, sampled = old_and_new(24, 60, seed=31, dtype=torch.float64, shift=0.8)
    rows = torch.arange(24)
    policy = select(VocabLogits.of(old, rows), sampled, Selection(6, 1e-5))
    comparison = compare("anchored", VocabLogits.of(new, rows), policy, Selection(6, 1e-5))
    result = project(comparison.new_log_probs, comparison.old_log_probs, BOUND)
    assert int((result.step_size < 1).sum()) > 6
    for row in range(24):
        ids = used(policy, row)
        log_p, log_q = new[row].log_softmax(-1), old[row].log_softmax(-1)
        coarse = result.log_probs[row][result.log_probs[row] > -INF]
        pi = lifted(coarse, ids, log_p)
        assert float(pi.logsumexp(-1)) == pytest.approx(0, abs=1e-10)
        outside = [i for i in range(60) if i not in ids]
        inside_rest = oracle.kl(log_p[outside].log_softmax(-1), log_q[outside].log_softmax(-1))
        expected = float(result.kl[row] + coarse[-1].exp() * inside_rest)
        assert float(oracle.kl(pi, log_q)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("k", "dropped_mass"), [(6, 1e-5), (60, 0.05), (60, 0.01)])
def test_the_union_bound_holds_on_the_vocabulary_up_to_the_dropped_mass(k: int, dropped_mass: float) -> None:
    old, new, sampled = old_and_new(200, 60, seed=33, dtype=torch.float64, scale=2.5, shift=0.35)
    rows = torch.arange(200)
    policy = select(VocabLogits.of(old, rows), sampled, Selection(k, dropped_mass))
    comparison = compare("union", VocabLogits.of(new, rows), policy, Selection(k, dropped_mass))
    result = project(comparison.new_log_probs, comparison.old_log_probs, BOUND)
    seen = 0
    for row in range(200):
        ids = used(policy, row)
        kept_new = oracle.keep(new[row], int(sampled[row]), k=k, dropped_mass=dropped_mass, vocab_size=60)
        if set(kept_new.ids) != set(ids) or float(result.step_size[row]) == 1:
            continue
        seen += 1
        log_q = old[row].log_softmax(-1)
        pi = torch.full((60,), -INF, dtype=torch.float64)
        pi[ids] = result.log_probs[row][result.log_probs[row] > -INF]
        full = float(oracle.kl(pi, log_q))
        mass = float(log_q[ids].exp().sum())
        assert full == pytest.approx(float(result.kl[row]) - math.log(mass), abs=1e-9)
        if not bool(comparison.cap_hit[row]):
            assert full <= BOUND - math.log1p(-dropped_mass) + 1e-9
    assert seen >= 5


# --- false violations -------------------------------------------------------------------------------------------------

VOCAB = 50_000
TOKENS = 200


def zipf_like(entropy: float, seed: int) -> Tensor:
    """``[200, 50000]`` log q: a power law in the rank with uneven gaps; the exponent sets the mean entropy."""
    noise = 0.3 * torch.randn(TOKENS, VOCAB, generator=generator(seed))
    log_rank = torch.arange(1, VOCAB + 1).double().log()
    low, high = 0.5, 4.0
    for _ in range(30):
        exponent = 0.5 * (low + high)
        some = (noise[:8].double() - exponent * log_rank).log_softmax(-1)
        if float(oracle.entropy(some).mean()) > entropy:
            low = exponent
        else:
            high = exponent
    return noise.sub_(exponent * log_rank.float()).log_softmax(-1)


@pytest.mark.parametrize(
    ("entropy", "kept_mass", "sigma", "true_share", "union_share"),
    [(1.7, 0.990, 0.2, 0.014, 0.031), (3.2, 0.907, 0.2, 0.012, 0.871), (5.4, 0.684, 0.05, 0.0, 0.369),
     (7.5, 0.418, 0.01, 0.0, 0.330)],
)  # fmt: skip
def test_false_violations_of_the_published_rule_are_not_shared_by_the_anchored_one(
    entropy: float, kept_mass: float, sigma: float, true_share: float, union_share: float
) -> None:
    log_q = zipf_like(entropy, seed=40)
    rows = torch.arange(TOKENS)
    sampled = torch.multinomial(log_q.exp(), 1, generator=generator(41)).squeeze(-1)
    new = torch.randn(TOKENS, VOCAB, generator=generator(42)).mul_(sigma).add_(log_q)
    log_p = new.log_softmax(-1)
    truth = float(((log_p.exp() * (log_p - log_q)).sum(-1) > BOUND).float().mean())
    policy = select(VocabLogits.of(log_q, rows), sampled, Selection(64, 1e-5))
    mass = float(log_q.topk(64).values.exp().sum(-1).mean())
    shares = {}
    for rule in ("union", "anchored"):
        comparison = compare(rule, VocabLogits.of(new, rows), policy, Selection(64, 1e-5))
        shares[rule] = float(token_terms(comparison, BOUND).projected.float().mean())
    # With 200 tokens one standard error is 0.035 at a share of one half, 0.008 at 0.014.
    assert mass == pytest.approx(kept_mass, abs=0.015)
    assert truth == pytest.approx(true_share, abs=0.025)
    assert shares["anchored"] == pytest.approx(truth, abs=0.02)
    assert shares["union"] == pytest.approx(union_share, abs=0.12)


# --- a new rule -------------------------------------------------------------------------------------------------------


def on_sampled_id(logits: VocabLogits, old: SparsePolicy, selection: Selection, entropy: bool) -> Comparison:
    """Made up: the sampled id and everything else."""
    narrow = SparsePolicy(old.sampled_ids.unsqueeze(-1), old.sampled_log_probs.unsqueeze(-1), old.sampled * 0)
    return compare("anchored", logits, narrow, selection, entropy=entropy)


def test_a_rule_is_one_entry_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "on_sampled_id", SupportRule(on_sampled_id))
    old, new, rows = normal(5, 40, seed=31), normal(5, 40, seed=32), torch.arange(5)
    policy = select(VocabLogits.of(old), rows, Selection(8, 1e-5))
    leaf = new.clone().requires_grad_()
    terms = policy_terms("on_sampled_id", VocabLogits.of(leaf), policy, Selection(8, 1e-5), kl_bound=0.05)

    log_q, log_p = (x.log_softmax(-1)[rows, rows].double() for x in (old, new))
    new_pair, old_pair = (torch.stack([x, (1 - x.exp()).log()], dim=-1) for x in (log_p, log_q))
    expected = project(new_pair, old_pair, 0.05)
    torch.testing.assert_close(
        terms.log_ratio.detach().double(), expected.log_probs[:, 0] - log_q, rtol=1e-3, atol=1e-5
    )
    assert bool(terms.projected.any())
    (gradient,) = torch.autograd.grad(terms.regression_kl.sum(), leaf)
    assert bool(gradient.any())
