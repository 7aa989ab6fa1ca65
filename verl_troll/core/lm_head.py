"""The language-model head fused with the reading of its logits: ``[tokens, vocabulary]`` never exists.

Logits are computed block by block, read, and dropped. The backward pass recomputes each block, turns it into its
gradient in place, and multiplies it into the gradients of the hidden states and of the weight. Only one block exists
at a time; the price is a fourth matrix product beside the three of a head that keeps its logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from verl_troll.core import kernels
from verl_troll.core.kernels.logits_torch import slices, working_dtype
from verl_troll.core.logits import DenseLogits, LogitGradient, Normaliser, Reading

# Tokens and columns that are read together: on a host what its cache holds, on an accelerator so many columns that most
# vocabularies take one search. Neither depends on the number of tokens, so the parts of a row are added in the same
# order whatever else is read.
_READ_BLOCK = {"cpu": (128, 8192)}
_DEVICE_READ_BLOCK = (1024, 1 << 18)
# Tokens per block of the backward pass, many so that the weight's gradient is seldom written; elements per block.
_GRADIENT_BLOCK = {"cpu": (1024, 1 << 20)}
_DEVICE_GRADIENT_BLOCK = (8192, 1 << 27)


@dataclass(frozen=True)
class LinearHead:
    """Logits ``hidden @ weight.T / temperature``, computed as they are read.

    If the vocabulary is sharded, the gradient of ``hidden`` is only this rank's contribution, as after Megatron's
    output layer; the caller sums it over the group.

    Attributes:
        temperature: above 0; divides the logits.
        form: see :data:`verl_troll.core.kernels.Form`.

    Raises:
        ValueError: shapes or dtypes do not match, or the temperature is not above 0.
    """

    hidden: Float[Tensor, "tokens units"]
    weight: Float[Tensor, "columns units"]
    temperature: float = 1.0
    form: kernels.Form = "auto"

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
        """Hidden states and weight."""
        return self.hidden, self.weight

    @property
    def builder(self) -> Callable[..., LinearHead]:
        """Builds the same head from ``tensors``."""
        return partial(LinearHead, temperature=self.temperature, form=self.form)

    @property
    def triton(self) -> bool:
        """Whether the Triton forms read these logits."""
        return kernels.reads_with_triton(self.hidden, self.form)

    def read(
        self,
        rows: Int[Tensor, " rows"],
        ids: Int[Tensor, "rows ids"],
        columns: int,
        *,
        k: int = 0,
        energy: bool = False,
    ) -> Reading:
        """See :func:`verl_troll.core.kernels.read_rows`."""
        with torch.no_grad(), torch.autocast(self.hidden.device.type, enabled=False):
            height, _ = _READ_BLOCK.get(self.hidden.device.type, _DEVICE_READ_BLOCK)
            blocks = [
                self._read_tokens(self.hidden[rows[tokens]], ids[tokens], columns, k, energy)
                for tokens in slices(rows.shape[0], height)
            ]
            if not blocks:
                return self._read_nothing(rows, ids, k, energy)
            normalisers = [block.normaliser for block in blocks]
            return Reading(
                Normaliser(
                    torch.cat([part.max for part in normalisers]),
                    torch.cat([part.sumexp for part in normalisers]),
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
            logits = DenseLogits(self._logits(hidden, weight), form=self.form)
            part = logits.read(everything, _within(ids, vocabulary, columns), weight.shape[0], k=k, energy=energy)
            # Before the next block is computed.
            del logits
            if vocabulary.start > 0:
                part = part._replace(top_ids=torch.where(part.top_ids >= 0, part.top_ids + vocabulary.start, -1))
            found = part if found is None else _join(found, part, k)
        return self._read_nothing(everything, ids, k, energy) if found is None else found

    def _read_nothing(self, rows: Tensor, ids: Tensor, k: int, energy: bool) -> Reading:
        return DenseLogits(self.hidden[:, :0], form=self.form).read(rows, ids, 0, k=k, energy=energy)

    def _logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.T
        return logits if self.temperature == 1 else logits.div_(self.temperature)

    def gradients(
        self, rows: Int[Tensor, " rows"], columns: int, gradient: LogitGradient, needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the hidden states and of the weight, None where not ``needed``."""
        dtype = working_dtype(self.hidden)
        hidden = self.hidden[rows]
        grad_hidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if needed[0] else None
        grad_weight = torch.zeros_like(self.weight) if needed[1] else None
        height, elements = _GRADIENT_BLOCK.get(hidden.device.type, _DEVICE_GRADIENT_BLOCK)
        width = elements // max(1, min(height, rows.shape[0]))
        everything = torch.arange(min(height, rows.shape[0]), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            # All tokens for one part of the vocabulary, then the next part: each part of the weight's gradient is
            # summed in working precision and rounded once.
            for vocabulary in slices(columns, width):
                weight = self.weight[vocabulary]
                at_once = rows.shape[0] <= height and dtype != weight.dtype
                grad_part = None
                if grad_weight is not None and not at_once:
                    grad_part = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
                for tokens in slices(rows.shape[0], height):
                    block = self._logits(hidden[tokens], weight)
                    kernels.write_gradient(
                        block,
                        block,
                        everything[: block.shape[0]],
                        block.shape[1],
                        gradient.max[tokens],
                        gradient.level[tokens],
                        None if gradient.slope is None else gradient.slope[tokens],
                        _within(gradient.ids[tokens], vocabulary, columns),
                        gradient.corrections[tokens],
                        form=self.form,
                    )
                    if self.temperature != 1:
                        block.div_(self.temperature)
                    if grad_hidden is not None:
                        _add_product(grad_hidden[tokens], block, weight)
                    if grad_part is not None:
                        _add_product(grad_part, block.T, hidden[tokens])
                    elif grad_weight is not None:
                        torch.mm(block.T, hidden[tokens], out=grad_weight[vocabulary])
                    # Free this block before the next one is computed.
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
    """``ids`` as columns of the part ``vocabulary``; -1 outside it."""
    if vocabulary.start == 0 and vocabulary.stop >= columns:
        return ids
    return torch.where((ids >= vocabulary.start) & (ids < vocabulary.stop), ids - vocabulary.start, -1)


def _join(before: Reading, after: Reading, k: int) -> Reading:
    """The reading of two adjacent parts of the vocabulary."""
    first, second = before.normaliser, after.normaliser
    energies = None
    if first.energy is not None and second.energy is not None:
        energies = torch.stack([first.energy, second.energy])
    # Equal values are in id order, and a stable sort keeps it.
    top = torch.cat([before.top_values, after.top_values], dim=-1).sort(dim=-1, descending=True, stable=True)
    top_ids = torch.cat([before.top_ids, after.top_ids], dim=-1).gather(-1, top.indices[:, :k])
    return Reading(
        Normaliser.combine(torch.stack([first.max, second.max]), torch.stack([first.sumexp, second.sumexp]), energies),
        before.values + after.values,
        top.values[:, :k],
        top_ids,
    )
