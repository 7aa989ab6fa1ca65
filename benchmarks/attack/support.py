"""The old policy's support, corrupted on the way from the old pass to the update or at its source."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor

from benchmarks.attack.attack import Attack, Extent, Outcome, one_thread
from verl_troll.core import wire
from verl_troll.core.support import Selection, select
from verl_troll.core.vocab import VocabLogits
from verl_troll.plugin import carry

VOCAB, K = 97, 6
NAMED = re.compile(r"sample \d+ of |the batch has no field|the micro-batch: .* support is wrong: troll_old_")
"""How an error starts: with the sample, or with what concerns all of them."""


@dataclass
class Batch:
    """A micro-batch as lists with a row per sample, easy to corrupt.

    Attributes:
        prompts, responses, masks, counts: lists of numbers.
        supports: int16 rows.
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    masks: list[list[int]]
    counts: list[list[int]]
    supports: list[Tensor]

    @classmethod
    def random(cls, rng: random.Random, samples: int = 6) -> Batch:
        """Random prompts and responses with the support of random policies."""
        generator = torch.Generator().manual_seed(rng.randrange(2**31))
        batch = cls([], [], [], [], [])
        # Of few lengths, so that rows of different samples fit each other.
        for length in [rng.randint(2, 4)] * 2 + [rng.randint(1, 6) for _ in range(samples - 2)]:
            batch.prompts.append([rng.randrange(VOCAB) for _ in range(rng.randint(1, 3))])
            batch.responses.append([rng.randrange(VOCAB) for _ in range(length)])
            batch.masks.append([1] + [int(rng.random() < 0.8) for _ in range(length - 1)])
        batch.counts, batch.supports = [[]] * samples, [torch.empty(0)] * samples
        for sample, response in enumerate(batch.responses):
            # Flat enough that at least two ids are kept.
            logits = rng.choice((0.5, 1, 2)) * torch.randn(len(response), VOCAB, generator=generator)
            old = select(VocabLogits.of(logits), torch.tensor(response), Selection(K, 1e-2))
            used = (old.ids >= 0) & torch.tensor(batch.masks[sample], dtype=torch.bool).unsqueeze(-1)
            batch.seal(sample, used.sum(-1).tolist(), old.ids[used], old.log_probs[used])
        return batch

    def seal(self, sample: int, counts: list[int], ids: Tensor, log_probs: Tensor) -> None:
        """Write a sample's rows as their source would, whatever is in them."""
        fields = carry.pack_sample(
            self.prompts[sample],
            self.responses[sample],
            torch.tensor(counts, dtype=torch.int16),
            ids.to(torch.int32),
            log_probs,
        )
        self.counts[sample], self.supports[sample] = fields[carry.COUNTS].tolist(), fields[carry.SUPPORT]

    def kept(self, sample: int) -> tuple[Tensor, Tensor]:
        """The kept ids and log-probabilities of a sample."""
        return carry.unpack_row(self.supports[sample])

    def data(self) -> TensorDict:
        """In verl's format."""
        sequences = [prompt + response for prompt, response in zip(self.prompts, self.responses, strict=True)]
        fields = {
            "input_ids": jagged([torch.tensor(row) for row in sequences]),
            "response_mask": jagged([torch.tensor(row) for row in self.masks]),
            carry.COUNTS: jagged([torch.tensor(row, dtype=torch.int16) for row in self.counts]),
            carry.SUPPORT: jagged(self.supports),
        }
        return TensorDict(fields, batch_size=[len(sequences)])


def jagged(rows: list[Tensor]) -> Tensor:
    """A nested tensor of these rows; some may be empty."""
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    return torch.nested.nested_tensor_from_jagged(torch.cat(rows), offsets)


Corruption = Callable[[random.Random, Batch], TensorDict]
"""Changes the batch and returns it in verl's format."""


def _in_order(batch: Batch, order: list[int]) -> TensorDict:
    """Both fields in another order, the samples in theirs."""
    batch.counts = [batch.counts[i] for i in order]
    batch.supports = [batch.supports[i] for i in order]
    return batch.data()


def _swapped_samples(rng: random.Random, batch: Batch) -> TensorDict:
    return _in_order(batch, [1, 0, *range(2, len(batch.counts))])


def _swapped_answers(rng: random.Random, batch: Batch) -> TensorDict:
    # Two prompts with the same response: only the prompt tells them apart.
    batch.responses[1], batch.masks[1] = list(batch.responses[0]), list(batch.masks[0])
    batch.prompts[1] = [*batch.prompts[0][:-1], (batch.prompts[0][-1] + 1) % VOCAB]
    ids, log_probs = batch.kept(0)
    batch.seal(1, batch.counts[0], ids, (log_probs - 0.01))
    return _swapped_samples(rng, batch)


