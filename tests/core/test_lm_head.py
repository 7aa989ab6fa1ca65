"""The fused head against dense float64 logits: what it reads, its gradients, and that it never holds the logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.allocations import Allocations
from verl_troll.core import lm_head as head_module
from verl_troll.core.comparison import Comparison, compare
from verl_troll.core.kernels import logits_torch as logits_module
from verl_troll.core.lm_head import LinearHead
from verl_troll.core.support import Selection, SparsePolicy, select
from verl_troll.core.vocab import VocabLogits, VocabShard

INF = math.inf
TOKENS, UNITS, COLUMNS, VOCAB = 11, 6, 40, 37
OPTIONS: dict[str, Any] = {"k": 8, "dropped_mass": 1e-3}
# Loss weights of the sampled log-probabilities (compared outcomes, whole vocabulary), the KL and the entropy.
PARTS = (0.7, -1.0, 0.4, 0.6)
ROWS = {"run": [3, 4, 5, 6, 7], "any": [9, 0, 10, 4, 5, 2], "one": [10], "all": list(range(TOKENS))}
by_rule = pytest.mark.parametrize("rule", ["union", "anchored"])
by_rows = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2}
# Elements per block of logits, tokens per read, tokens per gradient block.
BLOCKS = {"all at once": (1 << 20, 128, 1024), "single": (1, 1, 1), "uneven": (50, 4, 5), "narrow": (7, 3, 128)}


def normal(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def cut(monkeypatch: pytest.MonkeyPatch, blocks: tuple[int, int, int]) -> None:
    elements, read, gradient = blocks
    monkeypatch.setattr(logits_module, "_HOST_BLOCK", elements)
    monkeypatch.setattr(head_module, "_READ_BLOCK", {"cpu": (read, max(1, elements // read))})
    monkeypatch.setattr(head_module, "_GRADIENT_BLOCK", {"cpu": (gradient, elements)})


def problem(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight, and float64 logits of an old policy near the head's; padded columns are poisoned."""
    hidden, weight = normal(TOKENS, UNITS, seed=seed, dtype=dtype), normal(COLUMNS, UNITS, seed=seed + 1, dtype=dtype)
    weight[VOCAB:] = 100
    old = hidden.double() @ weight.double().T + 0.4 * normal(TOKENS, COLUMNS, seed=seed + 2)
    return hidden, weight, old


def dense_logits(hidden: Tensor, weight: Tensor, temperature: float, rounded: torch.dtype) -> Tensor:
    """Float64 logits, rounded to ``rounded``; gradients ignore the rounding."""
    exact = hidden.double() @ weight.double().T / temperature
    coarse = ((hidden @ weight.T).to(rounded) / temperature).to(rounded).double()
    return exact if rounded == torch.float64 else exact + (coarse - exact).detach()


def reference_loss(rule: str, new: Tensor, old: Tensor, rows: list[int], sampled: Tensor) -> Tensor:
    """The loss of :func:`loss_of` from dense float64 logits, one row at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for row, o in zip(rows, sampled.tolist(), strict=True):
        pair = oracle.outcomes(rule, new[row], old[row], o, vocab_size=VOCAB, **OPTIONS)
        log_p = new[row, :VOCAB].log_softmax(-1)
        parts = (pair.log_p[pair.place], log_p[o], oracle.kl(pair.log_p, pair.log_q), oracle.entropy(log_p))
        total = total + sum(weight * part for weight, part in zip(PARTS, parts, strict=True))
    return total


def loss_of(comparison: Comparison) -> Tensor:
    place = comparison.sampled.unsqueeze(-1)
    assert comparison.entropy is not None
    parts = (
        comparison.new_log_probs.gather(-1, place).squeeze(-1),
        comparison.sampled_log_probs,
        oracle.kl(comparison.new_log_probs, comparison.old_log_probs),
        comparison.entropy,
    )
    return sum((weight * part.double().sum() for weight, part in zip(PARTS, parts, strict=True)), torch.zeros(()))


def old_policy(old: Tensor, rows: list[int], dtype: torch.dtype) -> tuple[SparsePolicy, Tensor]:
    """The oracle's old policy in the layout of :func:`select`, and the ids sampled from it."""
    generator = torch.Generator().manual_seed(3)
    ids, log_probs, places, sampled = [], [], [], []
    for row in rows:
        log_q = old[row, :VOCAB].log_softmax(-1)
        o = int(torch.multinomial(log_q.exp(), 1, generator=generator))
        kept = oracle.keep(old[row], o, vocab_size=VOCAB, **OPTIONS).ids
        padding = OPTIONS["k"] + 1 - len(kept)
        ids.append(kept + [-1] * padding)
        log_probs.append(torch.cat([log_q[kept], torch.full((padding,), -INF, dtype=torch.float64)]))
        places.append(kept.index(o))
        sampled.append(o)
    working = torch.promote_types(dtype, torch.float32)
    policy = SparsePolicy(torch.tensor(ids), torch.stack(log_probs).to(working), torch.tensor(places))
    return policy, torch.tensor(sampled)


