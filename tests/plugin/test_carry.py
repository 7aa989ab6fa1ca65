"""The old policy's support in the batch: it comes back as it was packed, and nothing else is accepted."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from verl.workers.utils.padding import no_padding_2_padding

from benchmarks.attack.attack import one_thread
from benchmarks.attack.support import CORRUPTIONS, NAMED, Batch, K, unpacked
from benchmarks.attack.support import VOCAB as SMALL_VOCAB
from tests.distributed.batches import VOCAB, make_batch
from verl_troll.core.support import Selection, SparsePolicy, select
from verl_troll.core.vocab import VocabLogits
from verl_troll.plugin import carry

INF = math.inf


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


def unpack(
    batch: TensorDict, tokens: carry.ResponseTokens, k: int = 5, *, fixed_width: bool = False, from_engine: bool = False
) -> carry.Unpacked:
    return carry.unpack(batch, tokens, k=k, vocab_size=VOCAB, fixed_width=fixed_width, from_engine=from_engine)


def packed(batch: TensorDict, k: int) -> tuple[SparsePolicy, carry.ResponseTokens, dict[str, Tensor]]:
    tokens = carry.response_tokens(batch)
    policy = old_policy(tokens, k)
    return policy, tokens, carry.pack(everywhere(policy.ids, tokens), everywhere(policy.log_probs, tokens), tokens)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_the_policy_comes_back_bit_for_bit(k: int) -> None:
    batch = make_batch()
    policy, tokens, fields = packed(batch, k)
    batch.update(fields)
    back = unpack(batch, tokens, k).policy
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
    back = unpack(shuffled, again).policy
    sample = torch.repeat_interleave(torch.arange(8), tokens.offsets.diff())[tokens.mask]
    expected = [policy.ids[sample == i] for i in order]
    assert torch.equal(back.ids[back.ids >= 0], torch.cat([ids[ids >= 0] for ids in expected]))


def test_two_bytes_for_each_token_and_six_for_each_kept_id_and_sample() -> None:
    policy, tokens, fields = packed(make_batch(), 7)
    assert set(fields) == {"troll_old_counts", "troll_old_support"}
    kept = int((policy.ids >= 0).sum())
    assert sum(value.values().nbytes for value in fields.values()) == 2 * tokens.rows.shape[0] + 6 * (kept + 8)
    counts = fields[carry.COUNTS]
    for sample, row in enumerate(fields[carry.SUPPORT].unbind()):
        assert len(row) == 3 * int(counts.unbind()[sample].sum()) + 3


def test_a_batch_without_a_token_that_takes_part() -> None:
    batch = make_batch()
    mask = batch["response_mask"]
    batch["response_mask"] = torch.nested.nested_tensor_from_jagged(torch.zeros_like(mask.values()), mask.offsets())
    tokens = carry.response_tokens(batch)
    responses = tokens.mask.shape[0]
    fields = carry.pack(torch.zeros(responses, 3, dtype=torch.int64), torch.zeros(responses, 3), tokens)
    batch.update(fields)
    back = unpack(batch, tokens).policy
    assert back.ids.shape[0] == back.log_probs.shape[0] == back.sampled.shape[0] == 0


def test_a_fixed_width_needs_no_reading_of_the_counts() -> None:
    batch = make_batch()
    _, tokens, fields = packed(batch, 5)
    batch.update(fields)
    free, fixed = unpack(batch, tokens), unpack(batch, tokens, 9, fixed_width=True)
    width = free.policy.ids.shape[1]
    assert (width, fixed.policy.ids.shape[1]) == (6, 10)
    assert torch.equal(fixed.policy.ids[:, :width], free.policy.ids)
    assert bool((fixed.policy.ids[:, width:] == -1).all())
    assert torch.equal(fixed.policy.sampled, free.policy.sampled)
    assert not bool(free.wrong) and not bool(fixed.wrong)


def test_one_sample_is_packed_as_in_a_batch() -> None:
    batch = make_batch()
    policy, tokens, fields = packed(batch, 5)
    live = policy.ids >= 0
    of = tokens.sample[tokens.mask]
    for sample in range(8):
        used = live[of == sample]
        counts = torch.zeros(len(batch["responses"].unbind()[sample]), dtype=torch.int16)
        counts[batch["response_mask"].unbind()[sample].bool()] = used.sum(-1).to(torch.int16)
        alone = carry.pack_sample(
            batch["prompts"].unbind()[sample].tolist(),
            batch["responses"].unbind()[sample].tolist(),
            counts,
            policy.ids[of == sample][used].to(torch.int32),
            policy.log_probs[of == sample][used],
        )
        for name, row in alone.items():
            assert torch.equal(row, fields[name].unbind()[sample]), name


# --- how old the tokens are -------------------------------------------------------------------------------------------


def with_versions(batch: TensorDict) -> Tensor:
    """Add versions of 3 to 7, and return them ``[R]``."""
    mask = batch["response_mask"]
    versions = torch.randint(3, 8, mask.values().shape, generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    versions[~mask.values().bool()] = -1
    batch[carry.VERSIONS] = torch.nested.nested_tensor_from_jagged(versions, mask.offsets())
    return versions


def test_ages_are_those_of_the_tokens_that_take_part() -> None:
    batch = make_batch()
    tokens = carry.response_tokens(batch)
    assert carry.token_ages(batch, tokens, 9) is None
    versions = with_versions(batch)
    assert carry.token_ages(batch, tokens, None) is None
    ages = carry.token_ages(batch, tokens, 9)
    assert ages is not None
    assert ages.tolist() == [9 - int(version) for version in versions[tokens.mask]]
    first = int(tokens.in_loss[0])
    batch[carry.VERSIONS].values()[first] = -1
    ages = carry.token_ages(batch, tokens, 9)
    assert ages is not None
    assert ages.isnan().nonzero().tolist() == [[0]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda versions: versions.to_padded_tensor(0), r"is padded and torch\.int32, not ragged torch\.int32"),
        (lambda versions: versions.long(), r"is ragged and torch\.int64, not ragged torch\.int32"),
        (
            lambda versions: torch.nested.as_nested_tensor([row[1:] for row in versions.unbind()], layout=torch.jagged),
            r"has \d+ entries for \d+ response tokens",
        ),
    ],
)
def test_versions_that_are_not_those_of_the_tokens_are_refused(change: Callable[[Tensor], Tensor], said: str) -> None:
    batch = make_batch()
    with_versions(batch)
    batch[carry.VERSIONS] = change(batch[carry.VERSIONS])
    with pytest.raises(carry.SupportError, match=f"the micro-batch: .*troll_old_versions {said}"):
        carry.token_ages(batch, carry.response_tokens(batch), 9)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixed_width", [False, True])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corrupted_support_is_refused_and_the_sample_named(name: str, fixed_width: bool) -> None:
    rng = random.Random(name)
    with one_thread():
        for _ in range(3):
            batch = Batch.random(rng)
            unpacked(batch.data(), fixed_width=fixed_width)
            with pytest.raises(carry.SupportError, match=NAMED):
                unpacked(CORRUPTIONS[name](rng, batch), fixed_width=fixed_width)


def test_the_message_tells_which_sample_and_where_to_look() -> None:
    batch = Batch.random(random.Random(0))
    batch.supports[2], batch.supports[4] = batch.supports[4], batch.supports[2]
    ids = [*batch.prompts[2], *batch.responses[2]]
    with pytest.raises(carry.SupportError) as caught:
        unpacked(batch.data(), fixed_width=True)
    message = str(caught.value)
    assert message.startswith("sample 2 of 6 in the micro-batch")
    assert f"first ids {ids[:8]}" in message
    assert "troll_old_support must reach the update" in message


def test_without_the_checksum_a_change_of_log_probabilities_would_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is, the test above can fail."""
    rng = random.Random(1)
    monkeypatch.setattr(carry, "_checksums", lambda codes, offsets, *_: codes[(offsets[1:] - 1).clamp_min(0)] * 0)
    batch = Batch.random(rng)
    for row in batch.supports:
        row[-3:] = 0
    unpacked(CORRUPTIONS["a log-probability changes by 1e-5"](rng, batch), fixed_width=True)