def _rotated(rng: random.Random, batch: Batch) -> TensorDict:
    return _in_order(batch, [*range(1, len(batch.counts)), 0])


def _swapped_counts(rng: random.Random, batch: Batch) -> TensorDict:
    if batch.counts[0] == batch.counts[1]:
        batch.counts[0][0] += 1
    batch.counts[0], batch.counts[1] = batch.counts[1], batch.counts[0]
    return batch.data()


def _swapped_supports(rng: random.Random, batch: Batch) -> TensorDict:
    batch.supports[0], batch.supports[1] = batch.supports[1], batch.supports[0]
    return batch.data()


def _exchanged_fields(rng: random.Random, batch: Batch) -> TensorDict:
    data = batch.data()
    data[carry.COUNTS], data[carry.SUPPORT] = data[carry.SUPPORT], data[carry.COUNTS]
    return data


def _another_batch(rng: random.Random, batch: Batch) -> TensorDict:
    other = Batch.random(rng)
    batch.counts, batch.supports = other.counts, other.supports
    return batch.data()


def _some(rng: random.Random, batch: Batch) -> int:
    return rng.randrange(len(batch.counts))


def _inserted(rng: random.Random, batch: Batch) -> TensorDict:
    sample = _some(rng, batch)
    codes = wire.from_words(batch.supports[sample])
    place = rng.randrange(len(codes))
    batch.supports[sample] = wire.to_words(torch.cat([codes[:place], codes[place:][:1], codes[place:]]))
    return batch.data()


def _removed(rng: random.Random, batch: Batch) -> TensorDict:
    sample = _some(rng, batch)
    codes = wire.from_words(batch.supports[sample])
    place = rng.randrange(len(codes))
    batch.supports[sample] = wire.to_words(torch.cat([codes[:place], codes[place + 1 :]]))
    return batch.data()


def _shortened(rng: random.Random, batch: Batch) -> TensorDict:
    sample = _some(rng, batch)
    batch.supports[sample] = batch.supports[sample][: rng.randrange(len(batch.supports[sample]))]
    return batch.data()


def _moved_count(rng: random.Random, batch: Batch) -> TensorDict:
    counts = batch.counts[rng.randrange(2)]
    one, other = rng.sample(range(len(counts)), 2)
    counts[one] += 1
    counts[other] -= 1
    return batch.data()


def _flipped_count(rng: random.Random, batch: Batch) -> TensorDict:
    counts = batch.counts[_some(rng, batch)]
    place = rng.randrange(len(counts))
    counts[place] = int(torch.tensor(counts[place] ^ 1 << rng.randrange(16)).to(torch.int16))
    return batch.data()


def _flipped_bit(rng: random.Random, batch: Batch) -> TensorDict:
    row = batch.supports[_some(rng, batch)]
    row[rng.randrange(len(row))] ^= int(torch.tensor(1 << rng.randrange(16)).to(torch.int16))
    return batch.data()


def _changed_log_prob(rng: random.Random, batch: Batch) -> TensorDict:
    sample = _some(rng, batch)
    codes = wire.from_words(batch.supports[sample])
    if len(codes) > 1:
        place = rng.randrange(len(codes) - 1)
        ids, log_probs = wire.decode(codes[place : place + 1])
        codes[place] = wire.encode(ids, log_probs * (1 + 1e-5) - 1e-5)[0]
    else:
        codes[0] ^= 1
    batch.supports[sample] = wire.to_words(codes)
    return batch.data()


def _random_words(rng: random.Random, batch: Batch) -> TensorDict:
    sample = _some(rng, batch)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    row = batch.supports[sample]
    batch.supports[sample] = torch.randint(-(2**15), 2**15, row.shape, generator=generator).to(torch.int16)
    return batch.data()


def _duplicated(rng: random.Random, batch: Batch) -> TensorDict:
    sample = rng.randrange(2)
    codes = wire.from_words(batch.supports[sample])
    codes[0] = codes[1] if len(codes) > 2 else codes[0] ^ 1
    batch.supports[sample] = wire.to_words(codes)
    return batch.data()


def _changed_response(rng: random.Random, batch: Batch) -> TensorDict:
    response = batch.responses[_some(rng, batch)]
    place = rng.randrange(len(response))
    response[place] = (response[place] + rng.randrange(1, VOCAB)) % VOCAB
    return batch.data()


def _changed_prompt(rng: random.Random, batch: Batch) -> TensorDict:
    prompt = batch.prompts[_some(rng, batch)]
    place = rng.randrange(len(prompt))
    prompt[place] = (prompt[place] + rng.randrange(1, VOCAB)) % VOCAB
    return batch.data()


def _unmasked(rng: random.Random, batch: Batch) -> TensorDict:
    sample = rng.randrange(2)
    ids, log_probs = batch.kept(sample)
    batch.seal(sample, [0, *batch.counts[sample][1:]], *(x[batch.counts[sample][0] :] for x in (ids, log_probs)))
    return batch.data()


