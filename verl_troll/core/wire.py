"""How an old policy's support travels from the old-log-prob pass to the update: codes of 48 bits, one per kept id.

An id takes 20 bits, its float32 log-probability 28. Between -128 and -2^-24 nats the log-probability loses no bit: it
needs no sign, and 5 bits distinguish the 31 binades and 0. Closer to 0 it becomes 0, an error of at most 2^-24 nats.
From -128 down, where float32's exponential is 0, it becomes the value just above -128. NaN stays NaN.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

_ID_BITS = 20
MAX_VOCAB_SIZE = 1 << _ID_BITS
MAX_K = 2**15 - 2
"""Counts of kept ids travel as int16, and the sampled id may be added."""
WORDS = 3
"""int16 words per code."""
CODE_MASK = (1 << 16 * WORDS) - 1
_MANTISSA_BITS = 23
# The exponent that encodes 0; the next one is that of 2^-24.
_ZERO_EXPONENT = 127 - 24 - 1
_NAN_CODE = (1 << 28) - 1
# Multipliers of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), as signed integers.
_GOLDEN, _FIRST, _SECOND = (value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def encode(ids: Int[Tensor, " kept"], log_probs: Float[Tensor, " kept"]) -> Int[Tensor, " kept"]:
    """int64 codes of 48 bits for ``ids`` below :data:`MAX_VOCAB_SIZE` and their log-probabilities."""
    magnitude = (-log_probs.float()).clamp_min(0.0).contiguous()
    code = magnitude.view(torch.int32).long() - (_ZERO_EXPONENT << _MANTISSA_BITS)
    code = torch.where(code < 1 << _MANTISSA_BITS, 0, code.clamp_max(_NAN_CODE - 1))
    code = torch.where(magnitude.isnan(), _NAN_CODE, code)
    return ids.long() | code << _ID_BITS


def decode(codes: Int[Tensor, "*shape"]) -> tuple[Int[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """int64 ids and float32 log-probabilities from the codes of :func:`encode`."""
    code = codes >> _ID_BITS
    magnitude = (code + (_ZERO_EXPONENT << _MANTISSA_BITS)).int().view(torch.float32)
    log_probs = torch.where(code > 0, -magnitude, 0.0)
    return codes & (MAX_VOCAB_SIZE - 1), torch.where(code == _NAN_CODE, torch.nan, log_probs)


def to_words(codes: Int[Tensor, " codes"]) -> Int[Tensor, " words"]:
    """The low 48 bits of each code as three int16 words."""
    return codes.unsqueeze(-1).view(torch.int16)[:, :WORDS].reshape(-1)


def from_words(words: Int[Tensor, " words"]) -> Int[Tensor, " codes"]:
    """int64 codes from the words of :func:`to_words`."""
    return torch.nn.functional.pad(words.reshape(-1, WORDS), (0, 1)).view(torch.int64).squeeze(-1)


def checksums(values: Int[Tensor, " values"], offsets: Int[Tensor, " bounds"]) -> Int[Tensor, " segments"]:
    """48-bit checksum of each segment's values and their order; the segments lie one after the other.

    Args:
        values: int64.
        offsets: int64, where each segment starts, and where the last one ends.
    """
    count = values.shape[0]
    starts = torch.repeat_interleave(offsets[:-1], offsets.diff(), output_size=count)
    place = torch.arange(1, count + 1, device=values.device) - starts
    # A sum of mixed values, made distinct by their place. Integer arithmetic wraps around.
    mixed = (values + place * _GOLDEN) * _FIRST
    mixed = (mixed ^ mixed >> 32) * _SECOND
    return torch.nn.functional.pad(mixed.cumsum(0), (1, 0))[offsets].diff() & CODE_MASK
