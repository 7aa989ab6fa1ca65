"""The old policy's support on its way from the old-log-prob pass to the update.

It travels with the batch as two ragged fields, one row per sample, response tokens only:

    troll_old_counts   [B, r]   int16  ids kept at each response token; 0 where ``response_mask`` is 0
    troll_old_support  [B, 3s]  int16  three words for each kept id, token after token (s = sum of the counts)

Ragged and one-dimensional per sample, they take part in verl's own slicing, shuffling and queueing unchanged: 2 bytes
per response token and 6 per kept id.

The 48 bits of a kept id hold the id (20) and its float32 log-probability (28). Of the latter nothing is lost above -128
nats and up to -2^-24 nats: no sign is needed, and 5 bits tell the 31 binades and 0 apart. What lies closer to 0 becomes
0, an error of at most 2^-24 nats; from -128 down, where float32's exponential is 0, all becomes just above -128. NaN
stays NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from tensordict import TensorDict
from torch import Tensor

from verl_troll.core.support import SparsePolicy

COUNTS = "troll_old_counts"
SUPPORT = "troll_old_support"

_ID_BITS = 20
MAX_VOCAB_SIZE = 1 << _ID_BITS
_WORDS = 3
_MANTISSA_BITS = 23
# The exponent that stands for 0; the next one is that of 2^-24.
_ZERO_EXPONENT = 127 - 24 - 1
_NAN_CODE = (1 << 28) - 1


class MissingSupportError(RuntimeError):
    """The update was asked for without the old policy's support."""


@dataclass(frozen=True)
class ResponseTokens:
    """Response tokens of a packed micro-batch, all ``[R]`` in order of samples.

    Attributes:
        rows: int64, position in the packed sequence whose logits predict the token.
        ids: int64, the token itself.
        mask: bool, ``response_mask``.
        offsets: ``[B + 1]`` int64, where each sample's tokens start.
    """

    rows: Tensor
    ids: Tensor
    mask: Tensor
    offsets: Tensor

    @cached_property
    def kept(self) -> Tensor:
        """``[M]`` int64, places of the M tokens whose mask is set. One host synchronisation, the first time."""
        return self.mask.nonzero().squeeze(-1)


def response_tokens(data: TensorDict) -> ResponseTokens:
    """Locate the response tokens of a micro-batch in verl's no-padding format.

    Raises:
        MissingSupportError: the batch is not in that format (the v0 trainer's is not).
    """
    response_mask = data["response_mask"]
    input_ids = data["input_ids"]
    if not (response_mask.is_nested and input_ids.is_nested):
        raise MissingSupportError("TROLL needs batches in verl's no-padding format: set trainer.use_v1=True")
    offsets = response_mask.offsets().long()
    lengths = offsets.diff()
    mask = response_mask.values().bool()
    # Told the size, repeat_interleave does not stall an accelerator.
    sample = torch.arange(lengths.shape[0], device=lengths.device)
    sample = torch.repeat_interleave(sample, lengths, output_size=mask.shape[0])
    place = torch.arange(mask.shape[0], device=lengths.device) - offsets[sample]
    rows = input_ids.offsets().long()[1:][sample] - lengths[sample] - 1 + place
    return ResponseTokens(rows, input_ids.values()[rows + 1].long(), mask, offsets)


def encode(ids: Tensor, log_probs: Tensor) -> Tensor:
    """``[3 s]`` int16 words for ``ids [s]`` below :data:`MAX_VOCAB_SIZE` and their log-probabilities ``[s]``."""
    magnitude = (-log_probs.float()).clamp_min(0.0).contiguous()
    code = magnitude.view(torch.int32).long() - (_ZERO_EXPONENT << _MANTISSA_BITS)
    code = torch.where(code < 1 << _MANTISSA_BITS, 0, code.clamp_max(_NAN_CODE - 1))
    code = torch.where(magnitude.isnan(), _NAN_CODE, code)
    words = ids.long() | code << _ID_BITS
    return words.unsqueeze(-1).view(torch.int16)[:, :_WORDS].reshape(-1)