def assert_close(actual: Tensor | None, expected: Tensor, tolerance: float) -> None:
    """Compare relative to the largest entry."""
    assert actual is not None
    largest = max(float(expected.abs().max()), 1e-3)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * largest)


# --- reading ----------------------------------------------------------------------------------------------------------


@by_rows
@by_dtype
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
def test_select_finds_what_dense_logits_say(
    monkeypatch: pytest.MonkeyPatch,
    blocks: tuple[int, int, int],
    temperature: float,
    dtype: torch.dtype,
    rows: list[int],
) -> None:
    cut(monkeypatch, blocks)
    hidden, weight, _ = problem(dtype)
    logits = dense_logits(hidden, weight, temperature, dtype)[:, :VOCAB]
    if dtype != torch.float64:
        # Products of other shapes may round differently, which can reorder equal logits.
        hidden, weight = (8 * hidden).round() / 8, (8 * weight).round() / 8
        logits = dense_logits(hidden, weight, temperature, dtype)[:, :VOCAB]
    chosen = torch.tensor(rows)
    sampled = torch.tensor([row % VOCAB for row in rows])
    policy = select(
        VocabLogits.of(LinearHead(hidden, weight, temperature), chosen, VocabShard.whole(COLUMNS, VOCAB)),
        sampled,
        Selection(12, 0.0),
        entropy=True,
    )
    log_probs = logits.log_softmax(-1)
    tolerance = 1e-12 if dtype == torch.float64 else 5e-6
    for place, row in enumerate(rows):
        expected = oracle.keep(logits[row], int(sampled[place]), k=12, dropped_mass=0.0, vocab_size=VOCAB)
        used = policy.ids[place] >= 0
        assert policy.ids[place][used].tolist() == expected.ids
        own = policy.log_probs[place][used].double()
        torch.testing.assert_close(own, log_probs[row, expected.ids], rtol=0, atol=tolerance)
        assert int(policy.ids[place, policy.sampled[place]]) == int(sampled[place])
    assert policy.entropy is not None
    torch.testing.assert_close(policy.entropy.double(), oracle.entropy(log_probs[chosen]), rtol=0, atol=4 * tolerance)
    assert not policy.log_probs.requires_grad


def test_equal_logits_are_ordered_by_id_across_blocks_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, (9, 2, 2))
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randint(-1, 2, (5, 3), generator=generator).float()
    weight = torch.randint(-1, 2, (50, 3), generator=generator).float()
    rows = torch.arange(5)
    logits = hidden @ weight.T
    policy = select(VocabLogits.of(LinearHead(hidden, weight), rows), logits.argmax(-1), Selection(20, 0.0))
    expected = [sorted(range(50), key=lambda j: (-float(logits[row, j]), j))[:20] for row in range(5)]
    assert policy.ids[:, :20].tolist() == expected


# --- gradients --------------------------------------------------------------------------------------------------------


@by_rule
@pytest.mark.parametrize("rows", [ROWS["any"], ROWS["one"]], ids=["any", "one"])
@by_dtype
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
def test_comparison_and_gradients_are_those_of_dense_logits(
    monkeypatch: pytest.MonkeyPatch,
    blocks: tuple[int, int, int],
    temperature: float,
    dtype: torch.dtype,
    rows: list[int],
    rule: str,
) -> None:
    cut(monkeypatch, blocks)
    hidden, weight, old = problem(dtype)
    old = old / temperature
    policy, sampled = old_policy(old, rows, dtype)
    mine = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    comparison = compare(
        rule,
        VocabLogits.of(LinearHead(*mine, temperature), torch.tensor(rows), VocabShard.whole(COLUMNS, VOCAB)),
        policy,
        Selection(**OPTIONS),
        entropy=True,
    )
    loss = loss_of(comparison)
    torch.autograd.backward(loss)
    theirs = hidden.double().requires_grad_(), weight.double().requires_grad_()
    new = dense_logits(*theirs, temperature, torch.float64)
    if dtype == torch.bfloat16:
        new = new + (dense_logits(hidden, weight, temperature, dtype) - new).detach()
    expected = reference_loss(rule, new, old, rows, sampled)
    torch.autograd.backward(expected)
    assert loss.item() == pytest.approx(expected.item(), rel=TOLERANCE[dtype], abs=TOLERANCE[dtype])
    for own, other in zip(mine, theirs, strict=True):
        assert other.grad is not None
        assert_close(own.grad, other.grad, TOLERANCE[dtype])
        assert own.grad is not None
        assert own.grad.dtype == dtype
    others = torch.ones(TOKENS, dtype=torch.bool)
    others[rows] = False
    assert mine[0].grad is not None
    assert mine[1].grad is not None
    assert bool((mine[0].grad[others] == 0).all())
    assert bool((mine[1].grad[VOCAB:] == 0).all())


