"""The language-model head and the reading of its logits as one: ``[tokens, vocabulary]`` is never held.

Logits are computed block by block, read, and dropped; the backward pass computes each block again, turns it into its
gradient in place, and multiplies that back into the gradients of the hidden states and of the weight. Of the logits no
more than one block exists at a time, at the price of a fourth matrix product beside the three of a head whose logits
are kept.

Shapes: N packed tokens, D hidden units, C rows of the weight (vocabulary ids), R rows of interest, W ids per row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from verl_troll.core.logits import Normaliser, Reading, read_rows, slices, working_dtype, write_gradient

# Tokens and columns that are read at a time: on a host what its cache holds; on an accelerator so many columns that
# most vocabularies need one search. Neither depends on how many tokens there are, so that a row's parts are added in
# the same order whatever is read beside it.
_READ_BLOCK = {"cpu": (128, 8192)}
_DEVICE_READ_BLOCK = (1024, 1 << 18)
# Tokens at a time in the backward pass, enough for the weight's gradient to be written seldom, and elements of a block.
_GRADIENT_BLOCK = {"cpu": (1024, 1 << 20)}
_DEVICE_GRADIENT_BLOCK = (8192, 1 << 27)


@dataclass(frozen=True)
class LinearHead:
    """Logits ``hidden @ weight.T / temperature`` that are computed where they are read.

    Takes the place of a logits tensor in :func:`verl_troll.core.support.select` and
    :func:`verl_troll.core.support.compare`. Where the vocabulary is sharded, the gradient of ``hidden`` is the part
    that this rank's columns contribute, as after Megatron's output layer; the caller sums it over the group.

    Attributes:
        hidden: ``[N, D]`` float.
        weight: ``[C, D]`` of the same dtype.
        temperature: above 0; divides the logits.

    Raises:
        ValueError: shapes or dtypes that do not fit each other, or a temperature that is not above 0.
    """

    hidden: Tensor
    weight: Tensor
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.hidden.ndim != 2 or self.weight.ndim != 2 or self.hidden.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"hidden and weight must be [tokens, units] and [vocabulary, units], got "
                f"{tuple(self.hidden.shape)} and {tuple(self.weight.shape)}"
            )
        if self.hidden.dtype != self.weight.dtype:
            raise ValueError(f"hidden is {self.hidden.dtype}, but weight is {self.weight.dtype}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature!r}")

    @property
    def columns(self) -> int:
        """Number of logit columns."""
        return self.weight.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What gradients flow to."""
        return self.hidden, self.weight

    @property
    def builder(self) -> Callable[..., LinearHead]:
        """Makes the same head from ``tensors``."""
        return partial(LinearHead, temperature=self.temperature)

    def read(self, rows: Tensor, ids: Tensor, columns: int, *, k: int = 0, energy: bool = False) -> Reading:
        """As :func:`verl_troll.core.logits.read_rows`, on logits that are computed on the way."""
        with torch.no_grad(), torch.autocast(self.hidden.device.type, enabled=False):
            height, _ = _READ_BLOCK.get(self.hidden.device.type, _DEVICE_READ_BLOCK)
            blocks = [
                self._read_tokens(self.hidden[rows[tokens]], ids[tokens], columns, k, energy)
                for tokens in slices(rows.shape[0], height)
            ]
            if not blocks:
                return read_rows(self.hidden[:, :0], rows, ids, 0, k=k, energy=energy)
            normalisers = [block.normaliser for block in blocks]
            return Reading(
                Normaliser(
                    torch.cat([part.peak for part in normalisers]),
                    torch.cat([part.mass for part in normalisers]),
                    torch.cat([part.energy for part in normalisers if part.energy is not None]) if energy else None,
                ),
                *(torch.cat(parts) for parts in zip(*(block[1:] for block in blocks), strict=True)),
            )

    def _read_tokens(self, hidden: Tensor, ids: Tensor, columns: int, k: int, energy: bool) -> Reading:
        everything = torch.arange(hidden.shape[0], device=hidden.device)
        found: Reading | None = None
        _, width = _READ_BLOCK.get(hidden.device.type, _DEVICE_READ_BLOCK)
        for vocabulary in slices(columns, width):
            weight = self.weight[vocabulary]
            part = read_rows(
                self._logits(hidden, weight),
                everything,
                _within(ids, vocabulary, columns),
                weight.shape[0],
                k=k,
                energy=energy,
            )
            if vocabulary.start > 0:
                part = part._replace(top_ids=torch.where(part.top_ids >= 0, part.top_ids + vocabulary.start, -1))
            found = part if found is None else _join(found, part, k)
        return read_rows(hidden[:, :0], everything, ids, 0, k=k, energy=energy) if found is None else found

    def _logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.T
        return logits if self.temperature == 1 else logits.div_(self.temperature)

    def gradients(
        self,
        rows: Tensor,
        columns: int,
        peak: Tensor,
        level: Tensor,
        slope: Tensor | None,
        ids: Tensor,
        corrections: Tensor,
        needed: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        """Gradients of ``hidden`` and ``weight``; see :func:`~verl_troll.core.logits.write_gradient`.

        Args:
            needed: which of the two are wanted; the other is None.
        """
        dtype = working_dtype(self.hidden)
        hidden = self.hidden[rows]
        grad_hidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if needed[0] else None
        grad_weight = torch.zeros_like(self.weight) if needed[1] else None
        height, elements = _GRADIENT_BLOCK.get(hidden.device.type, _DEVICE_GRADIENT_BLOCK)
        width = elements // max(1, min(height, rows.shape[0]))
        everything = torch.arange(min(height, rows.shape[0]), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            # All tokens of a part of the vocabulary before the next part, so that each part of the weight's gradient
            # is summed in working precision and rounded once.
            for vocabulary in slices(columns, width):
                weight = self.weight[vocabulary]
                at_once = rows.shape[0] <= height and dtype != weight.dtype
                grad_part = None
                if grad_weight is not None and not at_once:
                    grad_part = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
                for tokens in slices(rows.shape[0], height):
                    block = self._logits(hidden[tokens], weight)
                    write_gradient(
                        block,
                        block,
                        everything[: block.shape[0]],
                        block.shape[1],
                        peak[tokens],
                        level[tokens],
                        None if slope is None else slope[tokens],
                        _within(ids[tokens], vocabulary, columns),
                        corrections[tokens],
                    )
                    if self.temperature != 1:
                        block.div_(self.temperature)
                    if grad_hidden is not None:
                        _add_product(grad_hidden[tokens], block, weight)
                    if grad_part is not None:
                        _add_product(grad_part, block.T, hidden[tokens])
                    elif grad_weight is not None:
                        torch.mm(block.T, hidden[tokens], out=grad_weight[vocabulary])
                    # Before the next one is computed.
                    del block
                if grad_weight is not None and grad_part is not None:
                    grad_weight[vocabulary] = grad_part.to(grad_weight.dtype)
        if grad_hidden is None:
            return None, grad_weight
        return torch.zeros_like(self.hidden).index_copy_(0, rows, grad_hidden.to(self.hidden.dtype)), grad_weight


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _within(ids: Tensor, vocabulary: slice, columns: int) -> Tensor:
    """``ids`` below ``columns`` counted from the start of ``vocabulary``, -1 outside."""
    if vocabulary.start == 0 and vocabulary.stop >= columns:
        return ids
    return torch.where((ids >= vocabulary.start) & (ids < vocabulary.stop), ids - vocabulary.start, -1)


def _join(before: Reading, after: Reading, k: int) -> Reading:
    """The reading of two neighbouring parts of the vocabulary."""
    first, second = before.normaliser, after.normaliser
    energies = None
    if first.energy is not None and second.energy is not None:
        energies = torch.stack([first.energy, second.energy])
    # Lower ids stand first among equal values, and a stable sort keeps that.
    top = torch.cat([before.top_values, after.top_values], dim=-1).sort(dim=-1, descending=True, stable=True)
    top_ids = torch.cat([before.top_ids, after.top_ids], dim=-1).gather(-1, top.indices[:, :k])
    return Reading(
        Normaliser.combine(torch.stack([first.peak, second.peak]), torch.stack([first.mass, second.mass]), energies),
        before.values + after.values,
        top.values[:, :k],
        top_ids,
    )
