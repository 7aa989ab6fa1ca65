"""Which ids are kept: against the reference, ties, padding, and the sampled id."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import oracle
from tests.rounding import last_place
from verl_troll.core.comparison import compare
from verl_troll.core.kernels import logits_torch as logits_module
from verl_troll.core.loss import token_terms
from verl_troll.core.support import Selection, SparsePolicy, select
from verl_troll.core.vocab import VocabLogits, VocabShard

INF = math.inf
BOUND = 0.05
by_rule = pytest.mark.parametrize("rule", ["union", "anchored"])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (scale * torch.randn(*shape, generator=generator(seed), dtype=torch.float64)).to(dtype)


def integers(high: int, shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(0, high, shape, generator=generator(seed))


def used(policy: SparsePolicy, row: int) -> list[int]:
    return [int(i) for i in policy.ids[row] if i >= 0]


def assert_select_matches(
    logits: Tensor, sampled: Tensor, *, k: int, dropped_mass: float, vocab_size: int | None = None
) -> SparsePolicy:
    """Check every field of :func:`select` against the oracle, row by row."""
    rows = torch.arange(logits.shape[0])
    shard = VocabShard.whole(logits.shape[-1], vocab_size)
    policy = select(VocabLogits.of(logits, rows, shard), sampled, Selection(k, dropped_mass))
    vocab = logits.shape[-1] if vocab_size is None else vocab_size
    atol = 1e-10 if logits.dtype == torch.float64 else 1e-5
    for row in range(logits.shape[0]):
        o = int(sampled[row])
        expected = oracle.keep(logits[row], o, k=k, dropped_mass=dropped_mass, vocab_size=vocab)
        assert used(policy, row) == expected.ids
        log_q = logits[row, :vocab].double().log_softmax(-1)
        live = policy.ids[row] >= 0
        torch.testing.assert_close(policy.log_probs[row][live].double(), log_q[expected.ids], rtol=0, atol=atol)
        assert bool((policy.log_probs[row][~live] == -INF).all())
        assert int(policy.ids[row, policy.sampled[row]]) == o
        torch.testing.assert_close(policy.log_probs[row, policy.sampled[row]].double(), log_q[o], rtol=0, atol=atol)
    assert policy.ids.dtype == policy.sampled.dtype == torch.int64
    return policy


# --- select -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "dropped_mass"), [(1, 1e-5), (16, 1e-4), (64, 1e-5), (64, 0.3), (300, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_select_matches_the_reference(k: int, dropped_mass: float, dtype: torch.dtype) -> None:
    logits = normal(12, 200, seed=1, scale=3.0, dtype=dtype)
    assert_select_matches(logits, integers(200, (12,), 2), k=k, dropped_mass=dropped_mass)


@pytest.mark.parametrize("levels", [1, 2, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("vocab", [90, 5000])
def test_ties_go_to_the_lower_id(levels: int, dtype: torch.dtype, vocab: int) -> None:
    logits = integers(levels, (6, vocab), 3).to(dtype)
    # A few ids above the ties, so that the cap falls among the equal ids.
    logits[:, vocab // 2 : vocab // 2 + 5] += 2
    logits[3:, vocab - 3 :] += 3
    assert_select_matches(logits, integers(vocab, (6,), 4), k=64, dropped_mass=1e-5)
    assert_select_matches(logits, integers(vocab, (6,), 4), k=3, dropped_mass=0.0)


@pytest.mark.parametrize("equal", [64, 65, 127, 128, 129, 130, 200, 1000])
def test_any_number_of_equal_logits_at_the_cap_is_ordered(equal: int) -> None:
    vocab, above = 2000, 10
    order = torch.randperm(vocab, generator=generator(5))
    logits = torch.full((1, vocab), -4.0)
    logits[0, order[:above]] = 3.0 + torch.arange(above).float()
    logits[0, order[above : above + equal]] = 2.0
    policy = assert_select_matches(logits, order[-1:], k=64, dropped_mass=1e-5)
    assert used(policy, 0)[above:-1] == sorted(order[above : above + equal].tolist())[: 64 - above]


def test_rounded_bfloat16_logits_with_ties_across_the_cap_match_the_reference() -> None:
    logits = normal(8, 5000, seed=6, dtype=torch.bfloat16)
    ranked = logits.float().sort(-1, descending=True).values
    assert bool((ranked[:, 63] == ranked[:, 64]).any())
    assert_select_matches(logits, integers(5000, (8,), 7), k=64, dropped_mass=1e-5)


@st.composite
def tied_rows(data: st.DrawFn) -> tuple[Tensor, int]:
    vocab = data(st.integers(1, 150))
    values = data(st.lists(st.integers(-2, 2), min_size=vocab, max_size=vocab))
    return torch.tensor([values]).float(), data(st.integers(0, vocab - 1))


@settings(deadline=None, max_examples=120)
@given(tied_rows(), st.integers(1, 160), st.sampled_from([0.0, 1.1e-5, 0.0317, 0.3571, 0.7717]))
def test_any_row_with_ties_matches_the_reference(row: tuple[Tensor, int], k: int, dropped_mass: float) -> None:
    logits, sampled = row
    gap = oracle.keep(logits[0], sampled, k=k, dropped_mass=dropped_mass, vocab_size=logits.shape[-1]).edge_gap
    assume(dropped_mass == 0 or gap > 1e-6)
    assert_select_matches(logits, torch.tensor([sampled]), k=k, dropped_mass=dropped_mass)


def test_the_id_that_reaches_the_mass_is_the_last_one_kept() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.0625, 0.0625]], dtype=torch.float64).log()
    # Partial masses 0.5, 0.75, 0.875, 0.9375, 1.
    for dropped_mass, expected in ((0.25 + 1e-9, 2), (0.25 - 1e-9, 3), (0.5 + 1e-9, 1), (0.5 - 1e-9, 2), (0.01, 5)):
        policy = assert_select_matches(logits, torch.tensor([0]), k=5, dropped_mass=dropped_mass)
        assert len(used(policy, 0)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_mass_that_reaches_the_edge_exactly_ends_the_selection(dtype: torch.dtype) -> None:
    logits = torch.zeros(1, 2, dtype=dtype)
    # Two equal ids: the first has mass 1/2, exact in float32 and float64.
    assert float(logits.log_softmax(-1).exp()[0, 0]) == 0.5
    policy = select(VocabLogits.of(logits, torch.tensor([0])), torch.tensor([0]), Selection(2, 0.5))
    assert used(policy, 0) == [0]


def test_the_cap_ends_the_selection() -> None:
    logits = normal(10, 300, seed=8)
    policy = assert_select_matches(logits, logits.argmax(-1), k=7, dropped_mass=1e-5)
    assert bool(((policy.ids >= 0).sum(-1) == 7).all())


@pytest.mark.parametrize("k", [10, 11, 5000])
def test_a_cap_beyond_the_vocabulary_keeps_everything(k: int) -> None:
    policy = assert_select_matches(normal(5, 10, seed=9), integers(10, (5,), 10), k=k, dropped_mass=0.0)
    assert bool(((policy.ids >= 0).sum(-1) == 10).all())


def test_nothing_dropped_keeps_all_but_impossible_ids() -> None:
    logits = torch.tensor([[0.0, -90.0, -300.0, -INF, 1.0]])
    policy = select(VocabLogits.of(logits, torch.tensor([0])), torch.tensor([0]), Selection(5, 0.0))
    assert used(policy, 0) == [4, 0, 1, 2]


@pytest.mark.parametrize("k", [1, 8, 64])
def test_the_sampled_id_is_kept_even_when_least_probable(k: int) -> None:
    logits = normal(10, 500, seed=11, scale=2.0)
    policy = assert_select_matches(logits, logits.argmin(-1), k=k, dropped_mass=1e-5)
    assert bool((policy.sampled == (policy.ids.shape[-1] - 1)).all())
    top = assert_select_matches(logits, logits.argmax(-1), k=k, dropped_mass=1e-5)
    assert bool((top.sampled == 0).all())
    for row in range(10):
        assert used(top, row) == used(policy, row)[:-1]


@by_rule
def test_padding_columns_are_never_selected_and_never_counted(rule: str) -> None:
    plain = normal(8, 60, seed=12, scale=2.0)
    moved = plain + normal(8, 60, seed=13)
    poisoned, poisoned_new = (torch.cat([x, torch.full((8, 4), 1e4)], dim=-1) for x in (plain, moved))
    sampled, rows = integers(60, (8,), 14), torch.arange(8)
    for k, dropped_mass in ((5, 1e-5), (60, 0.0), (64, 0.0)):
        clean = select(VocabLogits.of(plain, rows), sampled, Selection(k, dropped_mass))
        padded = assert_select_matches(poisoned, sampled, k=k, dropped_mass=dropped_mass, vocab_size=60)
        assert torch.equal(padded.ids, clean.ids)
        # Sums over different column counts round the normaliser, and its subtraction, differently.
        rounding = 2 * last_place(clean.log_probs[clean.ids >= 0])
        torch.testing.assert_close(padded.log_probs, clean.log_probs, rtol=0, atol=rounding)
        leaf = poisoned_new.clone().requires_grad_()
        options = {"k": k, "dropped_mass": dropped_mass}
        with_padding = compare(rule, VocabLogits.of(leaf, rows, VocabShard.whole(64, 60)), padded, Selection(**options))  # type: ignore[arg-type]
        without = compare(rule, VocabLogits.of(moved, rows), clean, Selection(**options))  # type: ignore[arg-type]
        torch.testing.assert_close(with_padding.new_log_probs, without.new_log_probs, rtol=0, atol=1e-5)
        torch.testing.assert_close(with_padding.old_log_probs, without.old_log_probs, rtol=0, atol=1e-5)
        torch.autograd.backward(token_terms(with_padding, BOUND).log_ratio.sum())
        assert leaf.grad is not None
        assert bool((leaf.grad[:, 60:] == 0).all())


def test_rows_pick_positions_in_any_order() -> None:
    logits = normal(9, 50, seed=15, scale=2.0)
    rows = torch.tensor([7, 0, 4])
    sampled = torch.tensor([3, 49, 20])
    some = select(VocabLogits.of(logits, rows), sampled, Selection(6, 1e-5), entropy=True)
    alone = select(VocabLogits.of(logits[rows].clone(), torch.arange(3)), sampled, Selection(6, 1e-5), entropy=True)
    for field in dataclasses.fields(SparsePolicy):
        assert torch.equal(getattr(some, field.name), getattr(alone, field.name)), field.name


def test_select_does_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = normal(11, 300, seed=16, scale=2.0)
    rows, sampled = torch.arange(11), integers(300, (11,), 17)
    whole = select(VocabLogits.of(logits, rows), sampled, Selection(9, 1e-5), entropy=True)
    monkeypatch.setattr(logits_module, "_HOST_BLOCK", 1000)
    blocks = select(VocabLogits.of(logits, rows), sampled, Selection(9, 1e-5), entropy=True)
    for field in dataclasses.fields(SparsePolicy):
        assert torch.equal(getattr(whole, field.name), getattr(blocks, field.name)), field.name


def test_select_passes_no_gradient_and_takes_no_rows() -> None:
    logits = normal(4, 30, seed=18).requires_grad_()
    assert not select(
        VocabLogits.of(logits, torch.arange(4)), torch.zeros(4).long(), Selection(3, 1e-5)
    ).log_probs.requires_grad
    none = torch.empty(0, dtype=torch.int64)
    empty = select(VocabLogits.of(logits, none), none, Selection(3, 1e-5))
    assert empty.ids.shape[0] == empty.log_probs.shape[0] == empty.sampled.shape[0] == 0


@pytest.mark.parametrize(
    ("name", "settings_"),
    [
        ("k", {"k": 0}),
        ("k", {"k": -1}),
        ("dropped_mass", {"dropped_mass": 1.0}),
        ("dropped_mass", {"dropped_mass": -1e-9}),
        ("dropped_mass", {"dropped_mass": math.nan}),
    ],
)
def test_bad_settings_are_named(name: str, settings_: dict[str, float]) -> None:
    logits, rows, sampled = normal(2, 30, seed=19), torch.arange(2), torch.zeros(2).long()
    policy = select(VocabLogits.of(logits, rows), sampled, Selection(3, 1e-5))
    options = {"k": 3, "dropped_mass": 1e-5} | settings_
    with pytest.raises(ValueError, match=name):
        select(VocabLogits.of(logits, rows), sampled, Selection(**options))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=name):
        compare("union", VocabLogits.of(logits, rows), policy, Selection(**options))  # type: ignore[arg-type]
