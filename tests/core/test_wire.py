"""The old policy's support in 48 bits per kept id: what is exact, and how large the error is elsewhere."""

from __future__ import annotations

import math
import struct

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from verl_troll.core import wire

INF = math.inf
SMALLEST = 2.0**-24
ids = st.integers(0, 2**20 - 1)
# The last float above -128 encodes NaN.
LOWEST = -128 + 2.0**-16
exact = st.floats(min_value=LOWEST, max_value=-SMALLEST, width=32)


def there_and_back(pairs: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    words = wire.to_words(
        wire.encode(
            torch.tensor([i for i, _ in pairs], dtype=torch.int64),
            torch.tensor([x for _, x in pairs], dtype=torch.float32),
        )
    )
    assert words.dtype == torch.int16
    assert words.shape == (3 * len(pairs),)
    decoded, log_probs = wire.decode(wire.from_words(words))
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


# --- checksums --------------------------------------------------------------------------------------------------------


def samples_of(*samples: list[int]) -> tuple[Tensor, Tensor]:
    values = torch.tensor([value for sample in samples for value in sample], dtype=torch.int64)
    return values, torch.tensor([0, *(len(sample) for sample in samples)]).cumsum(0)


codes = st.lists(st.integers(0, 2**48 - 1), max_size=6)


@settings(deadline=None, max_examples=200)
@given(st.lists(codes, min_size=1, max_size=5))
def test_a_samples_checksum_depends_on_that_sample_alone(samples: list[list[int]]) -> None:
    together = wire.checksums(*samples_of(*samples))
    assert [wire.checksums(*samples_of(sample)).item() for sample in samples] == together.tolist()
    assert all(0 <= value < 2**48 for value in together.tolist())


@settings(deadline=None, max_examples=300)
@given(codes, codes)
def test_different_samples_have_different_checksums(one: list[int], other: list[int]) -> None:
    own, changed = wire.checksums(*samples_of(one, other)).tolist()
    assert (own == changed) == (one == other)


def test_the_checksum_sees_the_order_and_changes_that_cancel() -> None:
    ids = list(range(40, 48))
    moved = [ids[0] + 1, ids[1] - 1, ids[2] - 1, ids[3] + 1, *ids[4:]]
    variants = [ids, ids[::-1], [ids[1], ids[0], *ids[2:]], moved, [*ids, 0], ids[:-1], [0, *ids]]
    assert len(set(wire.checksums(*samples_of(*variants)).tolist())) == len(variants)


def test_the_checksum_is_that_of_the_loop() -> None:
    def signed(value: int) -> int:
        return (value + 2**63) % 2**64 - 2**63

    def mixed(value: int, place: int) -> int:
        state = signed((value + (place + 1) * 0x9E3779B97F4A7C15) * 0xBF58476D1CE4E5B9)
        return (state ^ state >> 32) * 0x94D049BB133111EB

    values = [3, 2**47, 0, 5]
    expected = sum(mixed(value, place) for place, value in enumerate(values)) % 2**48
    assert wire.checksums(*samples_of([7], values)).tolist()[1] == expected
