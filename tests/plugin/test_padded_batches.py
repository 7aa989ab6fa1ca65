"""The support in the batches of verl's v0 trainers, between two calls of an engine."""

from __future__ import annotations

import random

import pytest
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict
from verl.utils import tensordict_utils as tu

from tests.distributed.batches import as_v0, make_batch
from tests.plugin.test_carry import packed
from verl_troll.plugin import carry
from verl_troll.plugin.engines.padded_batches import KeptSupports, is_padded

FIELDS = (carry.COUNTS, carry.SUPPORT)


def reordered(batch: TensorDict, order: list[int]) -> TensorDict:
    return tu.index_select_tensor_dict(batch, order)


def kept(batch: TensorDict) -> KeptSupports:
    supports = KeptSupports()
    supports.keep(batch, packed(batch, 5)[2])
    return supports


def test_response_tokens_are_those_of_the_batch_without_padding() -> None:
    batch = make_batch()
    assert is_padded(as_v0(batch)) and not is_padded(batch)
    found, expected = carry.response_tokens(as_v0(batch)), carry.response_tokens(batch)
    for name in ("rows", "ids", "mask", "sample", "offsets", "sequence", "sequence_offsets", "in_loss"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_each_sample_of_the_update_has_its_own_support() -> None:
    batch = as_v0(make_batch())
    order = random.Random(0).sample(range(8), 5)
    mini_batch = reordered(batch, order)
    kept(batch).add_to(mini_batch)
    fields = packed(batch, 5)[2]
    for name in FIELDS:
        rows = fields[name].unbind()
        assert all(map(torch.equal, mini_batch[name].unbind(), [rows[index] for index in order]))
    tokens = carry.response_tokens(mini_batch)
    carry.unpack(mini_batch, tokens, k=5, vocab_size=61).check(False)


def test_a_rejected_token_keeps_its_support() -> None:
    batch = as_v0(make_batch())
    supports = kept(batch)
    batch["response_mask"] = torch.zeros_like(batch["response_mask"])
    supports.add_to(batch)
    assert int(batch[carry.COUNTS].values().sum()) > 0


def test_a_new_pass_takes_the_place_of_the_last() -> None:
    first, second = as_v0(make_batch(0)), as_v0(make_batch(1))
    supports = kept(first)
    supports.keep(second, packed(second, 5)[2])
    supports.add_to(second)
    with pytest.raises(carry.MissingSupportError, match="were not in this rank's last old-log-prob pass, which had 8"):
        supports.add_to(first)


def test_a_rank_without_an_output_has_nothing_to_add() -> None:
    """A pipeline stage before the last: it reads no logits in the update either."""
    batch = as_v0(make_batch())
    supports = KeptSupports()
    supports.keep(batch, {})
    supports.add_to(batch)
    assert carry.COUNTS not in batch


@pytest.mark.parametrize("absent", [None, 2])
def test_the_support_that_samples_bring_is_taken(absent: int | None) -> None:
    batch = as_v0(make_batch())
    columns = [packed(batch, 5)[2][name].unbind() for name in FIELDS]
    samples = [dict(zip(FIELDS, row, strict=True)) for row in zip(*columns, strict=True)]
    brought = [None if index == absent else sample for index, sample in enumerate(samples)]
    batch[carry.SAMPLE] = NonTensorStack.from_list([NonTensorData(sample) for sample in brought])
    supports = kept(as_v0(make_batch(1)))
    supports.add_to(batch)
    if absent is None:
        for name, column in zip(FIELDS, columns, strict=True):
            assert all(map(torch.equal, batch[name].unbind(), column))
    else:
        with pytest.raises(carry.MissingSupportError, match=carry.COUNTS):
            carry.unpack(batch, carry.response_tokens(batch), k=5, vocab_size=61, from_engine=True)
