"""How an old policy's support travels from the old-log-prob pass to the update: 48 bits per kept id.

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
"""int16 words per kept id."""
_MANTISSA_BITS = 23
# The exponent that encodes 0; the next one is that of 2^-24.
_ZERO_EXPONENT = 127 - 24 - 1
_NAN_CODE = (1 << 28) - 1


def encode(ids: Int[Tensor, " kept"], log_probs: Float[Tensor, " kept"]) -> Int[Tensor, " words"]:
    """int16 words, three per id, for ``ids`` below :data:`MAX_VOCAB_SIZE` and their log-probabilities."""
    magnitude = (-log_probs.float()).clamp_min(0.0).contiguous()
    code = magnitude.view(torch.int32).long() - (_ZERO_EXPONENT << _MANTISSA_BITS)
    code = torch.where(code < 1 << _MANTISSA_BITS, 0, code.clamp_max(_NAN_CODE - 1))
    code = torch.where(magnitude.isnan(), _NAN_CODE, code)
    words = ids.long() | code << _ID_BITS
    return words.unsqueeze(-1).view(torch.int16)[:, :WORDS].reshape(-1)


def decode(words: Int[Tensor, " words"]) -> tuple[Int[Tensor, " kept"], Float[Tensor, " kept"]]:
    """int64 ids and float32 log-probabilities from the words of :func:`encode`."""
    whole = torch.nn.functional.pad(words.reshape(-1, WORDS), (0, 1)).view(torch.int64).squeeze(-1)
    code = whole >> _ID_BITS
    magnitude = (code + (_ZERO_EXPONENT << _MANTISSA_BITS)).int().view(torch.float32)
    log_probs = torch.where(code > 0, -magnitude, 0.0)
    return whole & (MAX_VOCAB_SIZE - 1), torch.where(code == _NAN_CODE, torch.nan, log_probs)
