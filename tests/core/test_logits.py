"""Reading logits in blocks and writing their gradient, against sorted lists and dense float64 rows."""

from __future__ import annotations

import dataclasses
import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.allocations import Allocations
from verl_troll.core.comparison import Comparison, compare
from verl_troll.core.kernels import logits_torch as logits_module
from verl_troll.core.logits import DenseLogits, Normaliser, Reading
from verl_troll.core.support import Selection, select
from verl_troll.core.vocab import VocabLogits, VocabShard

INF = math.inf
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
by_rule = pytest.mark.parametrize("rule", ["union", "anchored"])
# A run, a reversed run, gaps, any order, one, none.
ROWS = {
    "run": [3, 4, 5, 6, 7],
    "backwards": [7, 6, 5, 4, 3],
    "gaps": [0, 2, 3, 7, 10],
    "any": [9, 0, 10, 4, 5],
    "one": [10],
    "all": list(range(11)),
    "none": [],
}
by_rows = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)


def normal(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def no_ids(rows: Tensor) -> Tensor:
    return rows.new_zeros(rows.shape[0], 0)


# --- the largest entries ----------------------------------------------------------------------------------------------


def assert_top(logits: Tensor, k: int, columns: int | None = None) -> None:
    """Values and columns of each row's k largest entries, against sorting a list of pairs."""
    columns = logits.shape[1] if columns is None else columns
    rows = torch.arange(logits.shape[0])
    top = DenseLogits(logits).read(rows, no_ids(rows), columns, k=k)
    for row, values in enumerate(logits[:, :columns].double().tolist()):
        order = sorted(range(columns), key=lambda column: (-values[column], column))[:k]
        assert top.top_ids[row, : len(order)].tolist() == order
        assert top.top_values[row, : len(order)].tolist() == [values[column] for column in order]
        assert top.top_ids[row, len(order) :].tolist() == [-1] * (k - len(order))
        assert top.top_values[row, len(order) :].tolist() == [-INF] * (k - len(order))
    assert top.top_ids.dtype == torch.int64
    assert top.top_values.dtype == torch.promote_types(logits.dtype, torch.float32)


# -0 and 0 are equal: neither sorts before the other.
LEVELS = (-INF, -3.5, -0.0, 0.0, 0.25, 2.0, 1e-30, -1e-30, 6e4)


@st.composite
def rows_with_ties(draw: st.DrawFn, most: int) -> Tensor:
    columns = draw(st.integers(1, most))
    values = draw(st.lists(st.sampled_from(LEVELS), min_size=columns, max_size=columns))
    return torch.tensor([values], dtype=torch.float64)


@settings(deadline=None, max_examples=200)
@given(rows_with_ties(60), st.integers(1, 70), st.integers(1, 6), st.sampled_from(DTYPES))
def test_the_largest_entries_come_by_value_then_by_column(row: Tensor, k: int, group: int, dtype: torch.dtype) -> None:
    with mock.patch.object(logits_module, "_GROUP", group):
        assert_top(row.to(dtype), k)


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 4),
    st.integers(-3, 130),
    st.integers(1, 12),
    st.integers(0, 10**6),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 0.3, 0.99]),
)
def test_ties_across_groups_and_their_remainder_are_ordered(
    k: int, beyond: int, levels: int, seed: int, dtype: torch.dtype, holes: float
) -> None:
    """Widths around ``4 k`` groups, where the search by groups begins."""
    columns = 4 * k * logits_module._GROUP + beyond
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, levels, (2, columns), generator=generator).to(dtype)
    rows[torch.rand(rows.shape, generator=generator) < holes] = -INF
    assert_top(rows, k)


@by_dtype
@pytest.mark.parametrize("place", ["first", "last of a group", "first of the remainder", "last"])
def test_a_single_large_entry_is_found_wherever_it_stands(place: str, dtype: torch.dtype) -> None:
    group = logits_module._GROUP
    columns = 9 * group + 5
    column = {"first": 0, "last of a group": 3 * group - 1, "first of the remainder": 9 * group, "last": columns - 1}
    logits = torch.zeros(3, columns, dtype=dtype)
    logits[:, column[place]] = 1
    for k in (1, 2):
        assert_top(logits, k)


