"""The old policy's support in the batch, between the old-log-prob pass and the update.

Two ragged fields hold it, one row per sample, response tokens only:

    troll_old_counts   [B, r]       int16  ids kept at each response token; 0 where ``response_mask`` is 0
    troll_old_support  [B, 3s + 3]  int16  a code of three words for each kept id, token after token (s = sum of the
                                           counts), and the sample's checksum

Where the rollout engine supplies the support, a third tells how old it is:

    troll_old_versions [B, r]       int32  version of the weights that sampled each response token, -1 if unknown or
                                           where ``response_mask`` is 0

verl slices, shuffles and queues them like its own fields. They cost 2 bytes per response token, 6 per kept id and 6 per
sample; versions cost 4 per response token. :mod:`verl_troll.core.wire` has the codes.

The checksum covers the prompt, the response, the counts and the codes. So a support that was changed on the way, or
that reached another sample, is refused in the update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

import torch
from tensordict import TensorDict
from torch import Tensor

from verl_troll.core import wire
from verl_troll.core.support import SparsePolicy

COUNTS = "troll_old_counts"
SUPPORT = "troll_old_support"
VERSIONS = "troll_old_versions"
SAMPLE = "troll_support"
"""The fields of one sample, as an object: what an agent loop adds to its output."""

TRAINED_VERSION = "troll_trained_version"
"""Non-tensor item of an update's batch: the version of the weights at the start of the trainer's step."""

MASS_LIMIT = 1.01
"""The mass of a token's kept ids may exceed 1 by an engine's rounding, not by more."""


class SupportError(RuntimeError):
    """The old policy's support cannot be that of the sample it arrived with."""


class MissingSupportError(SupportError):
    """The update was asked for without the old policy's support."""


@dataclass(frozen=True)
class ResponseTokens:
    """Response tokens of a packed micro-batch, all ``[R]`` in order of samples.

    Attributes:
        rows: int64, position in the packed sequence at which the logits predict the token.
        ids: int64, the token itself.
        mask: bool, ``response_mask``.
        sample: int64, index of its sample.
        place: int64, its place in the response.
        offsets: ``[B + 1]`` int64, where the tokens of each sample start.
        sequence: ``[T]``, all tokens, prompts included.
        sequence_offsets: ``[B + 1]`` int64, where the sequence of each sample starts.
    """

    rows: Tensor
    ids: Tensor
    mask: Tensor
    sample: Tensor
    place: Tensor
    offsets: Tensor
    sequence: Tensor
    sequence_offsets: Tensor

    @classmethod
    def of(cls, sequence: Tensor, sequence_offsets: Tensor, mask: Tensor, offsets: Tensor) -> ResponseTokens:
        """The responses at the ends of the sequences. No host synchronisation."""
        lengths = offsets.diff()
        # With output_size, repeat_interleave does not wait for the accelerator.
        sample = torch.arange(lengths.shape[0], device=lengths.device)
        sample = torch.repeat_interleave(sample, lengths, output_size=mask.shape[0])
        place = torch.arange(mask.shape[0], device=lengths.device) - offsets[sample]
        rows = sequence_offsets[1:][sample] - lengths[sample] - 1 + place
        return cls(rows, sequence[rows + 1].long(), mask, sample, place, offsets, sequence, sequence_offsets)

    @cached_property
    def in_loss(self) -> Tensor:
        """``[M]`` int64, indices of the M tokens whose mask is set. One host synchronisation, the first time."""
        return self.mask.nonzero().squeeze(-1)

    def pad(self, values: Tensor, shape: torch.Size) -> Tensor:
        """``values [T]`` of the packed positions as a matrix of responses, 0 after each response; differentiable.

        As verl's ``no_padding_2_padding``, which waits for an accelerator several times per sample; this does not.

        Args:
            shape: ``(B, L)``, L at least the longest response.
        """
        full = values.new_zeros(shape.numel())
        return full.index_copy(0, self.sample * shape[1] + self.place, values.index_select(0, self.rows)).view(shape)