def test_more_ids_than_k_allows_are_refused() -> None:
    batch = make_batch()
    _, tokens, fields = packed(batch, 5)
    batch.update(fields)
    message = r"has 6 ids in its support, but k allows 2"
    with pytest.raises(carry.SupportError, match=message):
        unpack(batch, tokens, 2)
    late = unpack(batch, tokens, 2, fixed_width=True)
    with pytest.raises(carry.SupportError, match=message):
        late.check(bool(late.wrong))


def test_a_wrong_support_is_harmless_until_it_is_reported() -> None:
    """What runs before the check gets ids of the vocabulary and the sampled id."""
    rng = random.Random(2)
    with one_thread():
        for name, corrupt in CORRUPTIONS.items():
            batch = corrupt(rng, Batch.random(rng))
            try:
                found = carry.unpack(batch, carry.response_tokens(batch), k=K, vocab_size=SMALL_VOCAB, fixed_width=True)
            except carry.SupportError:
                continue
            policy, tokens = found.policy, found.arrived.tokens
            assert int(policy.ids.max()) < SMALL_VOCAB, name
            assert torch.equal(policy.sampled_ids, tokens.ids[tokens.in_loss]), name


@pytest.mark.parametrize("name", ["troll_old_counts", "troll_old_support"])
def test_a_missing_field_is_named(name: str) -> None:
    batch = make_batch()
    _, tokens, fields = packed(batch, 5)
    batch.update({other: value for other, value in fields.items() if other != name})
    with pytest.raises(carry.MissingSupportError, match=name):
        unpack(batch, tokens)


