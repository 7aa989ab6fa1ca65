"""The old policy's support on its way from the old-log-prob pass to the update.

It travels with the batch as three ragged fields, one row per sample, response tokens only:

    troll_old_counts     [B, r]  int16    ids kept at each response token; 0 where ``response_mask`` is 0
    troll_old_ids        [B, s]  int32    the kept ids, token after token (s = sum of the sample's counts)
    troll_old_log_probs  [B, s]  float32  their log-probabilities over the full vocabulary, nats

Ragged and one-dimensional per sample, they take part in verl's own slicing, shuffling and queueing unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor

from verl_troll.support import SparsePolicy

IDS = "troll_old_ids"
LOG_PROBS = "troll_old_log_probs"
COUNTS = "troll_old_counts"


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
    sample = torch.repeat_interleave(torch.arange(lengths.shape[0], device=lengths.device), lengths)
    place = torch.arange(sample.shape[0], device=lengths.device) - offsets[sample]
    rows = input_ids.offsets().long()[1:][sample] - lengths[sample] - 1 + place
    return ResponseTokens(rows, input_ids.values()[rows + 1].long(), response_mask.values().bool(), offsets)


def pack(ids: Tensor, log_probs: Tensor, tokens: ResponseTokens) -> dict[str, Tensor]:
    """Nested fields for the support ``ids, log_probs [M, W]`` of the tokens whose mask is set."""
    used = ids >= 0
    counts = torch.zeros_like(tokens.rows)
    counts[tokens.mask] = used.sum(-1)
    before = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    starts = before[tokens.offsets]
    return {
        COUNTS: torch.nested.nested_tensor_from_jagged(counts.to(torch.int16), tokens.offsets),
        IDS: torch.nested.nested_tensor_from_jagged(ids[used].to(torch.int32), starts),
        LOG_PROBS: torch.nested.nested_tensor_from_jagged(log_probs[used].float(), starts),
    }


def unpack(data: TensorDict, tokens: ResponseTokens) -> SparsePolicy:
    """Support ``[M, W]`` of the M response tokens whose mask is set, W the largest count among them.

    Raises:
        MissingSupportError: the fields, or the support of a token that takes part in the loss, are missing.
    """
    for name in (COUNTS, IDS, LOG_PROBS):
        if name not in data:
            raise MissingSupportError(
                f"the batch has no field {name!r}: the old policy's support was not computed. TROLL needs the "
                f"old-log-prob pass (algorithm.rollout_correction.bypass_mode=False) and the v1 trainer "
                f"(trainer.use_v1=True)."
            )
    counts = data[COUNTS].values().long()
    starts = counts.cumsum(0) - counts
    counts, starts, sampled_ids = counts[tokens.mask], starts[tokens.mask], tokens.ids[tokens.mask]
    if counts.numel() == 0:
        empty = counts.new_zeros(0, 1)
        return SparsePolicy(empty, empty.float(), counts)
    fewest, most = torch.stack([counts.min(), counts.max()]).tolist()
    if fewest == 0:
        raise MissingSupportError(
            "a response token takes part in the loss but had no support in the old-log-prob pass: response_mask "
            "gained tokens in between"
        )
    place = torch.arange(most, device=counts.device)
    used = place < counts.unsqueeze(-1)
    index = torch.where(used, starts.unsqueeze(-1) + place, 0)
    ids = torch.where(used, data[IDS].values()[index].long(), -1)
    log_probs = torch.where(used, data[LOG_PROBS].values()[index], -torch.inf)
    sampled = (ids == sampled_ids.unsqueeze(-1)).int().argmax(-1)
    return SparsePolicy(ids, log_probs, sampled)
