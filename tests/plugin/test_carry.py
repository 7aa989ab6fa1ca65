"""The old policy's support in 48 bits per kept id: what is exact, and how large the error is elsewhere."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor

from tests.distributed.batches import VOCAB, make_batch
from verl_troll.core import wire
from verl_troll.core.support import Selection, SparsePolicy, select
from verl_troll.core.vocab import VocabLogits
from verl_troll.plugin import carry

INF = math.inf
SMALLEST = 2.0**-24
ids = st.integers(0, 2**20 - 1)
# The last float above -128 encodes NaN.
LOWEST = -128 + 2.0**-16
exact = st.floats(min_value=LOWEST, max_value=-SMALLEST, width=32)


def there_and_back(pairs: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    words = wire.encode(
        torch.tensor([i for i, _ in pairs], dtype=torch.int64), torch.tensor([x for _, x in pairs], dtype=torch.float32)
    )
    assert words.dtype == torch.int16
    assert words.shape == (3 * len(pairs),)
    decoded, log_probs = wire.decode(words)
    assert (decoded.dtype, log_probs.dtype) == (torch.int64, torch.float32)
    return decoded.tolist(), log_probs.tolist()


def bits(value: float) -> bytes:
    return struct.pack("<f", value)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(ids, st.one_of(exact, st.just(0.0))), max_size=9))
def test_ids_and_log_probabilities_come_back_bit_for_bit(pairs: list[tuple[int, float]]) -> None:
    decoded, log_probs = there_and_back(pairs)
    assert decoded == [i for i, _ in pairs]
    assert [bits(x) for x in log_probs] == [bits(x) for _, x in pairs]


def test_both_ends_of_every_binade() -> None:
    values = [-(2.0**exponent) for exponent in range(-24, 7)]
    values += [float(torch.nextafter(torch.tensor(value), torch.tensor(-INF))) for value in values]
    values += [float(torch.nextafter(torch.tensor(2 * value), torch.tensor(0.0))) for value in values[:30]]
    values.append(LOWEST)
    for i in (0, 1, 2**19, 2**20 - 1):
        decoded, log_probs = there_and_back([(i, value) for value in values])
        assert decoded == [i] * len(values)
        assert log_probs == values


def test_nan_stays_nan() -> None:
    decoded, log_probs = there_and_back([(7, math.nan), (8, -1.0)])
    assert decoded == [7, 8]
    assert math.isnan(log_probs[0])
    assert log_probs[1] == -1


@settings(deadline=None, max_examples=200)
@given(ids, st.floats(min_value=-SMALLEST, max_value=0.0, width=32, exclude_min=True))
def test_values_close_to_0_become_0(i: int, value: float) -> None:
    assert there_and_back([(i, value)]) == ([i], [0.0])


@settings(deadline=None, max_examples=200)
@given(ids, st.floats(max_value=-128.0, width=32, allow_nan=False))
def test_values_below_the_lowest_become_the_lowest(i: int, value: float) -> None:
    decoded, log_probs = there_and_back([(i, value)])
    assert decoded == [i]
    assert log_probs[0] == LOWEST
    # In float32 both are probability 0.
    assert math.exp(log_probs[0]) < torch.finfo(torch.float32).smallest_normal


def test_rounding_above_0_becomes_0() -> None:
    assert there_and_back([(5, 1e-7), (6, 2e-3)]) == ([5, 6], [0.0, 0.0])


# --- packed with a batch ----------------------------------------------------------------------------------------------


def old_policy(tokens: carry.ResponseTokens, k: int, columns: int = VOCAB) -> SparsePolicy:
    """A policy at the unmasked tokens."""
    generator = torch.Generator().manual_seed(1)
    count = int(tokens.mask.sum())
    logits = 3 * torch.randn(count, columns, generator=generator)
    return select(VocabLogits.of(logits, torch.arange(count)), tokens.ids[tokens.mask], Selection(k, 1e-3))


def everywhere(values: Tensor, tokens: carry.ResponseTokens) -> Tensor:
    """``values [M, W]`` at the unmasked tokens, arbitrary values elsewhere."""
    result = torch.ones(tokens.mask.shape[0], values.shape[1], dtype=values.dtype)
    result[tokens.mask] = values
    return result


def packed(batch: TensorDict, k: int) -> tuple[SparsePolicy, carry.ResponseTokens, dict[str, Tensor]]:
    tokens = carry.response_tokens(batch)
    policy = old_policy(tokens, k)
    return policy, tokens, carry.pack(everywhere(policy.ids, tokens), everywhere(policy.log_probs, tokens), tokens)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_the_policy_comes_back_bit_for_bit(k: int) -> None:
    batch = make_batch()
    policy, tokens, fields = packed(batch, k)
    batch.update(fields)
    back = carry.unpack(batch, tokens).policy
    used = policy.ids >= 0
    assert torch.equal((back.ids >= 0).sum(-1), used.sum(-1))
    assert torch.equal(back.ids[back.ids >= 0], policy.ids[used])
    own, other = back.log_probs[back.ids >= 0], policy.log_probs[used]
    assert torch.equal(own.view(torch.int32), other.view(torch.int32))
    assert bool((back.log_probs[back.ids < 0] == -INF).all())
    place = back.sampled.unsqueeze(-1)
    assert torch.equal(back.ids.gather(-1, place).squeeze(-1), tokens.ids[tokens.mask])


def test_samples_may_change_places() -> None:
    batch = make_batch()
    policy, tokens, fields = packed(batch, 5)
    batch.update(fields)
    order = [5, 0, 3, 7, 1, 6, 2, 4]
    rows = torch.nested.as_nested_tensor
    shuffled = TensorDict(
        {
            name: rows([value.unbind()[i] for i in order], layout=torch.jagged)
            for name, value in batch.items()
            if name in (carry.COUNTS, carry.SUPPORT, "input_ids", "response_mask")
        },
        batch_size=[8],
    )
    again = carry.response_tokens(shuffled)
    back = carry.unpack(shuffled, again).policy
    sample = torch.repeat_interleave(torch.arange(8), tokens.offsets.diff())[tokens.mask]
    expected = [policy.ids[sample == i] for i in order]
    assert torch.equal(back.ids[back.ids >= 0], torch.cat([ids[ids >= 0] for ids in expected]))


def test_two_bytes_for_each_token_and_six_for_each_kept_id() -> None:
    policy, tokens, fields = packed(make_batch(), 7)
    assert set(fields) == {"troll_old_counts", "troll_old_support"}
    kept = int((policy.ids >= 0).sum())
    assert sum(value.values().nbytes for value in fields.values()) == 2 * tokens.rows.shape[0] + 6 * kept
    counts = fields[carry.COUNTS]
    for sample, row in enumerate(fields[carry.SUPPORT].unbind()):
        assert len(row) == 3 * int(counts.unbind()[sample].sum())


def test_a_batch_without_a_token_that_takes_part() -> None:
    batch = make_batch()
    mask = batch["response_mask"]
    batch["response_mask"] = torch.nested.nested_tensor_from_jagged(torch.zeros_like(mask.values()), mask.offsets())
    tokens = carry.response_tokens(batch)
    responses = tokens.mask.shape[0]
    fields = carry.pack(torch.zeros(responses, 3, dtype=torch.int64), torch.zeros(responses, 3), tokens)
    batch.update(fields)
    back = carry.unpack(batch, tokens).policy
    assert back.ids.shape[0] == back.log_probs.shape[0] == back.sampled.shape[0] == 0


@pytest.mark.parametrize("width", [6, 9])
def test_a_given_width_needs_no_reading_of_the_counts(width: int) -> None:
    batch = make_batch()
    _, tokens, fields = packed(batch, 5)
    batch.update(fields)
    free, given = carry.unpack(batch, tokens), carry.unpack(batch, tokens, width)
    assert given.width == given.policy.ids.shape[1] == width
    assert torch.equal(given.policy.ids[:, : free.width], free.policy.ids)
    assert bool((given.policy.ids[:, free.width :] == -1).all())
    assert torch.equal(given.policy.sampled, free.policy.sampled)
    fewest, most = given.counts.tolist()
    carry.check_counts(fewest, most, width)


def test_more_ids_than_a_given_width_holds_are_refused() -> None:
    batch = make_batch()
    _, tokens, fields = packed(batch, 5)
    batch.update(fields)
    unpacked = carry.unpack(batch, tokens, 3)
    fewest, most = unpacked.counts.tolist()
    with pytest.raises(carry.MissingSupportError, match=r"has 6 ids in its support, but k allows 2"):
        carry.check_counts(fewest, most, unpacked.width)


@pytest.mark.parametrize("name", ["troll_old_counts", "troll_old_support"])
def test_a_missing_field_is_named(name: str) -> None:
    batch = make_batch()
    _, tokens, fields = packed(batch, 5)
    batch.update({other: value for other, value in fields.items() if other != name})
    with pytest.raises(carry.MissingSupportError, match=name):
        carry.unpack(batch, tokens)