def decode(words: Tensor) -> tuple[Tensor, Tensor]:
    """Ids ``[s]`` int64 and log-probabilities ``[s]`` float32 from :func:`encode`'s words."""
    whole = torch.nn.functional.pad(words.reshape(-1, _WORDS), (0, 1)).view(torch.int64).squeeze(-1)
    code = whole >> _ID_BITS
    magnitude = (code + (_ZERO_EXPONENT << _MANTISSA_BITS)).int().view(torch.float32)
    log_probs = torch.where(code > 0, -magnitude, 0.0)
    return whole & (MAX_VOCAB_SIZE - 1), torch.where(code == _NAN_CODE, torch.nan, log_probs)


def pack(ids: Tensor, log_probs: Tensor, tokens: ResponseTokens) -> dict[str, Tensor]:
    """Nested fields for the support ``ids, log_probs [R, W]`` of all response tokens.

    That of masked ones is left out. One host synchronisation.
    """
    used = (ids >= 0) & tokens.mask.unsqueeze(-1)
    counts = used.sum(-1)
    before = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    starts = before[tokens.offsets]
    return {
        COUNTS: torch.nested.nested_tensor_from_jagged(counts.to(torch.int16), tokens.offsets),
        SUPPORT: torch.nested.nested_tensor_from_jagged(encode(ids[used], log_probs[used]), _WORDS * starts),
    }


@dataclass(frozen=True)
class Unpacked:
    """What arrived in the update.

    Attributes:
        policy: the support ``[M, W]`` of the M tokens whose mask is set.
        counts: ``[2]`` int64 on the device, the smallest and the largest number of ids, for :func:`check_counts`.
        width: W.
    """

    policy: SparsePolicy
    counts: Tensor
    width: int


def unpack(data: TensorDict, tokens: ResponseTokens, width: int | None = None) -> Unpacked:
    """Support of the response tokens whose mask is set.

    Args:
        width: number of places; by default as many as there are ids, for which the host waits. With a width given,
            :func:`check_counts` must be called once the host waits anyway.

    Raises:
        MissingSupportError: the fields, or the support of a token that takes part in the loss, are missing.
    """
    for name in (COUNTS, SUPPORT):
        if name not in data:
            raise MissingSupportError(
                f"the batch has no field {name!r}: the old policy's support was not computed. TROLL needs the "
                f"old-log-prob pass (algorithm.rollout_correction.bypass_mode=False) and the v1 trainer "
                f"(trainer.use_v1=True)."
            )
    counts = data[COUNTS].values().long()
    starts = counts.cumsum(0) - counts
    counts, starts, sampled_ids = counts[tokens.kept], starts[tokens.kept], tokens.ids[tokens.kept]
    if counts.numel() == 0:
        empty = counts.new_zeros(0, 1)
        return Unpacked(SparsePolicy(empty, empty.float(), counts), counts.new_ones(2), 1)
    extremes = torch.stack(counts.aminmax())
    if width is None:
        fewest, most = extremes.tolist()
        check_counts(fewest, most, most)
        width = most
    place = torch.arange(width, device=counts.device)
    used = place < counts.unsqueeze(-1)
    index = torch.where(used, starts.unsqueeze(-1) + place, 0)
    kept_ids, kept_log_probs = decode(data[SUPPORT].values())
    ids = torch.where(used, kept_ids[index], -1)
    log_probs = torch.where(used, kept_log_probs[index], -torch.inf)
    sampled = (ids == sampled_ids.unsqueeze(-1)).int().argmax(-1)
    return Unpacked(SparsePolicy(ids, log_probs, sampled), extremes, width)


def check_counts(fewest: int, most: int, width: int) -> None:
    """Refuse a support that lacks a token, or that was unpacked into too few places.

    Raises:
        MissingSupportError: saying which of the two.
    """
    if fewest == 0:
        raise MissingSupportError(
            "a response token takes part in the loss but had no support in the old-log-prob pass: response_mask "
            "gained tokens in between"
        )
    if most > width:
        raise MissingSupportError(
            f"a response token has {most} ids in its support, but k allows {width - 1} and the sampled one: the "
            f"support was computed with another actor_rollout_ref.actor.policy_loss.troll.k"
        )
