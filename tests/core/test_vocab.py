"""Log-probabilities in a single process: the normaliser's accuracy, and the bounds that a shard refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.rounding import last_place
from verl_troll.core.comparison import compare
from verl_troll.core.kernels import logits_torch as logits_module
from verl_troll.core.logits import DenseLogits, Normaliser
from verl_troll.core.support import Selection, select
from verl_troll.core.vocab import VocabLogits, VocabShard

INF = math.inf


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def local_normaliser(logits: Tensor, rows: Tensor, columns: int) -> Normaliser:
    return DenseLogits(logits).read(rows, rows[:, None].clamp_max(columns - 1), columns).normaliser


def same_bits(a: Normaliser, b: Normaliser) -> bool:
    return torch.equal(a.max, b.max) and torch.equal(a.sumexp, b.sumexp)


# --- normaliser -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e3, 3e4])
def test_likely_ids_lose_no_digits_to_the_size_of_the_logits(offset: float) -> None:
    logits = (normal(16, 500, seed=1, scale=3.0) + offset).float()
    rows = torch.arange(16)
    log_probs = local_normaliser(logits, rows, 500).log_probs(logits)
    expected = logits.double().log_softmax(-1)
    likely = expected > -8
    # Both the logarithm of the mass and its subtraction are rounded.
    torch.testing.assert_close(log_probs[likely].double(), expected[likely], rtol=0, atol=2 * last_place(8.0))
    # A nearly certain id: its log-probability is far below the float spacing around the logits.
    logits[:, 7] = logits.amax(-1) + 12
    log_probs = local_normaliser(logits, rows, 500).log_probs(logits[:, 7:8])
    expected = logits.double().log_softmax(-1)[:, 7:8]
    assert float(expected.abs().max()) < 1e-3
    # The mass, slightly above 1, is summed and rounded.
    torch.testing.assert_close(log_probs.double(), expected, rtol=0, atol=2 * last_place(1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_normaliser_of_parts_is_the_normaliser_of_the_whole(dtype: torch.dtype) -> None:
    logits = (normal(9, 60, seed=2, scale=4.0) + torch.linspace(-60, 60, 60)).to(dtype)
    logits[4, :30] = -INF
    rows = torch.tensor([8, 4, 0, 3])
    # Parts of unequal size, one without columns, with very different maxima.
    parts = [local_normaliser(part, rows, part.shape[1]) for part in logits.split([7, 0, 23, 30], dim=-1)]
    combined = Normaliser.combine(torch.stack([p.max for p in parts]), torch.stack([p.sumexp for p in parts]))
    whole = local_normaliser(logits, rows, 60)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    assert combined.max.dtype == combined.sumexp.dtype == working
    assert torch.equal(combined.max, logits[rows].to(working).amax(-1))
    expected = logits[rows].double().logsumexp(-1) - combined.max.double()
    for normaliser in (combined, whole):
        tiny = 1e-14 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(normaliser.sumexp.double().log(), expected, rtol=0, atol=tiny)


def test_parts_without_mass_have_none() -> None:
    logits = torch.tensor([[-INF, -INF, 5.0], [1.0, 2.0, 3.0]])
    rows = torch.arange(2)
    for columns, peak, mass in ((0, [-INF, -INF], [0.0, 0.0]), (2, [-INF, 2.0], [0.0, 1 + math.exp(-1)])):
        part = local_normaliser(logits, rows, columns)
        torch.testing.assert_close(part.max, torch.tensor(peak))
        torch.testing.assert_close(part.sumexp, torch.tensor(mass))
    assert local_normaliser(logits, rows[:0], 3).sumexp.shape == (0,)


@pytest.mark.parametrize("parts", [2, 3, 4, 5, 8, 16])
def test_combining_parts_gives_the_same_bits_wherever_they_lie(parts: int) -> None:
    # A ratio of exactly 1 needs the same bits from an all-reduce as from an all-gather.
    peaks, masses = normal(parts, 64, seed=3).float(), normal(parts, 64, seed=4).exp().float()
    combined = Normaliser.combine(peaks, masses)
    slots = torch.stack([peaks.T, masses.T], dim=-1)
    assert same_bits(Normaliser.combine(slots[..., 0].T, slots[..., 1].T), combined)
    wide = torch.zeros(parts, 64, 11)
    wide[..., 3], wide[..., 4] = peaks, masses
    assert same_bits(Normaliser.combine(wide[..., 3], wide[..., 4]), combined)
    few = Normaliser.combine(peaks[:, 5:10], masses[:, 5:10])
    assert same_bits(few, Normaliser(combined.max[5:10], combined.sumexp[5:10]))


def test_the_normaliser_does_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = normal(9, 60, seed=5).float()
    rows = torch.tensor([8, 4, 0, 3, 1])
    whole = local_normaliser(logits, rows, 57)
    monkeypatch.setattr(logits_module, "_HOST_BLOCK", 130)
    assert same_bits(local_normaliser(logits, rows, 57), whole)


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "stop"), [(-1, 4), (5, 4), (-3, -1)])
def test_invalid_bounds_are_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="0 <= start <= stop"):
        VocabShard(start, stop, 4)


@pytest.mark.parametrize("vocab_size", [0, -5])
def test_a_vocabulary_without_an_id_is_refused(vocab_size: int) -> None:
    with pytest.raises(ValueError, match="vocab_size must be at least 1"):
        VocabShard(0, 10, vocab_size)
    with pytest.raises(ValueError, match="vocab_size must be at least 1"):
        VocabShard.whole(10, vocab_size)


@pytest.mark.parametrize(("start", "stop", "vocab_size"), [(0, 10, 11), (1, 10, 5), (0, 0, 1), (10, 20, 20)])
def test_a_lone_rank_must_hold_the_vocabulary(start: int, stop: int, vocab_size: int) -> None:
    with pytest.raises(ValueError, match="vocab_size must lie between 1 and"):
        VocabShard(start, stop, vocab_size)


def test_a_whole_shard_owns_its_real_columns() -> None:
    assert VocabShard.whole(10) == VocabShard(0, 10, 10, None)
    shard = VocabShard.whole(10, 7)
    assert (shard.columns, shard.ranks, shard.rank) == (7, 1, 0)
    columns = shard.local(torch.tensor([[-2, -1, 0, 6, 7, 9, 10]]))
    assert columns.tolist() == [[-1, -1, 0, 6, -1, -1, -1]]


@pytest.mark.parametrize("columns", [5, 7])
def test_a_shard_that_does_not_fit_the_logits_is_refused(columns: int) -> None:
    logits, rows = torch.zeros(2, columns), torch.arange(2)
    shard = VocabShard.whole(6)
    policy = select(VocabLogits.of(torch.zeros(2, 6), rows), rows, Selection(2, 0.0))
    match = f"does not fit {columns} logit columns"
    with pytest.raises(ValueError, match=match):
        VocabLogits.of(logits, rows, shard).log_probs_at(rows.unsqueeze(-1))
    with pytest.raises(ValueError, match=match):
        VocabLogits.of(logits, rows, shard).top(2, rows)
    with pytest.raises(ValueError, match=match):
        select(VocabLogits.of(logits, rows, shard), rows, Selection(2, 0.0))
    for rule in ("union", "anchored"):
        with pytest.raises(ValueError, match=match):
            compare(rule, VocabLogits.of(logits, rows, shard), policy, Selection(2, 0.0))


# --- gradient ---------------------------------------------------------------------------------------------------------


def test_gradcheck_of_a_whole_shard_with_padding() -> None:
    logits = normal(4, 9, seed=6).requires_grad_()
    rows, ids = torch.tensor([3, 1]), torch.tensor([[0, 5, -1, 3], [6, -1, 0, 2]])
    shard = VocabShard.whole(9, 7)

    def at(leaf: Tensor) -> Tensor:
        return torch.where(ids >= 0, VocabLogits.of(leaf, rows, shard).log_probs_at(ids).log_probs, 0.0)

    assert torch.autograd.gradcheck(at, (logits,))