@pytest.mark.parametrize("from_engine", [False, True])
def test_a_missing_field_is_explained_by_what_supplies_it(from_engine: bool) -> None:
    batch = make_batch()
    with pytest.raises(carry.MissingSupportError) as caught:
        unpack(batch, carry.response_tokens(batch), from_engine=from_engine)
    message = str(caught.value)
    # Neither can be what is wrong: start-up refuses them.
    assert "bypass_mode" not in message
    assert ("old-log-prob pass" in message) != from_engine
    for word in ("rollout engine", "agent_name", "single_turn_agent", "RolloutSupportMixin"):
        assert (word in message) == from_engine


@pytest.mark.parametrize("from_engine", [False, True])
def test_other_faults_name_what_supplied_the_support(from_engine: bool) -> None:
    batch = make_batch()
    policy, tokens, fields = packed(batch, 5)
    batch.update(fields)
    with pytest.raises(carry.SupportError) as caught:
        unpack(batch, tokens, 2, from_engine=from_engine)
    assert ("actor_rollout_ref.rollout.custom.troll.k" in str(caught.value)) == from_engine
    ids, log_probs = everywhere(policy.ids, tokens), everywhere(policy.log_probs, tokens)
    first = int(tokens.in_loss[0])
    for name, fault in (("had no support", "no ids"), ("NaN", "nan")):
        wrong_ids, wrong_values = ids.clone(), log_probs.clone()
        if fault == "nan":
            wrong_values[first, 0] = math.nan
        else:
            wrong_ids[first] = -1
        batch.update(carry.pack(wrong_ids, wrong_values, tokens))
        with pytest.raises(carry.SupportError, match=name) as caught:
            unpack(batch, tokens, from_engine=from_engine)
        assert ("rollout engine" in str(caught.value)) == from_engine
        assert ("old-log-prob pass" in str(caught.value)) != from_engine


def test_padded_sequences_are_refused() -> None:
    batch = make_batch()
    batch["input_ids"] = batch["input_ids"].to_padded_tensor(0)
    with pytest.raises(carry.MissingSupportError, match="no-padding format"):
        carry.response_tokens(batch)


def test_padding_is_that_of_verl() -> None:
    """One response is empty; what lies outside the responses does not matter."""
    batch = make_batch()
    tokens = carry.response_tokens(batch)
    assert 0 in tokens.offsets.diff().tolist()
    values = torch.randn(batch["input_ids"].values().shape[0], dtype=torch.float64, requires_grad=True)
    expected = no_padding_2_padding(values, batch)
    found = tokens.pad(values, expected.shape)
    assert torch.equal(found, expected)
    weights = torch.randn_like(expected)
    own, reference = (torch.autograd.grad((x * weights).sum(), values)[0] for x in (found, expected))
    assert torch.equal(own, reference)
    assert tokens.pad(values, torch.Size((len(batch), 40))).shape == (len(batch), 40)
