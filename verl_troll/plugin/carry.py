"""The old policy's support in the batch, between the old-log-prob pass and the update.

Two ragged fields hold it, one row per sample, response tokens only:

    troll_old_counts   [B, r]   int16  ids kept at each response token; 0 where ``response_mask`` is 0
    troll_old_support  [B, 3s]  int16  three words for each kept id, token after token (s = sum of the counts)

verl slices, shuffles and queues them like its own fields. They cost 2 bytes per response token and 6 per kept id.

Ids and log-probabilities are encoded by :mod:`verl_troll.core.wire`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from tensordict import TensorDict
from torch import Tensor

from verl_troll.core.support import SparsePolicy
from verl_troll.core.wire import WORDS, decode, encode

COUNTS = "troll_old_counts"
SUPPORT = "troll_old_support"


class MissingSupportError(RuntimeError):
    """The update was asked for without the old policy's support."""


@dataclass(frozen=True)
class ResponseTokens:
    """Response tokens of a packed micro-batch, all ``[R]`` in order of samples.

    Attributes:
        rows: int64, position in the packed sequence at which the logits predict the token.
        ids: int64, the token itself.
        mask: bool, ``response_mask``.
        offsets: ``[B + 1]`` int64, where the tokens of each sample start.
    """

    rows: Tensor
    ids: Tensor
    mask: Tensor
    offsets: Tensor

    @cached_property
    def in_loss(self) -> Tensor:
        """``[M]`` int64, indices of the M tokens whose mask is set. One host synchronisation, the first time."""
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
    # With output_size, repeat_interleave does not wait for the accelerator.
    sample = torch.arange(lengths.shape[0], device=lengths.device)
    sample = torch.repeat_interleave(sample, lengths, output_size=mask.shape[0])
    index = torch.arange(mask.shape[0], device=lengths.device) - offsets[sample]
    rows = input_ids.offsets().long()[1:][sample] - lengths[sample] - 1 + index
    return ResponseTokens(rows, input_ids.values()[rows + 1].long(), mask, offsets)


def pack(ids: Tensor, log_probs: Tensor, tokens: ResponseTokens) -> dict[str, Tensor]:
    """Nested fields for the support ``ids, log_probs [R, W]`` of the response tokens, masked ones left out.

    One host synchronisation.
    """
    used = (ids >= 0) & tokens.mask.unsqueeze(-1)
    counts = used.sum(-1)
    before = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    starts = before[tokens.offsets]
    return {
        COUNTS: torch.nested.nested_tensor_from_jagged(counts.to(torch.int16), tokens.offsets),
        SUPPORT: torch.nested.nested_tensor_from_jagged(encode(ids[used], log_probs[used]), WORDS * starts),
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
        width: W; by default the largest number of ids, for which the host waits. With a width given, call
            :func:`check_counts` when the host waits anyway.

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
    counts, starts, sampled_ids = counts[tokens.in_loss], starts[tokens.in_loss], tokens.ids[tokens.in_loss]
    if counts.numel() == 0:
        empty = counts.new_zeros(0, 1)
        return Unpacked(SparsePolicy(empty, empty.float(), counts), counts.new_ones(2), 1)
    extremes = torch.stack(counts.aminmax())
    if width is None:
        fewest, most = extremes.tolist()
        check_counts(fewest, most, most)
        width = most
    column = torch.arange(width, device=counts.device)
    used = column < counts.unsqueeze(-1)
    index = torch.where(used, starts.unsqueeze(-1) + column, 0)
    kept_ids, kept_log_probs = decode(data[SUPPORT].values())
    ids = torch.where(used, kept_ids[index], -1)
    log_probs = torch.where(used, kept_log_probs[index], -torch.inf)
    sampled = (ids == sampled_ids.unsqueeze(-1)).int().argmax(-1)
    return Unpacked(SparsePolicy(ids, log_probs, sampled), extremes, width)


def check_counts(fewest: int, most: int, width: int) -> None:
    """Refuse a support that lacks a token, or that is wider than it was unpacked for.

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
