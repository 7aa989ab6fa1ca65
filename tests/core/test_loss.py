"""Log-probabilities at given ids, the terms of the objective, and the whole loss from the logits."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import oracle
from tests.rounding import last_place
from verl_troll.core.comparison import Comparison, compare
from verl_troll.core.kernels import logits_torch as logits_module
from verl_troll.core.kernels.logits_torch import working_dtype
from verl_troll.core.loss import (
    IMPORTANCE_RATIOS,
    TokenTerms,
    importance_ratio,
    keep_corrective_ratios,
    surrogate_losses,
    token_terms,
)
from verl_troll.core.support import Selection, SparsePolicy, select
from verl_troll.core.vocab import VocabLogits, VocabShard

INF = math.inf
BOUND = 0.05
DOUBLE = torch.float64
by_rule = pytest.mark.parametrize("rule", ["union", "anchored"])
by_ratio = pytest.mark.parametrize("ratio", ["token", "sequence"])
by_mode = pytest.mark.parametrize("mode", ["implicit", "detached"])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return (scale * torch.randn(*shape, generator=generator(seed), dtype=DOUBLE)).to(dtype)


def gradient_of(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


# --- log-probabilities at ids -----------------------------------------------------------------------------------------


def gathered(logits: Tensor, rows: Tensor, ids: Tensor, vocab_size: int) -> Tensor:
    dense = logits[rows, :vocab_size].log_softmax(-1).gather(-1, ids.clamp_min(0))
    return torch.where(ids >= 0, dense, -INF)


def log_probs(logits: Tensor, rows: Tensor, ids: Tensor, vocab_size: int) -> Tensor:
    return VocabLogits.of(logits, rows, VocabShard.whole(logits.shape[-1], vocab_size)).log_probs_at(ids).log_probs


ROWS = torch.tensor([4, 0, 6, 3])
IDS = torch.tensor([[0, 3, -1], [7, -1, -1], [-1, 2, 8], [5, 5, 1]])


@pytest.mark.parametrize("block", [None, 1, 20, 25], ids=str)
@pytest.mark.parametrize("vocab_size", [9, 11])
def test_log_probs_at_is_a_gathered_log_softmax(
    monkeypatch: pytest.MonkeyPatch, block: int | None, vocab_size: int
) -> None:
    if block is not None:
        monkeypatch.setattr(logits_module, "_HOST_BLOCK", block)
    logits = normal(7, 11, seed=1, scale=2.0)
    logits[:, vocab_size:] = 1e4
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    mine, dense = log_probs(ours, ROWS, IDS, vocab_size), gathered(theirs, ROWS, IDS, vocab_size)
    torch.testing.assert_close(mine, dense, rtol=0, atol=1e-12)
    assert bool((mine[IDS < 0] == -INF).all())
    weight = normal(4, 3, seed=2)
    for values in (mine, dense):
        torch.autograd.backward((torch.where(IDS >= 0, values, 0.0) * weight).sum())
    torch.testing.assert_close(gradient_of(ours), gradient_of(theirs), rtol=0, atol=1e-12)
    assert bool((gradient_of(ours)[[1, 2, 5]] == 0).all())
    assert bool((gradient_of(ours)[:, vocab_size:] == 0).all())


@pytest.mark.parametrize("block", [None, 1, 25], ids=str)
@pytest.mark.parametrize("vocab_size", [9, 11])
def test_gradcheck_of_log_probs_at(monkeypatch: pytest.MonkeyPatch, block: int | None, vocab_size: int) -> None:
    if block is not None:
        monkeypatch.setattr(logits_module, "_HOST_BLOCK", block)

    def function(x: Tensor) -> Tensor:
        return log_probs(x, ROWS, IDS, vocab_size)[IDS >= 0]

    assert torch.autograd.gradcheck(function, (normal(7, 11, seed=3).requires_grad_(),), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_lower_precisions_are_read_as_float32(dtype: torch.dtype) -> None:
    logits = normal(7, 11, seed=4, scale=2.0).to(dtype)
    assert working_dtype(logits) == torch.float32
    ours, theirs = logits.clone().requires_grad_(), logits.float().requires_grad_()
    mine, dense = log_probs(ours, ROWS, IDS, 11), gathered(theirs, ROWS, IDS, 11)
    assert mine.dtype == torch.float32
    # Both round the normaliser and the subtraction of it.
    torch.testing.assert_close(mine, dense, rtol=0, atol=2 * last_place(dense[IDS >= 0]))
    for values in (mine, dense):
        torch.autograd.backward(values[IDS >= 0].sum())
    assert gradient_of(ours).dtype == dtype
    torch.testing.assert_close(
        gradient_of(ours).float(), gradient_of(theirs), rtol=2 * torch.finfo(dtype).eps, atol=1e-6
    )


def test_gradients_of_unused_entries_are_ignored() -> None:
    ours, theirs = (normal(7, 11, seed=7).requires_grad_() for _ in range(2))
    weight = normal(4, 3, seed=8)
    torch.autograd.backward(log_probs(ours, ROWS, IDS, 11), weight)
    torch.autograd.backward(log_probs(theirs, ROWS, IDS, 11), torch.where(IDS >= 0, weight, 0.0))
    assert torch.equal(gradient_of(ours), gradient_of(theirs))


def test_no_rows_at_all_give_a_zero_gradient() -> None:
    logits = normal(3, 5, seed=5).requires_grad_()
    none = torch.empty(0, dtype=torch.int64)
    torch.autograd.backward(log_probs(logits, none, none.reshape(0, 4), 5).sum())
    assert bool((gradient_of(logits) == 0).all())


def test_impossible_ids_beside_the_chosen_ones_get_no_gradient() -> None:
    logits = normal(2, 5, seed=6)
    logits[:, 3] = -INF
    leaf = logits.clone().requires_grad_()
    torch.autograd.backward(log_probs(leaf, torch.arange(2), torch.tensor([[0, 1], [2, 4]]), 5).sum())
    assert bool(gradient_of(leaf).isfinite().all())
    assert bool((gradient_of(leaf)[:, 3] == 0).all())


# --- the terms of one token -------------------------------------------------------------------------------------------


def comparison_of(log_p: Tensor, log_q: Tensor, sampled: Tensor) -> Comparison:
    rows, n = log_p.shape
    count = torch.full((rows,), n)
    ones = torch.ones(rows, dtype=log_p.dtype)
    return Comparison(
        new_log_probs=log_p,
        old_log_probs=log_q,
        sampled=sampled,
        sampled_log_probs=log_p.gather(-1, sampled.unsqueeze(-1)).squeeze(-1),
        outcomes=count,
        support_size=count,
        old_kept_mass=ones,
        new_kept_mass=ones,
        cap_hit=torch.zeros(rows, dtype=torch.bool),
    )


def dense_rows(*, shift: float, seed: int, rows: int = 24, n: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """New logits, log q and sampled ids."""
    log_q = normal(rows, n, seed=seed).log_softmax(-1)
    return (
        log_q + normal(rows, n, seed=seed + 1, scale=shift),
        log_q,
        torch.randint(0, n, (rows,), generator=generator(seed + 2)),
    )


@by_mode
def test_token_terms_match_the_oracle(mode: str) -> None:
    new, log_q, sampled = dense_rows(shift=0.5, seed=10)
    ours, theirs = new.clone().requires_grad_(), new.clone().requires_grad_()
    terms = token_terms(comparison_of(ours.log_softmax(-1), log_q, sampled), BOUND, mode)  # type: ignore[arg-type]
    log_p = theirs.log_softmax(-1)
    log_pi = oracle.project(log_p, log_q, BOUND, implicit=mode == "implicit")
    place = sampled.unsqueeze(-1)
    torch.testing.assert_close(terms.log_ratio, (log_pi - log_q).gather(-1, place).squeeze(-1), rtol=0, atol=1e-8)
    torch.testing.assert_close(terms.regression_kl, oracle.kl(log_p, log_pi.detach()), rtol=0, atol=1e-8)
    assert torch.equal(terms.projected, oracle.kl(log_p, log_q).detach() > BOUND)
    assert 0 < int(terms.projected.sum()) < 24
    weight = normal(24, seed=13)
    torch.autograd.backward((weight * terms.log_ratio + 0.7 * terms.regression_kl).sum())
    own = (log_pi - log_q).gather(-1, place).squeeze(-1)
    torch.autograd.backward((weight * own + 0.7 * oracle.kl(log_p, log_pi.detach())).sum())
    torch.testing.assert_close(gradient_of(ours), gradient_of(theirs), rtol=1e-6, atol=1e-8)


def test_the_regression_vanishes_inside_the_region() -> None:
    new, log_q, sampled = dense_rows(shift=0.1, seed=14)
    leaf = new.clone().requires_grad_()
    terms = token_terms(comparison_of(leaf.log_softmax(-1), log_q, sampled), BOUND)
    assert not bool(terms.projected.any())
    assert bool((terms.regression_kl == 0).all())
    torch.autograd.backward(terms.regression_kl.sum())
    assert bool((gradient_of(leaf) == 0).all())


def test_the_regression_is_positive_outside_and_pulls_towards_the_region() -> None:
    new, log_q, sampled = dense_rows(shift=2.0, seed=15)
    leaf = new.clone().requires_grad_()
    terms = token_terms(comparison_of(leaf.log_softmax(-1), log_q, sampled), BOUND)
    assert bool(terms.projected.all())
    assert bool((terms.regression_kl > 0).all())
    torch.autograd.backward(terms.regression_kl.sum())
    stepped = (new - 1e-3 * gradient_of(leaf)).log_softmax(-1)
    assert bool((oracle.kl(stepped, log_q) < oracle.kl(new.log_softmax(-1), log_q)).all())


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from([0.01, 0.3, 2.0, 10.0]), st.sampled_from([0.005, 0.05, 0.25]))
def test_terms_are_finite_and_the_regression_never_negative(seed: int, shift: float, bound: float) -> None:
    new, log_q, sampled = dense_rows(shift=shift, seed=seed, rows=4, n=6)
    for dtype, tiny in ((torch.float32, 1e-6), (DOUBLE, 1e-12)):
        leaf = new.to(dtype).requires_grad_()
        terms = token_terms(comparison_of(leaf.log_softmax(-1), log_q.to(dtype), sampled), bound)
        torch.autograd.backward((terms.log_ratio.exp() + terms.regression_kl).sum())
        assert bool((terms.regression_kl >= -tiny).all())
        assert bool(terms.log_ratio.isfinite().all())
        assert bool(gradient_of(leaf).isfinite().all())


def test_padding_outcomes_meet_no_infinities() -> None:
    new, log_q, sampled = dense_rows(shift=1.0, seed=16)
    wide = torch.full((24, 4), -INF, dtype=DOUBLE)
    narrow_in, wide_in = new.clone().requires_grad_(), new.clone().requires_grad_()
    narrow = token_terms(comparison_of(narrow_in.log_softmax(-1), log_q, sampled), BOUND)
    padded_p = torch.cat([wide_in.log_softmax(-1), wide], dim=-1)
    padded = token_terms(comparison_of(padded_p, torch.cat([log_q, wide], dim=-1), sampled), BOUND)
    torch.testing.assert_close(padded.log_ratio, narrow.log_ratio, rtol=0, atol=1e-9)
    torch.testing.assert_close(padded.regression_kl, narrow.regression_kl, rtol=0, atol=1e-9)
    for terms in (narrow, padded):
        torch.autograd.backward((terms.log_ratio + terms.regression_kl).sum())
    torch.testing.assert_close(gradient_of(wide_in), gradient_of(narrow_in), rtol=0, atol=1e-7)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_of_token_terms_are_named() -> None:
    new, log_q, sampled = dense_rows(shift=1.0, seed=17)
    comparison = comparison_of(new.log_softmax(-1), log_q, sampled)
    with pytest.raises(ValueError, match="kl_bound"):
        token_terms(comparison, 0.0)
    with pytest.raises(ValueError, match="step_size_gradient"):
        token_terms(comparison, BOUND, "none")  # type: ignore[arg-type]


def test_terms_are_frozen() -> None:
    new, log_q, sampled = dense_rows(shift=1.0, seed=17)
    terms = token_terms(comparison_of(new.log_softmax(-1), log_q, sampled), BOUND)
    with pytest.raises(dataclasses.FrozenInstanceError):
        terms.log_ratio = torch.zeros(24)  # type: ignore[misc]


# --- importance ratios ------------------------------------------------------------------------------------------------

MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])


def masked_log_ratios() -> Tensor:
    """Values where the mask is set, poison elsewhere."""
    poison = torch.tensor([INF, math.nan, -INF, 1e30, math.nan], dtype=DOUBLE)
    return torch.where(MASK.bool(), normal(4, 5, seed=20, scale=0.5), poison)


@pytest.mark.parametrize("as_bool", [True, False])
def test_the_token_ratio_is_the_exponential_and_one_where_masked(as_bool: bool) -> None:
    log_ratio = masked_log_ratios()
    mask = MASK.bool() if as_bool else MASK
    leaf = log_ratio.clone().requires_grad_()
    ratio = importance_ratio(leaf, mask, "token")
    live = MASK.bool()
    torch.testing.assert_close(ratio[live], log_ratio[live].exp(), rtol=1e-14, atol=0)
    assert bool((ratio[~live] == 1).all())
    weight = normal(4, 5, seed=21)
    torch.autograd.backward((ratio * weight).sum())
    torch.testing.assert_close(gradient_of(leaf)[live], (ratio * weight)[live], rtol=1e-12, atol=0)
    assert bool((gradient_of(leaf)[~live] == 0).all())


@pytest.mark.parametrize("as_bool", [True, False])
def test_the_sequence_ratio_is_the_mean_with_a_token_gradient(as_bool: bool) -> None:
    log_ratio = masked_log_ratios()
    leaf = log_ratio.clone().requires_grad_()
    ratio = importance_ratio(leaf, MASK.bool() if as_bool else MASK, "sequence")
    live = MASK.bool()
    for b in range(4):
        values = log_ratio[b][live[b]]
        expected = math.exp(float(values.sum()) / max(len(values), 1))
        torch.testing.assert_close(ratio[b][live[b]], torch.full_like(values, expected), rtol=1e-13, atol=0)
    assert bool((ratio[~live] == 1).all())
    # Each token's ratio depends on that token only; its derivative is the sequence's ratio.
    weight = normal(4, 5, seed=22)
    torch.autograd.backward((ratio * weight).sum())
    torch.testing.assert_close(gradient_of(leaf)[live], (ratio * weight)[live].detach(), rtol=1e-12, atol=0)
    assert bool((gradient_of(leaf)[~live] == 0).all())


@by_ratio
def test_log_ratios_are_limited_and_then_have_no_gradient(ratio: str) -> None:
    """A token that the new policy finds e^119 times as likely can be inside the region."""
    limit = 10.0
    values = torch.tensor([[119.0, 21.0, 9.5, -40.0, INF, -INF, 0.0]], dtype=DOUBLE, requires_grad=True)
    inside = values.detach().abs() <= limit
    found = importance_ratio(values, torch.ones(1, 7), ratio, limit)  # type: ignore[arg-type]
    limited = values.detach().clamp(-limit, limit)
    expected = limited if ratio == "token" else limited.mean().expand(1, 7)
    torch.testing.assert_close(found.detach(), expected.exp(), rtol=1e-14, atol=0)
    # Where the advantage is 0, the loss is 0 and not NaN.
    for advantage in (-1.0, 0.0, 1.0):
        losses = surrogate_losses(found, torch.full((1, 7), advantage, dtype=DOUBLE))
        (gradient,) = torch.autograd.grad(losses.sum(), values, retain_graph=True)
        torch.testing.assert_close(gradient, torch.where(inside, -advantage * expected.exp(), 0.0), rtol=1e-14, atol=0)


@by_ratio
def test_equal_policies_have_ratio_exactly_one(ratio: str) -> None:
    assert bool((importance_ratio(torch.zeros(4, 5), MASK, ratio) == 1).all())  # type: ignore[arg-type]


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_ratio_is_named() -> None:
    with pytest.raises(ValueError, match="importance_ratio"):
        importance_ratio(torch.zeros(1, 1), torch.ones(1, 1), "geometric")  # type: ignore[arg-type]
    assert set(IMPORTANCE_RATIOS) == {"token", "sequence"}


def test_tokens_pushed_out_against_their_advantage_keep_the_plain_ratio() -> None:
    plain = torch.tensor([[0.9, -0.9, 0.9, -0.9, 0.9, -0.9]], dtype=DOUBLE, requires_grad=True)
    inner = torch.full_like(plain, 0.1, requires_grad=True)
    advantages = torch.tensor([[-1.0, 2.0, 1.0, -2.0, -1.0, 0.0]], dtype=DOUBLE)
    projected = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 1.0]], dtype=DOUBLE)
    chosen = keep_corrective_ratios(inner, plain, projected, advantages)
    assert chosen.tolist() == [[0.9, -0.9, 0.1, 0.1, 0.1, 0.1]]
    torch.autograd.backward(chosen.sum())
    assert gradient_of(plain).tolist() == [[1, 1, 0, 0, 0, 0]]
    assert gradient_of(inner).tolist() == [[0, 0, 1, 1, 1, 1]]


def test_surrogate_losses_are_the_weighted_negative_products() -> None:
    ratio, advantages, weights = (normal(3, 4, seed=s) for s in (23, 24, 25))
    assert torch.equal(surrogate_losses(ratio, advantages), -ratio * advantages)
    torch.testing.assert_close(surrogate_losses(ratio, advantages, weights), -ratio * advantages * weights)
    leaf = ratio.clone().requires_grad_()
    torch.autograd.backward(surrogate_losses(leaf, advantages, weights).sum())
    torch.testing.assert_close(gradient_of(leaf), -advantages * weights)


# --- the whole loss ---------------------------------------------------------------------------------------------------

BATCH, LENGTH, VOCAB, COLUMNS = 3, 4, 24, 26


def problem(*, seed: int = 30, dtype: torch.dtype = DOUBLE, weighted: bool = True) -> oracle.Batch:
    """Logits whose neighbours in rank lie far apart, so small steps change no selection."""
    shape = (BATCH, LENGTH)
    ranks = torch.rand(*shape, VOCAB, generator=generator(seed)).argsort(-1).to(DOUBLE)
    old = 0.35 * ranks + 0.05 * torch.rand(*shape, VOCAB, generator=generator(seed + 1), dtype=DOUBLE)
    far = torch.rand(*shape, 1, generator=generator(seed + 2)) < 0.6
    new = old + torch.where(far, 1.5, 0.08) * torch.randn(*shape, VOCAB, generator=generator(seed + 3), dtype=DOUBLE)
    padding = torch.full((*shape, COLUMNS - VOCAB), 50.0, dtype=DOUBLE)
    old, new = (torch.cat([x, padding], dim=-1).to(dtype) for x in (old, new))
    sampled = torch.multinomial(
        old[..., :VOCAB].double().softmax(-1).reshape(-1, VOCAB), 1, generator=generator(seed + 4)
    ).reshape(shape)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 1, 1]]).bool()
    weights = 0.5 + torch.rand(*shape, generator=generator(seed + 5), dtype=DOUBLE) if weighted else None
    return oracle.Batch(new, old, sampled, normal(*shape, seed=seed + 6), mask, weights)


def library_terms(new: Tensor, batch: oracle.Batch, config: oracle.Settings) -> tuple[TokenTerms, SparsePolicy]:
    """Packed terms of the response tokens."""
    rows = batch.mask.reshape(-1).nonzero().squeeze(-1)
    old = batch.old.reshape(-1, COLUMNS)
    shard, selection = VocabShard.whole(COLUMNS, config.vocab_size), Selection(config.k, config.dropped_mass)
    policy = select(VocabLogits.of(old, rows, shard), batch.sampled.reshape(-1)[rows], selection)
    comparison = compare(config.rule, VocabLogits.of(new.reshape(-1, COLUMNS), rows, shard), policy, selection)
    mode = "implicit" if config.implicit else "detached"
    return token_terms(comparison, config.bound, mode), policy  # type: ignore[arg-type]


def scattered(values: Tensor, mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=values.dtype).masked_scatter(mask, values)


def library_loss(new: Tensor, batch: oracle.Batch, config: oracle.Settings) -> Tensor:
    terms, _ = library_terms(new, batch, config)
    ratio = importance_ratio(scattered(terms.log_ratio, batch.mask), batch.mask, config.ratio)  # type: ignore[arg-type]
    losses = surrogate_losses(ratio, batch.advantages.to(ratio.dtype), batch.weights)
    losses = losses + config.alpha * scattered(terms.regression_kl, batch.mask)
    return losses[batch.mask].mean()


def settings_of(rule: str, ratio: str = "token", **changes: object) -> oracle.Settings:
    base = oracle.Settings(rule, 6, 1e-3, VOCAB, BOUND, alpha=0.8, ratio=ratio)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


@by_rule
@by_ratio
@by_mode
def test_loss_and_gradient_match_the_oracle(rule: str, ratio: str, mode: str) -> None:
    for seed, k, dropped_mass, alpha in (
        (30, 6, 1e-3, 0.8),
        (40, 3, 1e-3, 0.0),
        (50, 24, 0.05, 1.0),
        (60, 24, 0.0, 2.0),
    ):
        batch = problem(seed=seed, weighted=seed != 40)
        config = settings_of(rule, ratio, k=k, dropped_mass=dropped_mass, alpha=alpha, implicit=mode == "implicit")
        ours, theirs = batch.new.clone().requires_grad_(), batch.new.clone().requires_grad_()
        mine = library_loss(ours, batch, config)
        reference = oracle.loss(dataclasses.replace(batch, new=theirs), config)
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-6)
        torch.autograd.backward(mine)
        torch.autograd.backward(reference)
        torch.testing.assert_close(gradient_of(ours), gradient_of(theirs), rtol=1e-5, atol=1e-7)
        assert float(gradient_of(ours).abs().max()) > 1e-3


@by_rule
def test_the_float32_loss_is_near_the_oracle(rule: str) -> None:
    config = settings_of(rule)
    double = problem()
    batch = problem(dtype=torch.float32)
    ours, theirs = batch.new.clone().requires_grad_(), double.new.clone().requires_grad_()
    mine = library_loss(ours, batch, config)
    reference = oracle.loss(dataclasses.replace(double, new=theirs), config)
    # A step size is accepted if its KL is at most a thousandth below the bound.
    torch.testing.assert_close(mine.double(), reference, rtol=0, atol=1e-3)
    torch.autograd.backward(mine)
    torch.autograd.backward(reference)
    torch.testing.assert_close(gradient_of(ours).double(), gradient_of(theirs), rtol=1e-2, atol=1e-3)


def frozen_losses(new: Tensor, base: Tensor, batch: oracle.Batch, config: oracle.Settings) -> Tensor:
    """``[B, T]`` losses at ``new``, with everything under a stop-gradient fixed at its value at ``base``.

    Then no token's loss depends on another token's logits.
    """
    fixed, _ = library_terms(base, batch, config)
    terms, _ = library_terms(new, batch, config)
    rows = batch.mask.reshape(-1).nonzero().squeeze(-1)
    old = batch.old.reshape(-1, COLUMNS)
    shard, selection = VocabShard.whole(COLUMNS, config.vocab_size), Selection(config.k, config.dropped_mass)
    policy = select(VocabLogits.of(old, rows, shard), batch.sampled.reshape(-1)[rows], selection)
    log_p = compare(config.rule, VocabLogits.of(new.reshape(-1, COLUMNS), rows, shard), policy, selection).new_log_probs
    # Inside the region pi is p, so the term is 0 for any p.
    regression = torch.where(fixed.projected, oracle.kl(log_p, fixed.projection.log_probs), 0.0)
    log_ratio, at_base = (scattered(x.log_ratio, batch.mask) for x in (terms, fixed))
    if config.ratio == "sequence":
        mean = at_base.sum(-1, keepdim=True) / batch.mask.sum(-1, keepdim=True)
        ratio = (mean + log_ratio - at_base).exp()
    else:
        ratio = log_ratio.exp()
    weights = 1.0 if batch.weights is None else batch.weights
    losses = -weights * batch.advantages * ratio + config.alpha * scattered(regression, batch.mask)
    return torch.where(batch.mask, losses, 0.0) / batch.mask.sum()


@by_rule
@by_ratio
def test_the_gradient_is_the_finite_difference_of_the_loss_with_its_targets_held(rule: str, ratio: str) -> None:
    batch, config = problem(), settings_of(rule, ratio)
    base = batch.new
    terms, _ = library_terms(base, batch, config)
    before = terms.projection.kl_before
    assert bool(((before > 1.2 * BOUND) | (before < 0.8 * BOUND)).all())
    assert 0 < int(terms.projected.sum()) < int(batch.mask.sum())
    for row in batch.mask.nonzero().tolist():
        for side in (batch.old, batch.new):
            ranked = side[tuple(row)][:VOCAB].sort(descending=True).values
            kept = oracle.keep(
                side[tuple(row)], int(batch.sampled[tuple(row)]), k=6, dropped_mass=1e-3, vocab_size=VOCAB
            )
            # The step may change no selection, neither by rank nor by mass.
            assert float(ranked[kept.selected - 1] - ranked[kept.selected]) > 2e-4
            assert kept.edge_gap > 2e-5
    leaf = base.clone().requires_grad_()
    torch.autograd.backward(library_loss(leaf, batch, config))
    step = 2e-5
    numeric = torch.zeros_like(base)
    with torch.no_grad():
        for column in range(COLUMNS):
            above, below = base.clone(), base.clone()
            above[..., column] += step
            below[..., column] -= step
            rise = frozen_losses(above, base, batch, config) - frozen_losses(below, base, batch, config)
            numeric[..., column] = rise / (2 * step)
    torch.testing.assert_close(gradient_of(leaf), numeric, rtol=1e-4, atol=1e-6)


@by_rule
@by_ratio
def test_masked_tokens_and_padding_columns_get_no_gradient(rule: str, ratio: str) -> None:
    batch = problem()
    leaf = batch.new.clone().requires_grad_()
    torch.autograd.backward(library_loss(leaf, batch, settings_of(rule, ratio)))
    gradient = gradient_of(leaf)
    assert bool((gradient[~batch.mask] == 0).all())
    assert bool((gradient[..., VOCAB:] == 0).all())
    assert bool((gradient[batch.mask].abs().sum(-1) > 0).all())
    # A shift of a row of logits changes nothing, so its gradients sum to 0.
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(BATCH, LENGTH, dtype=DOUBLE), rtol=0, atol=1e-9)


@by_rule
def test_alpha_changes_nothing_while_all_tokens_are_inside(rule: str) -> None:
    batch = problem()
    batch = dataclasses.replace(batch, new=batch.old + normal(BATCH, LENGTH, COLUMNS, seed=31, scale=1e-3))
    results = []
    for alpha in (0.0, 5.0):
        leaf = batch.new.clone().requires_grad_()
        # The whole vocabulary, so that no id enters or leaves under either rule.
        loss = library_loss(leaf, batch, settings_of(rule, alpha=alpha, k=VOCAB, dropped_mass=0.0))
        torch.autograd.backward(loss)
        results.append((loss.detach(), gradient_of(leaf)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@by_rule
def test_the_first_step_is_plain_policy_gradient(rule: str) -> None:
    batch = problem(weighted=False)
    leaf = batch.old.clone().requires_grad_()
    loss = library_loss(leaf, batch, settings_of(rule, k=VOCAB, dropped_mass=0.0))
    torch.autograd.backward(loss)
    torch.testing.assert_close(loss, -batch.advantages[batch.mask].mean(), rtol=1e-14, atol=0)
    plain = batch.old.clone().requires_grad_()
    log_prob = plain[..., :VOCAB].log_softmax(-1).gather(-1, batch.sampled.unsqueeze(-1)).squeeze(-1)
    torch.autograd.backward((-batch.advantages * log_prob)[batch.mask].mean())
    torch.testing.assert_close(gradient_of(leaf), gradient_of(plain), rtol=1e-10, atol=1e-12)


@by_rule
def test_blocks_of_rows_change_nothing(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, config = problem(), settings_of(rule)
    results = []
    for block in (1 << 24, 2 * COLUMNS, 1):
        monkeypatch.setattr(logits_module, "_HOST_BLOCK", block)
        leaf = batch.new.clone().requires_grad_()
        loss = library_loss(leaf, batch, config)
        torch.autograd.backward(loss)
        results.append((loss.detach(), gradient_of(leaf)))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-13, atol=0)
        torch.testing.assert_close(gradient, results[0][1], rtol=0, atol=1e-13)
