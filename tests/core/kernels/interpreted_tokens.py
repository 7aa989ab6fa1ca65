"""The per-token chain against its torch form, in Triton's interpreter (run by ``tests/core/test_kernels.py``)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.core.kernels import interpreter
from verl_troll.core import kernels
from verl_troll.core.comparison import RULES, compare
from verl_troll.core.kernels.constants import STATISTICS
from verl_troll.core.logits import DenseLogits
from verl_troll.core.loss import PolicyTerms, policy_terms
from verl_troll.core.support import Selection, SparsePolicy, keep_most_probable, select
from verl_troll.core.vocab import VocabLogits, VocabShard

INF = math.inf
BOUND = 0.05
by_rule = pytest.mark.parametrize("rule", RULES)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
by_mode = pytest.mark.parametrize("mode", ["implicit", "detached"])


@pytest.fixture(autouse=True)
def few_lanes() -> None:
    assert kernels.available(torch.device("cpu"))
    interpreter.shrink()


def normal(*shape: int, seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sampled_from(logits: Tensor, seed: int = 9) -> Tensor:
    """The most likely id at every other token, any id at the rest."""
    ids = torch.randint(logits.shape[1], (len(logits),), generator=torch.Generator().manual_seed(seed))
    ids[::2] = logits[::2].argmax(-1)
    return ids


def loss_of(terms: PolicyTerms) -> Tensor:
    """Uses every output, with a different weight per token."""
    weight = torch.linspace(-1, 2, len(terms.log_ratio), dtype=terms.log_ratio.dtype)
    loss = (weight * (terms.log_ratio.exp() + 0.5 * terms.regression_kl)).sum() + 0.2 * terms.sampled_log_probs.sum()
    return loss if terms.entropy is None else loss + 0.3 * terms.entropy.sum()


def assert_chain(rule: str, new: Tensor, rows: Tensor, old: SparsePolicy, **options: Any) -> PolicyTerms:
    """The kernels' values, statistics and gradient match the torch form's."""
    options = {"kl_bound": BOUND, "entropy": True} | options
    selection, shard = Selection(options.pop("k", 8), options.pop("dropped_mass", 1e-3)), options.pop("shard", None)
    found = []
    for form in kernels.FORMS[::-1]:
        leaf = new.clone().requires_grad_()
        logits = VocabLogits.of(DenseLogits(leaf, form=form), rows, shard)  # type: ignore[arg-type]
        terms = policy_terms(rule, logits, old, selection, **options)
        found.append((terms, torch.autograd.grad(loss_of(terms), leaf)[0]))
    (expected, expected_gradient), (terms, gradient) = found
    for name in ("log_ratio", "regression_kl", "sampled_log_probs", "entropy"):
        ours, theirs = getattr(terms, name), getattr(expected, name)
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6, equal_nan=True, msg=f"{name}: {ours}, {theirs}")
    for name, ours, theirs in zip(STATISTICS, terms.statistics, expected.statistics, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-5, atol=2e-6, equal_nan=True, msg=f"{name}: {ours}, {theirs}")
    # The interpreter truncates float32 to bfloat16; torch rounds.
    once = 2**-7 if new.dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(gradient, expected_gradient, rtol=once, atol=5e-6, equal_nan=True)
    return terms


@by_rule
@by_dtype
@by_mode
@pytest.mark.parametrize(("vocab", "columns"), [(60, 60), (50, 61), (6, 6)], ids=["wide", "padded", "narrow"])
def test_the_chain(rule: str, dtype: torch.dtype, mode: str, vocab: int, columns: int) -> None:
    before = normal(7, columns, seed=1).to(dtype)
    after = (before + normal(7, columns, seed=2, scale=0.4)).to(dtype)
    before[:, vocab:] = after[:, vocab:] = 50
    rows, shard = torch.tensor([6, 0, 2, 3, 5]), VocabShard.whole(columns, vocab)
    sampled = sampled_from(before[rows, :vocab])
    old = select(VocabLogits.of(before, rows, shard), sampled, Selection(8, 1e-3))
    terms = assert_chain(rule, after, rows, old, step_size_gradient=mode, shard=shard)
    assert 0 < terms.projected.mean() <= 1
    assert_chain(rule, after, rows, old, step_size_gradient=mode, shard=shard, entropy=False, kl_bound=10.0)


@by_rule
@by_dtype
def test_equal_policies_have_ratio_one(rule: str, dtype: torch.dtype) -> None:
    logits = normal(9, 60, seed=3).to(dtype)
    rows = torch.arange(9)
    old = select(VocabLogits.of(logits, rows), sampled_from(logits), Selection(8, 1e-3))
    some = torch.tensor([7, 1, 2])
    part = SparsePolicy(old.ids[some], old.log_probs[some], old.sampled[some])
    terms = policy_terms(rule, VocabLogits.of(logits, some), part, Selection(8, 1e-3), kl_bound=BOUND)
    assert not bool(terms.log_ratio.any() or terms.regression_kl.any())


@by_rule
def test_tokens_of_every_kind(rule: str) -> None:
    before = normal(8, 40, seed=4, scale=1.0)
    after = before + normal(8, 40, seed=5, scale=0.2)
    before[0, 3] = after[0, 3] = 40  # one dominant outcome
    after[1] = -INF  # all mass on one id
    after[1, 7] = 0
    after[2, 11] = -INF  # the sampled id has no mass left
    before[3], after[3] = 0, 0  # uniform
    before[4, 5:] = -INF  # few ids had mass
    after[5, 9] = 60  # far away
    after[6, ::2] = -INF
    after[7] = math.nan
    sampled = torch.tensor([3, 7, 11, 39, 2, 9, 1, 0])
    rows = torch.arange(8)
    old = select(VocabLogits.of(before, rows), sampled, Selection(8, 1e-3))
    new = after[:7]
    kept = SparsePolicy(old.ids[:7], old.log_probs[:7], old.sampled[:7])
    finite = torch.tensor([0, 1, 3, 4, 5, 6])
    options = {"entropy": False, "kl_bound": BOUND}
    assert_chain(rule, new[finite], torch.arange(6), SparsePolicy(*(x[finite] for x in fields(kept))), **options)

    leaf = after.clone().requires_grad_()
    terms = policy_terms(rule, VocabLogits.of(leaf, rows), old, Selection(8, 1e-3), kl_bound=BOUND)
    assert bool(terms.log_ratio[7].isnan()) and bool(terms.log_ratio[finite].isfinite().all())
    assert bool(terms.statistics[STATISTICS.index("kl_after")][:7].le(BOUND).all())
    logits = VocabLogits.of(DenseLogits(after, form="torch"), rows)
    expected = policy_terms(rule, logits, old, Selection(8, 1e-3), kl_bound=BOUND)
    assert torch.equal(terms.log_ratio.isfinite(), expected.log_ratio.isfinite())


def fields(policy: SparsePolicy) -> tuple[Tensor, Tensor, Tensor]:
    return policy.ids, policy.log_probs, policy.sampled


@settings(max_examples=15, deadline=None, database=None, derandomize=True)
@given(data=st.data())
def test_any_pair(data: st.DataObject) -> None:
    vocab = data.draw(st.integers(2, 24))
    numbers = st.sampled_from([-9.0, -2.0, 0.0, 0.5, 1.0, 1.5, 6.0])
    row = st.lists(numbers, min_size=vocab, max_size=vocab)
    before, after = (torch.tensor([data.draw(row)]) for _ in range(2))
    k, dropped = data.draw(st.integers(1, 8)), data.draw(st.sampled_from([0.0, 1e-5, 0.1]))
    sampled = torch.tensor([data.draw(st.integers(0, vocab - 1))])
    rule = data.draw(st.sampled_from(list(RULES)))
    old = select(VocabLogits.of(before, torch.tensor([0])), sampled, Selection(k, dropped))
    assert_chain(rule, after, torch.tensor([0]), old, k=k, dropped_mass=dropped)


@pytest.mark.parametrize("dropped_mass", [0.0, 1e-3, 0.3])
def test_kept_ids(dropped_mass: float) -> None:
    logits = normal(6, 30, seed=6, scale=2.0)
    logits[1, 4:] = -INF
    logits[2] = 0
    sampled, rows = sampled_from(logits), torch.arange(6)
    ours = select(VocabLogits.of(logits, rows), sampled, Selection(8, dropped_mass), entropy=True)
    in_torch = VocabLogits.of(DenseLogits(logits, form="torch"), rows)
    theirs = select(in_torch, sampled, Selection(8, dropped_mass), entropy=True)
    assert torch.equal(ours.ids, theirs.ids) and torch.equal(ours.sampled, theirs.sampled)
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.entropy, theirs.entropy, rtol=1e-6, atol=1e-6)

    log_probs = logits.log_softmax(-1)
    best = log_probs.sort(dim=-1, descending=True, stable=True)
    exact = keep_most_probable(best.indices[:, :8], best.values[:, :8], sampled, log_probs[rows, sampled], dropped_mass)
    assert torch.equal(ours.ids[2:], exact.ids[2:])


def test_no_tokens() -> None:
    leaf = normal(3, 20, seed=7).requires_grad_()
    none = torch.zeros(0, dtype=torch.int64)
    for rule in RULES:
        old = select(VocabLogits.of(leaf, none), none, Selection(4, 1e-3))
        terms = policy_terms(rule, VocabLogits.of(leaf, none), old, Selection(4, 1e-3), kl_bound=BOUND, entropy=True)
        (gradient,) = torch.autograd.grad(loss_of(terms), leaf)
        assert terms.statistics.shape == (len(STATISTICS), 0) and not bool(gradient.any())


# --- the gradient written over the logits -----------------------------------------------------------------------------


def chain_loss(rule: str, logits: Tensor, rows: Tensor, *, reuse: bool) -> Tensor:
    old = select(VocabLogits.of(normal(*logits.shape, seed=8), rows), torch.zeros_like(rows), Selection(6, 1e-3))
    source = DenseLogits(logits, reuse=reuse)
    return loss_of(
        policy_terms(rule, VocabLogits.of(source, rows), old, Selection(6, 1e-3), kl_bound=BOUND, entropy=True)
    )


def comparison_loss(rule: str, logits: Tensor, rows: Tensor, *, reuse: bool) -> Tensor:
    old = select(VocabLogits.of(normal(*logits.shape, seed=8), rows), torch.zeros_like(rows), Selection(6, 1e-3))
    result = compare(
        rule, VocabLogits.of(DenseLogits(logits, reuse=reuse), rows), old, Selection(6, 1e-3), entropy=True
    )
    assert result.entropy is not None
    return result.sampled_log_probs.sum() + 0.3 * result.entropy.sum()


by_loss = pytest.mark.parametrize("loss", [chain_loss, comparison_loss], ids=["terms", "comparison"])
Loss = Callable[..., Tensor]


@by_rule
@by_dtype
@by_loss
def test_reuse_writes_the_same_gradient_over_the_logits(rule: str, dtype: torch.dtype, loss: Loss) -> None:
    gradients, places = [], []
    for reuse in (False, True):
        base = normal(9, 40, seed=10).to(dtype).requires_grad_()
        logits = base * 1.0
        logits.register_hook(lambda gradient: places.append(gradient.data_ptr()))
        own = logits.data_ptr()
        torch.autograd.backward(loss(rule, logits, torch.tensor([1, 7, 3]), reuse=reuse))
        assert (places[-1] == own) is reuse
        assert base.grad is not None
        gradients.append(base.grad)
    assert torch.equal(*gradients)
    assert bool(gradients[1].any()) and not bool(gradients[1][[0, 2, 4, 5, 6, 8]].any())


@by_rule
@by_loss
def test_reused_logits_that_are_still_needed_make_autograd_raise(rule: str, loss: Loss) -> None:
    rows = torch.arange(5)
    # exp saves its output for the backward pass.
    kept = normal(5, 40, seed=11, scale=0.5).requires_grad_().exp()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss(rule, kept, rows, reuse=True))
    logits = normal(5, 40, seed=12).requires_grad_() * 1.0
    other = logits.square().sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss(rule, logits, rows, reuse=True) + other)


@by_rule
@by_loss
def test_a_second_backward_pass_over_reused_logits_raises(rule: str, loss: Loss) -> None:
    logits = normal(5, 40, seed=13).requires_grad_() * 1.0
    value = loss(rule, logits, torch.arange(5), reuse=True)
    torch.autograd.backward(value, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(value)


@by_rule
@by_loss
def test_without_reuse_a_second_backward_pass_agrees(rule: str, loss: Loss) -> None:
    leaf = normal(5, 40, seed=14).requires_grad_()
    value = loss(rule, leaf, torch.arange(5), reuse=False)
    before = leaf.detach().clone()
    (first,) = torch.autograd.grad(value, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(value, leaf)
    assert torch.equal(first, second) and torch.equal(leaf, before)