@by_dtype
def test_any_k_up_to_the_columns_and_beyond(dtype: torch.dtype) -> None:
    logits = normal(3, 700, seed=1, scale=3.0, dtype=dtype)
    for k in (1, 2, 3, 64, 65, 699, 700, 701):
        assert_top(logits, k)
        assert_top(logits, k, columns=610)


@pytest.mark.parametrize("layout", ["rows apart", "shifted", "transposed", "one row many times"])
@by_dtype
def test_the_largest_entries_of_any_layout_in_memory(layout: str, dtype: torch.dtype) -> None:
    group = logits_module._GROUP
    columns = 9 * group + 5
    logits = {
        "rows apart": lambda: normal(4, columns + 30, seed=5, dtype=dtype)[:, 7 : columns + 7],
        "shifted": lambda: normal(4 * columns + 3, seed=6, dtype=dtype)[3:].view(4, columns),
        "transposed": lambda: normal(columns, 4, seed=7, dtype=dtype).T,
        "one row many times": lambda: normal(1, columns, seed=8, dtype=dtype).expand(4, columns),
    }[layout]()
    assert_top(logits, 2)


@by_dtype
@pytest.mark.parametrize("equal", [7, 8, 9, 300], ids=lambda equal: f"{equal} equal")
def test_few_and_many_equal_entries_at_the_last_place(equal: int, dtype: torch.dtype) -> None:
    """Ties for k = 2: alternate columns at the start of one row, a run at the end of the other."""
    logits = torch.zeros(2, 9 * logits_module._GROUP + 5, dtype=dtype)
    logits[0, 1 : 2 * equal : 2] = 1
    logits[1, -equal:] = 1
    assert_top(logits, 2)


# --- reading ----------------------------------------------------------------------------------------------------------


def assert_reading(reading: Reading, logits: Tensor, rows: Tensor, ids: Tensor, columns: int, atol: float) -> None:
    """Check normaliser, entropy, values and largest entries against dense float64 rows."""
    dense = logits[rows, :columns].double()
    peak, mass, energy = reading.normaliser
    assert energy is not None
    assert torch.equal(peak.double(), dense.amax(-1))
    log_probs = dense.log_softmax(-1)
    torch.testing.assert_close(mass.double().log() + peak.double(), dense.logsumexp(-1), rtol=atol, atol=atol)
    weights = (dense - dense.amax(-1, keepdim=True)).exp()
    torch.testing.assert_close(mass.double(), weights.sum(-1), rtol=atol, atol=0)
    inside = torch.where(weights > 0, weights * (dense - dense.amax(-1, keepdim=True)), 0.0)
    torch.testing.assert_close(energy.double(), inside.sum(-1), rtol=10 * atol, atol=atol)
    entropy = -torch.where(log_probs > -INF, log_probs.exp() * log_probs, 0.0).sum(-1)
    torch.testing.assert_close(reading.normaliser.entropy().double(), entropy, rtol=0, atol=10 * atol)
    expected = torch.where(ids >= 0, dense.gather(-1, ids.clamp_min(0)), 0.0)
    assert torch.equal(reading.values.double(), expected)
    order = dense.sort(dim=-1, descending=True, stable=True)
    k = reading.top_ids.shape[1]
    assert torch.equal(reading.top_ids, order.indices[:, :k])
    assert torch.equal(reading.top_values.double(), order.values[:, :k])


@by_rows
@by_dtype
@pytest.mark.parametrize("block", [1, 29, 30, 61, 200, 1 << 20])
@pytest.mark.parametrize("group", [1, 64], ids=["groups", "no groups"])
def test_blocks_of_any_size_read_rows_in_any_order(
    monkeypatch: pytest.MonkeyPatch, group: int, block: int, dtype: torch.dtype, rows: list[int]
) -> None:
    monkeypatch.setattr(logits_module, "_HOST_BLOCK", block)
    monkeypatch.setattr(logits_module, "_GROUP", group)
    logits = normal(11, 33, seed=2, scale=3.0, dtype=dtype)
    logits[:, 30:] = math.nan
    logits[[1, 8]] = math.nan
    chosen = torch.tensor(rows, dtype=torch.int64)
    chosen = chosen[~torch.isin(chosen, torch.tensor([1, 8]))]
    ids = torch.randint(-1, 30, (len(chosen), 4), generator=torch.Generator().manual_seed(3))
    before = logits.clone()
    reading = DenseLogits(logits).read(chosen, ids, 30, k=7, energy=True)
    assert_reading(reading, logits, chosen, ids, 30, 1e-13 if dtype == torch.float64 else 2e-6)
    assert torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0)), "reading must not write"


