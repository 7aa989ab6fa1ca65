"""The old policy's support in the batches of verl's v0 trainers.

``RayPPOTrainer`` (``trainer.use_v1=False``) and its subclasses (``one_step_off_policy``, ``fully_async_policy``) pad
their columns, and pass on a fixed choice of what the old-log-prob pass returns. So each engine keeps its samples'
supports until the update: verl cuts both batches over the ranks in the same way. The support of the rollout engine
comes with each sample, as an object.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from verl_troll.plugin import carry

__all__ = ["KeptSupports", "is_padded"]

Row = dict[str, Tensor]


def is_padded(data: TensorDict) -> bool:
    """Whether a v0 trainer made the batch."""
    return not data["response_mask"].is_nested


class KeptSupports:
    """The supports of the samples in the last old-log-prob pass, in host memory, by the sample's tokens."""

    def __init__(self) -> None:
        self._rows: dict[bytes, Row] = {}

    def keep(self, data: TensorDict, model_output: dict[str, Tensor]) -> None:
        """Take the supports of a whole batch, in the place of those before; none on ranks without an output."""
        self._rows = {}
        if carry.COUNTS in model_output:
            columns = [model_output[name].cpu().unbind() for name in (carry.COUNTS, carry.SUPPORT)]
            for key, counts, support in zip(_keys(data), *columns, strict=True):
                self._rows[key] = {carry.COUNTS: counts, carry.SUPPORT: support}

    def add_to(self, data: TensorDict) -> None:
        """Add the fields to a mini-batch, from the samples themselves if they bring them.

        Raises:
            MissingSupportError: a sample was not in this rank's last old-log-prob pass.
        """
        brought = data.get(carry.SAMPLE, None)
        if brought is not None:
            _add(data, [entry.data for entry in brought])
        elif self._rows:
            rows = [self._rows.get(key) for key in _keys(data)]
            lost = [number for number, row in enumerate(rows) if row is None]
            if lost:
                raise carry.MissingSupportError(
                    f"samples {lost[:8]} of the {len(rows)} in the mini-batch were not in this rank's last "
                    f"old-log-prob pass, which had {len(self._rows)}. Between that pass and the update a batch must "
                    "keep its samples, their tokens and their order: look at code of yours in between."
                )
            _add(data, rows)


def _keys(data: TensorDict) -> list[bytes]:
    return [row.numpy().tobytes() for row in data["input_ids"].cpu().unbind()]


def _add(data: TensorDict, rows: Sequence[Any]) -> None:
    device = data["input_ids"].device
    for name in (carry.COUNTS, carry.SUPPORT):
        # A sample of validation, or of a loop that passes none on, has no support; the update says so.
        if all(row is not None and name in row for row in rows):
            values = [row[name] for row in rows]
            data[name] = torch.nested.as_nested_tensor(values, layout=torch.jagged).to(device)