def response_tokens(data: TensorDict) -> ResponseTokens:
    """Locate the response tokens of a micro-batch whose sequences are in verl's no-padding format.

    verl's v0 trainers leave ``response_mask`` padded: then one host synchronisation.

    Raises:
        MissingSupportError: the sequences are padded.
    """
    response_mask = data["response_mask"]
    input_ids = data["input_ids"]
    if not input_ids.is_nested:
        raise MissingSupportError(
            "input_ids is padded: TROLL needs sequences in verl's no-padding format, as its trainers make them. Look "
            "at what makes the batches in the trainer that you started."
        )
    if response_mask.is_nested:
        mask, offsets = response_mask.values(), response_mask.offsets().long()
    else:
        is_token = data["attention_mask"][:, -response_mask.shape[1] :].bool()
        mask = response_mask[is_token]
        offsets = torch.nn.functional.pad(is_token.sum(-1).cumsum(0), (1, 0))
    return ResponseTokens.of(input_ids.values(), input_ids.offsets().long(), mask.bool(), offsets)


def pack(ids: Tensor, log_probs: Tensor, tokens: ResponseTokens) -> dict[str, Tensor]:
    """Nested fields for the support ``ids, log_probs [R, W]`` of the response tokens, masked ones left out.

    One host synchronisation.
    """
    used = (ids >= 0) & tokens.mask.unsqueeze(-1)
    return _fields(used.sum(-1), wire.encode(ids[used], log_probs[used]), tokens)


def pack_sample(
    prompt_ids: Sequence[int], response_ids: Sequence[int], counts: Tensor, ids: Tensor, log_probs: Tensor
) -> dict[str, Tensor]:
    """The fields of one sample, not nested, from the ``counts [r]`` of its kept ``ids, log_probs [s]``."""
    sequence = torch.tensor([*prompt_ids, *response_ids], dtype=torch.int64)
    ends = torch.tensor([0, len(response_ids)])
    tokens = ResponseTokens.of(sequence, torch.tensor([0, len(sequence)]), counts > 0, ends)
    return {name: value.values() for name, value in _fields(counts.long(), wire.encode(ids, log_probs), tokens).items()}