@by_dtype
@pytest.mark.parametrize("columns", [300, logits_module._LONG_ROW + 5])
@pytest.mark.parametrize("energy", [False, True], ids=["plain", "energy"])
def test_a_row_is_read_alike_whatever_is_read_beside_it(energy: bool, columns: int, dtype: torch.dtype) -> None:
    logits = normal(64, columns, seed=9, dtype=dtype)
    # Nearly all mass at the row's end: the elements after the last full vector may be computed differently.
    logits[:, -3:] += 16
    whole = DenseLogits(logits).read(torch.arange(64), no_ids(torch.arange(64)), columns, energy=energy).normaliser
    for rows in (*([row] for row in range(64)), [8, 3], [5, 6, 7]):
        chosen = torch.tensor(rows)
        part = DenseLogits(logits).read(chosen, no_ids(chosen), columns, k=2).normaliser
        assert torch.equal(part.max, whole.max[chosen])
        assert torch.equal(part.sumexp, whole.sumexp[chosen])


@by_dtype
def test_lower_precisions_are_read_as_float32_bit_for_bit(dtype: torch.dtype) -> None:
    logits = normal(9, 300, seed=4, scale=3.0, dtype=dtype)
    rows = torch.tensor([8, 2, 3, 5])
    ids = torch.tensor([[0, 299], [7, -1], [-1, -1], [5, 6]])
    wide = logits if dtype == torch.float64 else logits.float()
    ours, theirs = (DenseLogits(x).read(rows, ids, 300, k=9, energy=True) for x in (logits, wide))
    for mine, other in zip((*ours.normaliser, *ours[1:]), (*theirs.normaliser, *theirs[1:]), strict=True):
        assert mine is not None and other is not None
        assert torch.equal(mine, other)
        assert mine.dtype == other.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_entropy_of_rows_at_the_edges(dtype: torch.dtype) -> None:
    """Impossible ids, a single possible id, equal ids, logits of any size, a nearly certain id."""
    logits = torch.full((8, 40), -INF, dtype=torch.float64)
    logits[0, 7] = 3.0
    logits[1, :5] = torch.tensor([1.0, 2.0, -1.0, 2.0, 0.0])
    logits[2] = 2.5
    logits[3] = normal(40, seed=5) + 3e4
    logits[4] = normal(40, seed=6) - 3e4
    logits[5] = normal(40, seed=7) * 1e4
    logits[6] = normal(40, seed=8)
    logits[6, 3] = 60.0
    logits[7] = normal(40, seed=9, scale=2.0)
    logits[7, ::2] = -1e30
    logits = logits.to(dtype)
    rows = torch.arange(8)
    entropy = DenseLogits(logits).read(rows, no_ids(rows), 40, energy=True).normaliser.entropy()
    log_probs = logits.double().log_softmax(-1)
    expected = -torch.where(log_probs > -INF, log_probs.exp() * log_probs, 0.0).sum(-1)
    tiny = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(entropy.double(), expected, rtol=tiny, atol=tiny)
    assert float(entropy[0]) == 0
    assert float(entropy[2]) == pytest.approx(math.log(40), rel=1e-6)