def _padded(rng: random.Random, batch: Batch) -> TensorDict:
    data = batch.data()
    name = rng.choice((carry.COUNTS, carry.SUPPORT))
    data[name] = torch.nested.to_padded_tensor(data[name], 0)
    return data


def _other_dtype(rng: random.Random, batch: Batch) -> TensorDict:
    data = batch.data()
    name = rng.choice((carry.COUNTS, carry.SUPPORT))
    data[name] = data[name].to(rng.choice((torch.int32, torch.int64, torch.float32)))
    return data


def _missing_field(rng: random.Random, batch: Batch) -> TensorDict:
    data = batch.data()
    del data[rng.choice((carry.COUNTS, carry.SUPPORT))]
    return data


def _source(change: Callable[[random.Random, int, Tensor, Tensor], None]) -> Corruption:
    """A fault of the source, with the right checksum, in what the first sample keeps at its first token.

    ``change`` gets the sampled id, the ids and their log-probabilities, and changes the latter two.
    """

    def corrupt(rng: random.Random, batch: Batch) -> TensorDict:
        ids, log_probs = (x.clone() for x in batch.kept(0))
        first = batch.counts[0][0]
        change(rng, batch.responses[0][0], ids[:first], log_probs[:first])
        batch.seal(0, batch.counts[0], ids, log_probs)
        return batch.data()

    return corrupt


def _beyond_vocabulary(rng: random.Random, sampled: int, ids: Tensor, log_probs: Tensor) -> None:
    ids[rng.randrange(len(ids))] = rng.randrange(VOCAB, wire.MAX_VOCAB_SIZE)


def _nan(rng: random.Random, sampled: int, ids: Tensor, log_probs: Tensor) -> None:
    log_probs[rng.randrange(len(ids))] = torch.nan


def _not_sampled(rng: random.Random, sampled: int, ids: Tensor, log_probs: Tensor) -> None:
    ids.copy_(torch.tensor(rng.sample([i for i in range(VOCAB) if i != sampled], len(ids))))


def _too_much_mass(rng: random.Random, sampled: int, ids: Tensor, log_probs: Tensor) -> None:
    log_probs.fill_(-0.4)


CORRUPTIONS: dict[str, Corruption] = {
    "two samples' supports are swapped": _swapped_samples,
    "swapped between prompts that have the same response": _swapped_answers,
    "all supports move to the next sample": _rotated,
    "two samples' counts are swapped": _swapped_counts,
    "two samples' ids are swapped": _swapped_supports,
    "the two fields are exchanged": _exchanged_fields,
    "the fields are those of another batch": _another_batch,
    "a code is inserted": _inserted,
    "a code is removed": _removed,
    "a row is cut short": _shortened,
    "a count moves to another token": _moved_count,
    "a bit of a count flips": _flipped_count,
    "a bit of a code flips": _flipped_bit,
    "a log-probability changes by 1e-5": _changed_log_prob,
    "a row is random": _random_words,
    "an id is there twice": _duplicated,
    "a response token changes": _changed_response,
    "a prompt token changes": _changed_prompt,
    "a token in the loss has no support": _unmasked,
    "a field arrives padded": _padded,
    "a field arrives in another type": _other_dtype,
    "a field is missing": _missing_field,
    "written with an id beyond the vocabulary": _source(_beyond_vocabulary),
    "written with a NaN": _source(_nan),
    "written without the sampled id": _source(_not_sampled),
    "written with a mass above 1": _source(_too_much_mass),
}


def unpacked(data: TensorDict, *, fixed_width: bool) -> None:
    """Unpack as the update does, with the check at its end."""
    tokens = carry.response_tokens(data)
    found = carry.unpack(data, tokens, k=K, vocab_size=VOCAB, fixed_width=fixed_width)
    found.check(bool(found.wrong))


def _run(extent: Extent) -> Outcome:
    rng = random.Random(extent.seed)
    outcome = Outcome()
    with one_thread():
        for number in range(extent.tries(400)):
            for name, corrupt in CORRUPTIONS.items():
                batch = Batch.random(rng)
                width = bool(number % 2)
                unpacked(batch.data(), fixed_width=width)
                try:
                    unpacked(corrupt(rng, batch), fixed_width=width)
                except carry.SupportError as error:
                    outcome.record(NAMED.match(str(error)) is not None, f"{name}: names no sample: {error}")
                except Exception as error:
                    outcome.record(False, f"{name}: {type(error).__name__}: {error}")
                else:
                    outcome.record(False, f"{name}: accepted")
    return outcome


ATTACKS = (Attack("support", "a support corrupted on the way or at its source is refused, and the sample named", _run),)
