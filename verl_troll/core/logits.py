"""What is read from logits and written back to them, and where they come from.

Every use of logits is one :class:`Reading` of some rows, and one gradient (:class:`LogitGradient`) written back. A
:class:`LogitsSource` provides both: a tensor (:class:`DenseLogits`), or a head that computes logits where they are read
(:class:`verl_troll.core.lm_head.LinearHead`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from verl_troll.core import kernels
from verl_troll.core.kernels.logits_torch import LOG_ZERO


class Normaliser(NamedTuple):
    """Normaliser of the softmax, ``Z = sumexp * exp(max)``, and what the entropy needs.

    Keeping the two parts apart preserves digits of likely log-probabilities that large logits would cost.

    Attributes:
        max: largest logit; ``-inf`` without columns.
        sumexp: ``sum exp(logit - max)``; 0 without columns.
        energy: ``sum exp(logit - max) (logit - max)``, or None if not requested.
    """

    max: Float[Tensor, " rows"]
    sumexp: Float[Tensor, " rows"]
    energy: Float[Tensor, " rows"] | None = None

    def log_probs(self, values: Float[Tensor, "rows ids"]) -> Float[Tensor, "rows ids"]:
        """Log-probabilities, in nats, of the logits ``values``."""
        return (values - self.max.unsqueeze(-1)) - self.sumexp.log().unsqueeze(-1)

    def entropy(self) -> Float[Tensor, " rows"]:
        """Entropy in nats.

        Raises:
            ValueError: the energy was not read.
        """
        if self.energy is None:
            raise ValueError("the entropy was not asked for when the logits were read")
        return self.sumexp.log() - self.energy / self.sumexp

    @classmethod
    def combine(
        cls,
        maxima: Float[Tensor, "parts rows"],
        sumexps: Float[Tensor, "parts rows"],
        energies: Float[Tensor, "parts rows"] | None = None,
    ) -> Normaliser:
        """The normaliser over all columns from those of several parts.

        Parts are added one by one, so that the same parts give the same bits wherever they lie in memory: the old
        policy and an unchanged new one arrive in different ways, and their ratio must be exactly 1.
        """
        maxima, sumexps = maxima.contiguous(), sumexps.contiguous()
        max_logit = maxima.amax(0)
        sumexp = torch.zeros_like(max_logit)
        energy = None if energies is None else torch.zeros_like(max_logit)
        for part, (part_max, part_sumexp) in enumerate(zip(maxima, sumexps, strict=True)):
            shift = part_max - max_logit
            sumexp += part_sumexp * shift.exp()
            if energy is not None and energies is not None:
                # The shift of a part without columns or mass is infinite.
                energy += (energies[part] + part_sumexp * shift.clamp_min(LOG_ZERO)) * shift.exp()
        return cls(max_logit, sumexp, energy)


class Reading(NamedTuple):
    """What one pass over the logits of some rows yields.

    Attributes:
        normaliser: over the columns read.
        values: logits at the requested ids, 0 where the id is negative.
        top_values: the largest logits, by falling value, equal ones by rising column; ``-inf`` beyond the columns.
        top_ids: int64, their columns; -1 beyond the columns.
    """

    normaliser: Normaliser
    values: Float[Tensor, "rows ids"]
    top_values: Float[Tensor, "rows k"]
    top_ids: Int[Tensor, "rows k"]


class LogitGradient(NamedTuple):
    """The gradient of a loss to the logits ``x`` of some rows, not yet written out.

    In row r it is ``exp(x - max[r]) (level[r] + slope[r] (x - max[r]))``, plus ``corrections[r]`` at columns
    ``ids[r]``.

    Attributes:
        slope: None for 0.
        ids: int64, each once per row, negative for none.
    """

    max: Float[Tensor, " rows"]
    level: Float[Tensor, " rows"]
    slope: Float[Tensor, " rows"] | None
    ids: Int[Tensor, "rows ids"]
    corrections: Float[Tensor, "rows ids"]


@runtime_checkable
class LogitsSource(Protocol):
    """Where logits come from."""

    @property
    def columns(self) -> int:
        """Number of logit columns."""
        ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that gradients flow to."""
        ...

    @property
    def builder(self) -> Callable[..., LogitsSource]:
        """Builds the same source from ``tensors``."""
        ...

    @property
    def form(self) -> kernels.Form:
        """The requested form of the operations."""
        ...

    @property
    def triton(self) -> bool:
        """Whether the Triton forms read these logits."""
        ...

    def read(
        self,
        rows: Int[Tensor, " rows"],
        ids: Int[Tensor, "rows ids"],
        columns: int,
        *,
        k: int = 0,
        energy: bool = False,
    ) -> Reading:
        """Read the first ``columns`` columns at ``rows``; see :func:`verl_troll.core.kernels.read_rows`."""
        ...

    def gradients(
        self, rows: Int[Tensor, " rows"], columns: int, gradient: LogitGradient, needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of ``tensors``, None where not ``needed``."""
        ...


@dataclass(frozen=True)
class DenseLogits:
    """A tensor of logits.

    Attributes:
        logits: temperature already applied.
        reuse: write the gradient over the logits, which must not be used again. autograd raises if something else
            kept them for its own backward pass.
        form: see :data:`verl_troll.core.kernels.Form`.
    """

    logits: Float[Tensor, "tokens columns"]
    reuse: bool = False
    form: kernels.Form = "auto"

    @property
    def columns(self) -> int:
        """Number of logit columns."""
        return self.logits.shape[-1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The logits."""
        return (self.logits,)

    @property
    def builder(self) -> Callable[..., DenseLogits]:
        """Builds the same source from ``tensors``."""
        return partial(DenseLogits, reuse=self.reuse, form=self.form)

    @property
    def triton(self) -> bool:
        """Whether the Triton forms read these logits."""
        return kernels.reads_with_triton(self.logits, self.form)

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
        max_logit, sumexp, total_energy, *found = kernels.read_rows(
            self.logits, rows, ids, columns, k=k, energy=energy, form=self.form
        )
        return Reading(Normaliser(max_logit, sumexp, total_energy), *found)

    def gradients(
        self, rows: Int[Tensor, " rows"], columns: int, gradient: LogitGradient, needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """The logits' gradient."""
        logits = self.logits.detach()
        out = logits if self.reuse else torch.empty_like(logits)
        kernels.write_gradient(out, logits, rows, columns, *gradient, form=self.form)
        return (out,)