def test_one_column_and_none() -> None:
    logits, rows = normal(4, 3, seed=10), torch.tensor([2, 0])
    ids = torch.tensor([[0, -1], [-1, 0]])
    one = DenseLogits(logits).read(rows, ids, 1, k=2, energy=True)
    assert torch.equal(one.normaliser.max, logits[rows, 0])
    assert one.normaliser.sumexp.tolist() == [1.0, 1.0]
    assert one.normaliser.entropy().tolist() == [0.0, 0.0]
    assert one.top_ids.tolist() == [[0, -1], [0, -1]]
    none = DenseLogits(logits).read(rows, torch.full((2, 2), -1), 0, k=2, energy=True)
    assert none.normaliser.max.tolist() == [-INF, -INF]
    assert none.normaliser.energy is not None
    assert none.normaliser.sumexp.tolist() == none.normaliser.energy.tolist() == [0.0, 0.0]
    assert none.values.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert none.top_ids.tolist() == [[-1, -1], [-1, -1]]
    assert none.top_values.tolist() == [[-INF, -INF], [-INF, -INF]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_the_entropy_of_parts_is_the_entropy_of_the_whole(dtype: torch.dtype) -> None:
    """Includes parts without columns, without mass, and far below the others."""
    logits = normal(6, 60, seed=11, scale=3.0, dtype=dtype)
    logits[1, :20] = -INF
    logits[2, 20:] = -INF
    logits[3, :20] -= 5e3
    logits[4, 30:] = -INF
    rows = torch.arange(6)
    parts = [
        DenseLogits(part).read(rows, no_ids(rows), part.shape[1], energy=True).normaliser
        for part in logits.split([20, 0, 10, 30], dim=-1)
    ]
    peaks, masses, energies = (torch.stack([part[i] for part in parts]) for i in range(3))  # type: ignore[misc]
    log_probs = logits.double().log_softmax(-1)
    expected = -torch.where(log_probs > -INF, log_probs.exp() * log_probs, 0.0).sum(-1)
    combined = Normaliser.combine(peaks, masses, energies)
    tiny = 1e-12 if dtype == torch.float64 else 5e-6
    torch.testing.assert_close(combined.entropy().double(), expected, rtol=0, atol=tiny)
    assert torch.equal(Normaliser.combine(peaks, masses).sumexp, combined.sumexp)


def test_an_entropy_that_was_not_read_is_refused() -> None:
    rows = torch.arange(2)
    with pytest.raises(ValueError, match="entropy was not asked for"):
        DenseLogits(normal(2, 5, seed=12)).read(rows, no_ids(rows), 5).normaliser.entropy()


# --- gradient ---------------------------------------------------------------------------------------------------------


def dense_functions(logits: Tensor, rows: Tensor, ids: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities (0 where the id is negative) and entropy in float64, by autograd."""
    log_probs = logits.double()[rows, :columns].log_softmax(-1)
    live = log_probs > -INF
    entropy = -torch.where(live, log_probs.exp() * torch.where(live, log_probs, 0.0), 0.0).sum(-1)
    return torch.where(ids >= 0, log_probs.gather(-1, ids.clamp_min(0)), 0.0), entropy


def some_ids(rows: int, columns: int, width: int, seed: int) -> Tensor:
    """Distinct ids per row, some negative."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(columns, generator=generator)[:width] for _ in range(rows)])
    return torch.where(torch.rand(ids.shape, generator=generator) < 0.25, -1, ids)


@pytest.mark.parametrize("columns", [9, 11])
@pytest.mark.parametrize("block", [1, 25, 1 << 20])
def test_gradcheck_of_the_entropy_and_of_log_probs_beside_it(
    monkeypatch: pytest.MonkeyPatch, block: int, columns: int
) -> None:
    monkeypatch.setattr(logits_module, "_HOST_BLOCK", block)
    rows = torch.tensor([4, 0, 6, 3])
    ids = some_ids(4, columns, 3, seed=13)
    shard = VocabShard.whole(11, columns)

    def function(leaf: Tensor) -> tuple[Tensor, Tensor]:
        log_probs, entropy = VocabLogits.of(leaf, rows, shard).log_probs_at(ids, entropy=True)
        assert entropy is not None
        return log_probs[ids >= 0], entropy

    leaf = normal(7, 11, seed=14).requires_grad_()
    assert torch.autograd.gradcheck(function, (leaf,), atol=1e-8, rtol=1e-6)
    assert torch.autograd.gradcheck(lambda leaf: function(leaf)[1], (leaf,), atol=1e-8, rtol=1e-6)


@by_rows
@by_dtype
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.0, -0.7)], ids=["log-probs", "entropy", "both"])
def test_gradient_of_log_probs_and_entropy(
    monkeypatch: pytest.MonkeyPatch, weights: tuple[float, float], dtype: torch.dtype, rows: list[int]
) -> None:
    """Padded columns and other rows get exact zeros, whatever their values."""
    monkeypatch.setattr(logits_module, "_HOST_BLOCK", 60)
    logits = normal(11, 33, seed=15, scale=2.0, dtype=dtype)
    logits[:, 5] = -INF
    chosen = torch.tensor(rows, dtype=torch.int64)
    others = torch.ones(11, dtype=torch.bool)
    others[chosen] = False
    logits[others] = math.nan
    logits[:, 30:] = INF
    ids = some_ids(len(rows), 30, 4, seed=16) if rows else torch.zeros(0, 4, dtype=torch.int64)
    ids = torch.where(ids == 5, -1, ids)
    at = normal(len(rows), 4, seed=17) * weights[0]
    of_entropy = normal(len(rows), seed=18) * weights[1]

    leaf = logits.clone().requires_grad_()
    log_probs, entropy = VocabLogits.of(leaf, chosen, VocabShard.whole(33, 30)).log_probs_at(ids, entropy=True)
    assert entropy is not None
    loss = (torch.where(ids >= 0, log_probs, 0.0) * at).sum() + (entropy * of_entropy).sum()
    (gradient,) = torch.autograd.grad(loss, leaf)
    dense = logits.double().requires_grad_()
    expected_log_probs, expected_entropy = dense_functions(dense, chosen, ids, 30)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=0, atol=1e-5)
    expected_loss = (expected_log_probs * at).sum() + (expected_entropy * of_entropy).sum()
    (expected,) = torch.autograd.grad(expected_loss, dense)
    rounding = {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, torch.finfo(dtype).eps)
    wanted = gradient[chosen, :30].double()
    torch.testing.assert_close(wanted, expected[chosen, :30].nan_to_num(0.0), rtol=rounding, atol=max(rounding, 1e-12))
    assert gradient.dtype == dtype
    assert bool((gradient[others] == 0).all())
    assert bool((gradient[:, 30:] == 0).all())