@by_rule
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient_and_the_other_the_same(rule: str, frozen: str) -> None:
    hidden, weight, old = problem(torch.float64)
    policy, _ = old_policy(old, ROWS["any"], torch.float64)
    gradients = []
    for wanted in ((True, True), (frozen != "hidden", frozen != "weight")):
        leaves = [leaf.clone().requires_grad_(needed) for leaf, needed in zip((hidden, weight), wanted, strict=True)]
        head = LinearHead(leaves[0], leaves[1], 0.9)
        rows = torch.tensor(ROWS["any"])
        shard = VocabShard.whole(COLUMNS, VOCAB)
        comparison = compare(rule, VocabLogits.of(head, rows, shard), policy, Selection(**OPTIONS), entropy=True)
        torch.autograd.backward(loss_of(comparison))
        gradients.append([leaf.grad for leaf in leaves])
    other = int(frozen == "hidden")
    assert gradients[1][1 - other] is None
    whole, alone = gradients[0][other], gradients[1][other]
    assert whole is not None
    assert alone is not None
    assert torch.equal(whole, alone)


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_gradcheck(monkeypatch: pytest.MonkeyPatch, blocks: tuple[int, int, int], temperature: float) -> None:
    cut(monkeypatch, blocks)
    rows, ids = torch.tensor([3, 0, 4]), torch.tensor([[0, 5, -1], [8, 2, 3], [-1, -1, 7]])

    def function(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        head = LinearHead(hidden, weight, temperature)
        log_probs, entropy = VocabLogits.of(head, rows, VocabShard.whole(11, 9)).log_probs_at(ids, entropy=True)
        assert entropy is not None
        return log_probs[ids >= 0], entropy

    leaves = normal(5, 4, seed=5).requires_grad_(), normal(11, 4, seed=6).requires_grad_()
    assert torch.autograd.gradcheck(function, leaves, atol=1e-8, rtol=1e-6)


@by_rule
def test_no_rows(rule: str) -> None:
    hidden, weight, _ = problem(torch.float32)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    none = torch.zeros(0, dtype=torch.int64)
    policy = select(VocabLogits.of(LinearHead(*leaves), none), none, Selection(**OPTIONS), entropy=True)
    assert policy.ids.shape[0] == 0
    assert policy.entropy is not None
    assert policy.entropy.shape == (0,)
    comparison = compare(rule, VocabLogits.of(LinearHead(*leaves), none), policy, Selection(**OPTIONS), entropy=True)
    torch.autograd.backward(loss_of(comparison))
    for leaf in leaves:
        assert leaf.grad is not None
        assert bool((leaf.grad == 0).all())


@by_rule
def test_a_second_backward_pass_agrees(rule: str) -> None:
    """The head's tensors are not overwritten."""
    hidden, weight, old = problem(torch.float64)
    policy, _ = old_policy(old, ROWS["run"], torch.float64)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    rows, shard = torch.tensor(ROWS["run"]), VocabShard.whole(COLUMNS, VOCAB)
    comparison = compare(
        rule,
        VocabLogits.of(LinearHead(*leaves), rows, shard),
        policy,
        Selection(**OPTIONS),
        entropy=True,
    )
    loss = loss_of(comparison)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@by_rule
def test_autocast_changes_nothing(rule: str) -> None:
    """The hidden states' dtype sets the precision of the product."""
    hidden, weight, old = problem(torch.float32)
    policy, _ = old_policy(old, ROWS["any"], torch.float32)
    results = []
    for enabled in (False, True):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        rows, shard = torch.tensor(ROWS["any"]), VocabShard.whole(COLUMNS, VOCAB)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            head = LinearHead(*leaves, 0.7)
            chosen = select(VocabLogits.of(head, rows, shard), rows, Selection(**OPTIONS), entropy=True)
            comparison = compare(rule, VocabLogits.of(head, rows, shard), policy, Selection(**OPTIONS), entropy=True)
            loss = loss_of(comparison)
            torch.autograd.backward(loss)
        results.append((loss.detach(), chosen.log_probs, chosen.entropy, leaves[0].grad, leaves[1].grad))
    for without, with_autocast in zip(*results, strict=True):
        assert without is not None
        assert with_autocast is not None
        assert torch.equal(without, with_autocast)


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "dtypes", "temperature", "message"),
    [
        (((4, 3), (5, 2)), ("float32", "float32"), 1.0, r"\(4, 3\) and \(5, 2\)"),
        (((1, 4, 3), (5, 3)), ("float32", "float32"), 1.0, r"\(1, 4, 3\) and \(5, 3\)"),
        (((4, 3), (5, 3)), ("float32", "bfloat16"), 1.0, "hidden is torch.float32, but weight is torch.bfloat16"),
        (((4, 3), (5, 3)), ("float32", "float32"), 0.0, "temperature must be above 0, got 0.0"),
        (((4, 3), (5, 3)), ("float32", "float32"), -1.0, "temperature must be above 0, got -1.0"),
        (((4, 3), (5, 3)), ("float32", "float32"), math.nan, "temperature must be above 0, got nan"),
    ],
)
def test_what_does_not_fit_is_refused(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], dtypes: tuple[str, str], temperature: float, message: str
) -> None:
    tensors = [torch.zeros(shape, dtype=getattr(torch, dtype)) for shape, dtype in zip(shapes, dtypes, strict=True)]
    with pytest.raises(ValueError, match=message):
        LinearHead(tensors[0], tensors[1], temperature)