def unpack_row(row: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities, each ``[s]``, in one sample's row of ``troll_old_support``; checks nothing."""
    return wire.decode(wire.from_words(row)[:-1])


def token_ages(data: TensorDict, tokens: ResponseTokens, trained_version: int | None) -> Tensor | None:
    """float32 ``[M]``: how many versions before the trained one each token was sampled whose mask is set.

    NaN where the token's version is unknown. None if the batch has no versions, or the trainer named none. No host
    synchronisation of its own.

    Args:
        trained_version: the batch's :data:`TRAINED_VERSION`.

    Raises:
        SupportError: the versions cannot be those of the response tokens.
    """
    if trained_version is None or VERSIONS not in data:
        return None
    versions, expected = data[VERSIONS], tokens.mask.shape[0]
    if not versions.is_nested or versions.dtype != torch.int32:
        kind = "ragged" if versions.is_nested else "padded"
        raise _refusal("the micro-batch", f"{VERSIONS} is {kind} and {versions.dtype}, not ragged torch.int32")
    if versions.values().shape[0] != expected:
        given = versions.values().shape[0]
        raise _refusal("the micro-batch", f"{VERSIONS} has {given} entries for {expected} response tokens")
    own = versions.values()[tokens.in_loss]
    return torch.where(own >= 0, (trained_version - own).float(), torch.nan)


def _fields(counts: Tensor, codes: Tensor, tokens: ResponseTokens) -> dict[str, Tensor]:
    """Nested fields from the ``counts [R]`` and the codes ``[S]`` of all kept ids."""
    samples = tokens.offsets.shape[0] - 1
    before = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    offsets = before[tokens.offsets] + torch.arange(samples + 1, device=counts.device)
    is_checksum = torch.zeros(codes.shape[0] + samples, dtype=torch.bool, device=counts.device)
    is_checksum = is_checksum.index_fill(0, offsets[1:] - 1, True)
    sealed = torch.zeros_like(is_checksum, dtype=torch.int64).masked_scatter(~is_checksum, codes)
    sealed[offsets[1:] - 1] = _checksums(sealed, offsets, counts, tokens)
    return {
        COUNTS: torch.nested.nested_tensor_from_jagged(counts.to(torch.int16), tokens.offsets),
        SUPPORT: torch.nested.nested_tensor_from_jagged(wire.to_words(sealed), wire.WORDS * offsets),
    }


def _checksums(codes: Tensor, offsets: Tensor, counts: Tensor, tokens: ResponseTokens) -> Tensor:
    """``[B]`` checksums; each sample's last code, the place of its checksum, is ignored."""
    # Ids have fewer bits; the factor keeps counts apart from them.
    sequence = tokens.sequence.long().index_add(0, tokens.rows + 1, (counts + 1) * wire.MAX_VOCAB_SIZE)
    codes = codes.index_fill(0, (offsets[1:] - 1).clamp_min(0), 0)
    bounds = torch.cat([tokens.sequence_offsets, offsets[1:] + sequence.shape[0]])
    of_tokens, of_codes = wire.checksums(torch.cat([sequence, codes]), bounds).chunk(2)
    return of_tokens ^ of_codes


@dataclass(frozen=True)
class Unpacked:
    """What arrived in the update.

    Attributes:
        policy: the support ``[M, W]`` of the M tokens whose mask is set; where it is wrong, the sampled id is there
            all the same, and no id lies beyond the vocabulary.
        wrong: bool scalar on the device, for :meth:`check`.
        arrived: both fields, unchecked.
    """

    policy: SparsePolicy
    wrong: Tensor
    arrived: _Arrived

    def check(self, wrong: bool) -> None:
        """Refuse a support that cannot be that of its sample.

        Args:
            wrong: the value of :attr:`wrong`, read when the host waits anyway.

        Raises:
            SupportError: names the sample, what is wrong with it, and where to look.
            MissingSupportError: a token that takes part in the loss has no support.
        """
        if wrong:
            self.arrived.refuse()


def unpack(
    data: TensorDict,
    tokens: ResponseTokens,
    *,
    k: int,
    vocab_size: int,
    fixed_width: bool = False,
    from_engine: bool = False,
) -> Unpacked:
    """Support of the response tokens whose mask is set.

    Args:
        k: maximum number of ids kept at a token, without the sampled one.
        vocab_size: ids are below.
        from_engine: whether the rollout engine supplied the support, for messages.
        fixed_width: W is ``k + 1``; the host does not wait, and :meth:`Unpacked.check` must be called when it waits
            anyway. Otherwise W is the largest number of ids, and the check is made here.

    Raises:
        MissingSupportError: the fields, or the support of a token that takes part in the loss, are missing.
        SupportError: the support cannot be that of its sample.
    """
    arrived = _Arrived.read(data, tokens, k, vocab_size, from_engine)
    counts, codes, ends = arrived.counts, arrived.codes, arrived.ends
    before = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    before_sample = before[tokens.offsets]
    # After the checksums of earlier samples.
    starts = before[:-1] + (ends - before_sample)[tokens.sample]
    in_loss = tokens.in_loss
    kept, starts, sampled_ids = counts[in_loss], starts[in_loss], tokens.ids[in_loss]
    width = k + 1 if fixed_width or kept.numel() == 0 else min(k + 1, max(1, int(kept.amax())))
    column = torch.arange(width, device=counts.device)
    used = column < kept.unsqueeze(-1)
    # Whatever the counts say, no index leaves the tensor.
    index = (starts.unsqueeze(-1) + column).clamp_(0, codes.shape[0] - 1)
    kept_ids, kept_log_probs = wire.decode(codes)
    ids = torch.where(used, kept_ids[index], -1)
    log_probs = torch.where(used, kept_log_probs[index], -torch.inf)
    del index, kept_ids, kept_log_probs
    found = ids == sampled_ids.unsqueeze(-1)
    possible = found.any(-1) & (ids.amax(-1) < vocab_size) & (log_probs.exp().sum(-1) <= MASS_LIMIT)

    wrong_length = (arrived.offsets.diff() != wire.WORDS * (before_sample.diff() + 1)) | (
        arrived.lengths != tokens.offsets.diff()
    )
    changed = codes[(ends[1:] - 1).clamp_min(0)] != _checksums(codes, ends, counts, tokens)
    wrong = torch.cat([wrong_length | changed, (counts < 0) | (counts > k + 1), ~possible]).any()
    ids.masked_fill_(~possible.unsqueeze(-1), -1)
    ids[:, 0] = torch.where(possible, ids[:, 0], sampled_ids)
    policy = SparsePolicy(ids, log_probs, torch.where(possible, found.int().argmax(-1), 0))
    unpacked = Unpacked(policy, wrong, arrived)
    if not fixed_width:
        unpacked.check(bool(wrong))
    return unpacked


@dataclass(frozen=True)
class _Arrived:
    """Both fields of a micro-batch as they arrived, and what the update allows.

    Attributes:
        counts: ``[R]`` int64.
        lengths: ``[B]`` int64, number of counts of each sample.
        codes: int64, of all samples, checksums included.
        offsets: ``[B + 1]`` int64, where each sample's words start.
        k, vocab_size, from_engine: see :func:`unpack`.
    """

    tokens: ResponseTokens
    counts: Tensor
    lengths: Tensor
    codes: Tensor
    offsets: Tensor
    k: int
    vocab_size: int
    from_engine: bool

    @classmethod
    def read(cls, data: TensorDict, tokens: ResponseTokens, k: int, vocab_size: int, from_engine: bool) -> _Arrived:
        """The fields, after checks of what the host knows without waiting."""
        for name in (COUNTS, SUPPORT):
            if name not in data:
                raise MissingSupportError(
                    f"the batch has no field {name!r}: {_NOT_SUPPLIED if from_engine else _NOT_COMPUTED}"
                )
            if not data[name].is_nested or data[name].dtype != torch.int16:
                kind = "ragged" if data[name].is_nested else "padded"
                raise _refusal("the micro-batch", f"{name} is {kind} and {data[name].dtype}, not ragged torch.int16")
        counts, words = data[COUNTS], data[SUPPORT]
        given, expected, length = counts.values().shape[0], tokens.mask.shape[0], words.values().shape[0]
        if given != expected or length < wire.WORDS or length % wire.WORDS:
            rows = zip(counts.offsets().diff().tolist(), tokens.offsets.diff().tolist(), strict=True)
            which = [f" (sample {i}: {own} for {other})" for i, (own, other) in enumerate(rows) if own != other]
            raise _refusal(
                "the micro-batch",
                f"{COUNTS} has {given} entries for {expected} response tokens{which[0] if which else ''}, {SUPPORT} "
                f"has {length} words",
            )
        return cls(
            tokens,
            counts.values().long(),
            counts.offsets().diff(),
            wire.from_words(words.values()),
            words.offsets().long(),
            k,
            vocab_size,
            from_engine,
        )

    @property
    def ends(self) -> Tensor:
        """``[B + 1]`` int64, where each sample's codes start. A row that cuts a code apart is reported."""
        return self.offsets.div(wire.WORDS, rounding_mode="floor")

    def refuse(self) -> NoReturn:
        """Raise for the first sample that is wrong."""
        checksums = _checksums(self.codes, self.ends, self.counts, self.tokens).tolist()
        for sample, checksum in enumerate(checksums):
            error = self._error(sample, checksum)
            if error is not None:
                raise error
        raise _refusal("the micro-batch", "it fails a check that none of its samples fails")

    def _error(self, sample: int, checksum: int) -> SupportError | None:
        """What is wrong with a sample, None if nothing is; ``checksum`` is what it should be."""
        tokens = self.tokens
        here = slice(*tokens.offsets[sample : sample + 2].tolist())
        first, last = tokens.sequence_offsets[sample : sample + 2].tolist()
        response = here.stop - here.start
        name = (
            f"sample {sample} of {len(self.lengths)} in the micro-batch (prompt of {last - first - response} tokens, "
            f"response of {response}, first ids {tokens.sequence[first : min(last, first + 8)].tolist()})"
        )
        counts = self.counts[here].tolist()
        if int(self.lengths[sample]) != response:
            return _refusal(name, f"it has {int(self.lengths[sample])} counts for {response} response tokens")
        if min(counts, default=0) < 0:
            return _refusal(name, "a count is negative")
        if max(counts, default=0) > self.k + 1:
            return SupportError(
                f"{name}: a response token has {max(counts)} ids in its support, but k allows {self.k} and the sampled "
                f"one. The support was computed with another {_K_OF_ENGINE if self.from_engine else _K}, or was "
                "changed on the way."
            )
        start, stop = self.offsets[sample : sample + 2].tolist()
        if stop - start != wire.WORDS * (sum(counts) + 1):
            return _refusal(name, f"its counts ask for {wire.WORDS * (sum(counts) + 1)} words, it has {stop - start}")
        codes = self.codes[start // wire.WORDS : stop // wire.WORDS]
        support = zip(*(x.split(counts) for x in wire.decode(codes[:-1])), strict=True)
        masks, sampled = tokens.mask[here].tolist(), tokens.ids[here].tolist()
        for place, (in_loss, token, (ids, log_probs)) in enumerate(zip(masks, sampled, support, strict=True)):
            if not in_loss:
                continue
            at = f"response token {place}"
            if len(ids) == 0:
                source = "from the rollout engine" if self.from_engine else "in the old-log-prob pass"
                return MissingSupportError(
                    f"{name}: {at} takes part in the loss but had no support {source}. response_mask gained tokens in "
                    "between."
                )
            if bool(log_probs.isnan().any()):
                source = "the rollout engine's" if self.from_engine else "the actor, in the old-log-prob pass"
                return SupportError(
                    f"{name}: the old policy has a log-probability of NaN at {at}. Look at the model that computed "
                    f"it, {source}, and at the loss and grad_norm of earlier steps."
                )
            if int(ids.max()) >= self.vocab_size:
                return _refusal(name, f"{at} has id {int(ids.max())}, the vocabulary {self.vocab_size} ids")
            if token not in ids.tolist():
                return _refusal(name, f"{at} was sampled as {token}, which is not among its ids")
            if float(log_probs.exp().sum()) > MASS_LIMIT:
                return _refusal(name, f"the ids at {at} have a mass of {float(log_probs.exp().sum()):.3g}, above 1")
        if int(codes[-1]) != checksum:
            return _refusal(
                name, "its checksum is not that of the prompt, response, counts and ids that arrived with it"
            )
        return None


_K = "actor_rollout_ref.actor.policy_loss.troll.k"
_K_OF_ENGINE = f"actor_rollout_ref.rollout.custom.troll.k than {_K}"
_NOT_COMPUTED = (
    "the actor's old-log-prob pass did not compute the old policy's support, or it was dropped on the way. Look at "
    "what replaces that pass, or selects the fields of a batch, in the trainer that you started; verl's own do neither."
)
_NOT_SUPPLIED = (
    "the old policy's support from the rollout engine did not reach the update. A sample's agent loop must pass it "
    "on: single_turn_agent and tool_agent do, a loop of your own (named by actor_rollout_ref.rollout.agent."
    "default_agent_loop or the data set's column agent_name) needs verl_troll.plugin.rollout.agent_loops."
    "RolloutSupportMixin. And the loop must sample with the rollout's own temperature, top_p and top_k and without "
    "penalties: other requests have no support."
)


def _refusal(name: str, wrong: str) -> SupportError:
    return SupportError(
        f"{name}: the old policy's support is wrong: {wrong}. {COUNTS} and {SUPPORT} must reach the update as the "
        "old-log-prob pass or the rollout engine wrote them, each row with its own sample. Look at what handles the "
        "batch in between: code of yours that filters, reorders or edits samples, and the transfer queue's storage."
    )