# --- the gradient written over the logits -----------------------------------------------------------------------------


def update(
    rule: str, logits: Tensor, rows: Tensor, *, reuse: bool, columns: int | None = None, k: int = 6
) -> tuple[Tensor, Comparison]:
    """A loss of all outputs of :func:`compare`, for an old policy near the new one."""
    generator = torch.Generator().manual_seed(19)
    selection, shard = Selection(k, 1e-3), VocabShard.whole(logits.shape[1], columns)
    near = logits.detach() + 0.5 * torch.randn(logits.shape, generator=generator).to(logits.dtype)
    sampled = torch.randint(0, shard.columns, rows.shape, generator=generator)
    old = select(VocabLogits.of(near, rows, shard), sampled, selection)
    comparison = compare(
        rule, VocabLogits.of(DenseLogits(logits, reuse=reuse), rows, shard), old, selection, entropy=True
    )
    live = comparison.new_log_probs > -INF
    weight = torch.randn(live.shape, generator=generator).to(comparison.new_log_probs.dtype)
    loss = (torch.where(live, comparison.new_log_probs, 0.0) * weight).sum()
    assert comparison.entropy is not None
    return loss + comparison.sampled_log_probs.sum() + 0.3 * comparison.entropy.sum(), comparison


@by_rule
@by_rows
@by_dtype
def test_reuse_writes_the_same_gradient_over_the_logits(rule: str, dtype: torch.dtype, rows: list[int]) -> None:
    gradients, places = [], []
    for reuse in (False, True):
        base = normal(11, 70, seed=20, scale=2.0, dtype=dtype).requires_grad_()
        logits = base * 1.0
        logits.register_hook(lambda gradient: places.append(gradient.data_ptr()))
        own = logits.data_ptr()
        loss, _ = update(rule, logits, torch.tensor(rows, dtype=torch.int64), reuse=reuse, columns=66)
        torch.autograd.backward(loss)
        assert (places[-1] == own) is reuse
        assert base.grad is not None
        gradients.append(base.grad)
    assert torch.equal(*gradients)
    others = torch.ones(11, dtype=torch.bool)
    others[torch.tensor(rows, dtype=torch.int64)] = False
    assert bool((gradients[1][others] == 0).all())
    assert bool((gradients[1][:, 66:] == 0).all())
    assert bool(gradients[1].any()) is bool(rows)