def test_a_shard_that_does_not_fit_the_weight_is_refused() -> None:
    head, rows = LinearHead(torch.zeros(2, 3), torch.zeros(5, 3)), torch.arange(2)
    with pytest.raises(ValueError, match="does not fit 5 logit columns"):
        select(VocabLogits.of(head, rows, VocabShard.whole(6)), rows, Selection(**OPTIONS))


# --- memory -----------------------------------------------------------------------------------------------------------


@by_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_logits_are_never_held(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rule: str) -> None:
    cut(monkeypatch, (1 << 14, 16, 32))
    tokens, vocabulary, units = 512, 4096, 8
    leaves = (
        normal(tokens, units, seed=7, dtype=dtype).requires_grad_(),
        normal(vocabulary, units, seed=8, dtype=dtype).requires_grad_(),
    )
    rows = torch.arange(3, 500)
    with Allocations() as allocations:
        old = select(VocabLogits.of(LinearHead(*leaves, 0.7), rows), rows, Selection(**OPTIONS), entropy=True)
        comparison = compare(
            rule, VocabLogits.of(LinearHead(*leaves, 0.7), rows), old, Selection(**OPTIONS), entropy=True
        )
        torch.autograd.backward(loss_of(comparison))
    # The weight's gradient is the largest tensor that must exist.
    assert vocabulary * units <= allocations.largest <= tokens * vocabulary // 32


@by_rule
@pytest.mark.parametrize("blocks", [(128, 8192), (64, 700), (7, 2000)], ids=str)
def test_equal_policies_have_ratio_one_however_the_tokens_are_cut(
    monkeypatch: pytest.MonkeyPatch, rule: str, blocks: tuple[int, int]
) -> None:
    """Small integers: products are exact in any order, so any difference comes from the reading."""
    monkeypatch.setattr(head_module, "_READ_BLOCK", {"cpu": blocks})
    tokens, vocab, units = 133, 3000, 16
    generator = torch.Generator().manual_seed(30)
    hidden = torch.randint(-3, 4, (tokens, units), generator=generator).float()
    weight = torch.randint(-3, 4, (vocab, units), generator=generator).float() / 8
    rows, sampled = torch.arange(tokens), torch.randint(vocab, (tokens,), generator=generator)
    old = select(VocabLogits.of(LinearHead(hidden, weight), rows), sampled, Selection(8, 1e-5))
    # The update masks some tokens, so its blocks hold others.
    some = rows[rows % 50 != 7]
    part = SparsePolicy(old.ids[some], old.log_probs[some], old.sampled[some])
    result = compare(rule, VocabLogits.of(LinearHead(hidden, weight), some), part, Selection(8, 1e-5))
    live = result.new_log_probs > -math.inf
    assert torch.equal(result.new_log_probs[live], result.old_log_probs[live])