def test_reuse_reaches_through_a_view_of_the_logits() -> None:
    """verl passes ``[1, N, V]`` after an in-place division."""
    base = normal(11, 40, seed=21).requires_grad_()
    logits = (base * 1.0).unsqueeze(0)
    logits.div_(0.8)
    loss, _ = update("anchored", logits.flatten(0, 1), torch.arange(3, 9), reuse=True)
    torch.autograd.backward(loss)
    whole = normal(11, 40, seed=21).requires_grad_()
    expected, _ = update("anchored", whole / 0.8, torch.arange(3, 9), reuse=False)
    torch.autograd.backward(expected)
    assert base.grad is not None
    assert whole.grad is not None
    torch.testing.assert_close(base.grad, whole.grad, rtol=1e-14, atol=1e-15)


@by_rule
def test_logits_that_another_operation_kept_make_autograd_raise(rule: str) -> None:
    """An operation before the comparison runs its backward after it, on overwritten inputs."""
    logits = normal(6, 30, seed=22).requires_grad_() * 1.0
    other = logits.square().sum()
    loss, _ = update(rule, logits, torch.arange(6), reuse=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss + other)


@by_rule
def test_a_later_operation_on_the_logits_gets_its_gradient(rule: str) -> None:
    gradients = []
    for reuse in (False, True):
        base = normal(6, 30, seed=23).requires_grad_()
        logits = base * 1.0
        loss, _ = update(rule, logits, torch.arange(6), reuse=reuse)
        # Later operations run their backward first, while the logits still exist.
        torch.autograd.backward(loss + logits.square().sum())
        assert base.grad is not None
        gradients.append(base.grad)
    assert torch.equal(*gradients)


@by_rule
def test_a_second_backward_pass_over_reused_logits_raises(rule: str) -> None:
    logits = normal(6, 30, seed=24).requires_grad_() * 1.0
    loss, _ = update(rule, logits, torch.arange(6), reuse=True)
    torch.autograd.backward(loss, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss)


@by_rule
def test_without_reuse_the_logits_stay_and_a_second_backward_pass_agrees(rule: str) -> None:
    leaf = normal(6, 30, seed=25).requires_grad_()
    loss, _ = update(rule, leaf, torch.arange(6), reuse=False)
    before = leaf.detach().clone()
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(first, second)
    assert torch.equal(leaf, before)


# --- memory -----------------------------------------------------------------------------------------------------------


@by_rule
@pytest.mark.parametrize("rows", ["run", "gaps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_no_second_tensor_of_the_logits_size(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: str, rule: str
) -> None:
    monkeypatch.setattr(logits_module, "_HOST_BLOCK", 1 << 14)
    tokens, vocabulary, k = 256, 4096, 16
    chosen = torch.arange(10, 250, 1 if rows == "run" else 2)
    logits = normal(tokens, vocabulary, seed=26, dtype=torch.float32).to(dtype).requires_grad_() * 1.0
    sampled = torch.randint(0, vocabulary, chosen.shape, generator=torch.Generator().manual_seed(27))
    selection = Selection(k, 1e-3)
    with Allocations() as reading:
        old = select(VocabLogits.of(logits, chosen), sampled, selection, entropy=True)
    assert 0 < reading.largest <= tokens * vocabulary // 16
    for reuse in (False, True):
        with Allocations() as updating:
            comparison = compare(
                rule, VocabLogits.of(DenseLogits(logits, reuse=reuse), chosen), old, selection, entropy=True
            )
            assert comparison.entropy is not None
            loss = comparison.sampled_log_probs.sum() + comparison.entropy.sum()
            live = comparison.new_log_probs > -INF
            loss = loss + torch.where(live, comparison.new_log_probs, 0.0).square().sum()
            torch.autograd.grad(loss, logits)
        if reuse:
            assert updating.largest <= tokens * vocabulary // 16
        else:
            assert updating.largest == tokens * vocabulary, "the gradient is a tensor of its own"


def test_every_field_of_a_comparison_is_there_with_the_entropy() -> None:
    _, comparison = update("union", normal(5, 30, seed=28).requires_grad_(), torch.arange(5), reuse=False)
    assert all(getattr(comparison, field.name) is not None for field in dataclasses.fields(Comparison))
