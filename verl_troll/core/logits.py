"""Reading ``[tokens, columns]`` logits in blocks of rows, so that no second tensor of their size is ever held.

These torch forms run anywhere and are the reference of the Triton ones (:mod:`verl_troll.core.kernels`), which take
over on GPUs.

Shapes: N packed tokens, C columns, R rows of interest (indices into N), W ids per row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from verl_troll.core import kernels

# Elements of logits that are worked on at a time: what the host's cache holds, and what keeps an accelerator busy.
_HOST_BLOCK = 1 << 20
_DEVICE_BLOCK = 1 << 24
_INT32_MAX = 2**31 - 1
# Columns per group whose largest entry is looked at first.
_GROUP = 64
# Entries per wanted one up to which sorting the large ones alone pays; more are equal, or not numbers.
_FEW = 4
# A working block over the candidates that are sorted at a time.
_SORT_SHARE = 4
_LOG2_E = math.log2(math.e)
# Columns from which on a call per row costs little.
_LONG_ROW = 8192
# Stands in for the logarithm of no mass: its exponential is 0 in every dtype, and 0 times it is 0.
_LOG_ZERO = -1e4


def block_elements(device: torch.device) -> int:
    """Elements of logits that are worked on at a time."""
    return _HOST_BLOCK if device.type == "cpu" else _DEVICE_BLOCK


def slices(size: int, step: int) -> Iterator[slice]:
    """Neighbouring slices of at most ``step`` that cover ``size``."""
    step = max(1, step)
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _block_rows(rows: Tensor, columns: int) -> int:
    return min(rows.shape[0], max(1, block_elements(rows.device) // max(1, columns)))


def _row_blocks(rows: Tensor, columns: int) -> Iterator[slice]:
    """Slices of ``rows`` whose logits fit the working block; none without columns."""
    return slices(rows.shape[0], _block_rows(rows, columns)) if columns > 0 else iter(())


def working_dtype(logits: Tensor) -> torch.dtype:
    """float32 for half precisions, the logits' own dtype otherwise."""
    return torch.promote_types(logits.dtype, torch.float32)


class Normaliser(NamedTuple):
    """The softmax's normaliser ``Z = mass * exp(peak)`` in two parts, and what its entropy needs.

    Kept apart, log-probabilities of likely ids lose no digits to the size of the logits.

    Attributes:
        peak: ``[R]`` largest logit; ``-inf`` without columns.
        mass: ``[R]`` ``sum exp(logit - peak)``; 0 without columns.
        energy: ``[R]`` ``sum exp(logit - peak) (logit - peak)``, or None where nobody asked.
    """

    peak: Tensor
    mass: Tensor
    energy: Tensor | None = None

    def log_probs(self, values: Tensor) -> Tensor:
        """Log-probabilities ``[R, W]``, in nats, of outcomes with logits ``values [R, W]``."""
        return (values - self.peak.unsqueeze(-1)) - self.mass.log().unsqueeze(-1)

    def entropy(self) -> Tensor:
        """Entropy ``[R]`` in nats.

        Raises:
            ValueError: the energy was not read.
        """
        if self.energy is None:
            raise ValueError("the entropy was not asked for when the logits were read")
        return self.mass.log() - self.energy / self.mass

    @classmethod
    def combine(cls, peaks: Tensor, masses: Tensor, energies: Tensor | None = None) -> Normaliser:
        """The normaliser over all columns from those of P parts, ``[P, R]`` each.

        The parts are added one by one, so that the same parts give the same bits wherever they lie in memory: the old
        policy and an unchanged new one come by different ways, and their ratio must be exactly 1.
        """
        peaks, masses = peaks.contiguous(), masses.contiguous()
        peak = peaks.amax(0)
        mass = torch.zeros_like(peak)
        energy = None if energies is None else torch.zeros_like(peak)
        for part, (part_peak, part_mass) in enumerate(zip(peaks, masses, strict=True)):
            shift = part_peak - peak
            mass += part_mass * shift.exp()
            if energy is not None and energies is not None:
                # A part without columns, or of columns without mass, has an infinite shift.
                energy += (energies[part] + part_mass * shift.clamp_min(_LOG_ZERO)) * shift.exp()
        return cls(peak, mass, energy)


class Reading(NamedTuple):
    """What one pass over the logits of R rows yields.

    Attributes:
        normaliser: over the columns read.
        values: ``[R, W]`` logits at the ids asked for, 0 where the id is negative.
        top_values, top_ids: ``[R, k]`` the largest logits and their columns (int64), as :func:`ordered_topk` orders
            them; beyond the columns there are, ``-inf`` and -1.
    """

    normaliser: Normaliser
    values: Tensor
    top_values: Tensor
    top_ids: Tensor


class LogitsSource(Protocol):
    """Where logits come from: :class:`DenseLogits` or a head (:class:`~verl_troll.core.lm_head.LinearHead`)."""

    @property
    def columns(self) -> int:
        """Number of logit columns."""
        ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What gradients flow to."""
        ...

    @property
    def builder(self) -> Callable[..., LogitsSource]:
        """Makes the same source from ``tensors``."""
        ...

    def read(self, rows: Tensor, ids: Tensor, columns: int, *, k: int = 0, energy: bool = False) -> Reading:
        """See :func:`read_rows`."""
        ...

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
        """Gradients of ``tensors``, None where not ``needed``; see :func:`write_gradient`."""
        ...


@dataclass(frozen=True)
class DenseLogits:
    """A tensor of logits ``[N, C]``.

    Attributes:
        logits: float; the temperature is applied.
        reuse: write the gradient over the logits themselves, which must have no further use. autograd raises where
            something else kept them for its own backward pass.
    """

    logits: Tensor
    reuse: bool = False

    @property
    def columns(self) -> int:
        """Number of logit columns."""
        return self.logits.shape[-1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What gradients flow to."""
        return (self.logits,)

    @property
    def builder(self) -> Callable[..., DenseLogits]:
        """Makes the same source from ``tensors``."""
        return partial(DenseLogits, reuse=self.reuse)

    def read(self, rows: Tensor, ids: Tensor, columns: int, *, k: int = 0, energy: bool = False) -> Reading:
        """See :func:`read_rows`."""
        return read_rows(self.logits, rows, ids, columns, k=k, energy=energy)

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
        """The logits' gradient; see :func:`write_gradient`."""
        out = self.logits.detach() if self.reuse else torch.empty_like(self.logits)
        write_gradient(out, self.logits.detach(), rows, columns, peak, level, slope, ids, corrections)
        return (out,)


def as_source(logits: Tensor | LogitsSource, *, reuse: bool = False) -> LogitsSource:
    """``logits`` where they already are a source, :class:`DenseLogits` of a tensor."""
    return DenseLogits(logits, reuse) if isinstance(logits, Tensor) else logits


def fused(source: LogitsSource) -> bool:
    """Whether the kernels take the place of the torch forms for these logits."""
    tensor = source.tensors[0]
    return working_dtype(tensor) == torch.float32 and kernels.available(tensor.device)


def read_rows(logits: Tensor, rows: Tensor, ids: Tensor, columns: int, *, k: int = 0, energy: bool = False) -> Reading:
    """Read the first ``columns`` columns of ``logits [N, C]`` at ``rows [R]``, once, without gradient.

    Args:
        ids: ``[R, W]`` int64 columns whose logits are wanted, negative for none.
        k: number of largest entries wanted.
        energy: whether the entropy will be asked for.

    Returns:
        All values in the working dtype (float32 for half precisions).
    """
    dtype = working_dtype(logits)
    with torch.no_grad():
        if kernels.available(logits.device) and dtype == torch.float32 and k <= kernels.MAX_K:
            peak, mass, own_energy, *read = kernels.read_rows(logits, rows, ids, columns, k=k)
            return Reading(Normaliser(peak, mass, own_energy if energy else None), *read)
        if columns == 0:
            values = torch.zeros(ids.shape, dtype=dtype, device=logits.device)
        else:
            values = torch.where(ids >= 0, logits[rows.unsqueeze(-1), ids.clamp_min(0)], 0.0).to(dtype)
        peak, mass, total_energy, *top = _read_rows(logits, rows, columns, k, energy)
        return Reading(Normaliser(peak, mass, total_energy), values, *top)


def _read_rows(
    logits: Tensor, rows: Tensor, columns: int, k: int, energy: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    dtype = working_dtype(logits)
    peak = torch.full((rows.shape[0],), -math.inf, dtype=dtype, device=logits.device)
    mass = torch.zeros_like(peak)
    total_energy = torch.zeros_like(peak) if energy else None
    values = torch.full((rows.shape[0], k), -math.inf, dtype=dtype, device=logits.device)
    ids = torch.full((rows.shape[0], k), -1, dtype=torch.int64, device=logits.device)
    own = min(k, columns)
    groups = columns // _GROUP if 0 < 4 * own <= columns // _GROUP else 0
    # Rows whose best entries are found together: as many as keep all that is made of their candidates small.
    step = _block_rows(rows, _SORT_SHARE * max(groups, own * _GROUP) if groups > 0 else columns)
    maxima = torch.empty(step, groups, dtype=dtype, device=logits.device)
    # One buffer for all blocks: the host pays for each new one page by page.
    buffer = torch.empty(_block_rows(rows, columns), columns, dtype=dtype, device=logits.device)
    weights = torch.empty_like(buffer) if energy else None
    for chunk in slices(rows.shape[0], step) if columns > 0 else ():
        for inner in slices(chunk.stop - chunk.start, buffer.shape[0]):
            block = slice(chunk.start + inner.start, chunk.start + inner.stop)
            dense = _at_rows(logits, rows[block])[:, :columns]
            if dense.dtype != dtype:
                dense = buffer[: dense.shape[0]].copy_(dense)
            if groups > 0:
                grouped = dense[:, : groups * _GROUP].view(-1, groups, _GROUP)
                torch.amax(grouped, dim=-1, out=maxima[inner])
                peak[block] = maxima[inner].amax(-1)
                if groups * _GROUP < columns:
                    peak[block] = torch.maximum(peak[block], dense[:, groups * _GROUP :].amax(-1))
            elif own > 0:
                values[block, :own], ids[block, :own] = ordered_topk(dense, own)
                peak[block] = values[block, 0]
            else:
                peak[block] = dense.amax(-1)
            # Where every local logit is -inf the difference from the peak would be undefined.
            shift = peak[block].clamp_min(torch.finfo(dtype).min).unsqueeze(-1)
            shifted = torch.sub(dense, shift, out=buffer[: dense.shape[0]])
            if total_energy is None or weights is None:
                mass[block] = _exp(shifted, out=shifted).sum(-1)
            else:
                weight = _exp(shifted.clamp_min_(_LOG_ZERO), out=weights[: dense.shape[0]])
                mass[block] = weight.sum(-1)
                total_energy[block] = weight.mul_(shifted).sum(-1)
        if groups > 0:
            own_maxima = maxima[: chunk.stop - chunk.start]
            values[chunk], ids[chunk] = _topk_by_groups(logits, rows[chunk], columns, own_maxima, own)
    return peak, mass, total_energy, values, ids


def _exp(values: Tensor, *, out: Tensor) -> Tensor:
    """``exp(values)`` of ``[rows, columns]`` in ``out``, which may be ``values``."""
    if values.device.type != "cpu" or values.dtype != torch.float32 or values.shape[-1] < _LONG_ROW:
        return torch.exp(values, out=out)
    # Where torch leaves exp to MKL, and MKL does not know the processor, exp2 takes a third of the time. Rounding the
    # product changes a weight of exp(-x) by x 2^-24 of itself.
    torch.mul(values, _LOG2_E, out=out)
    # What fills no vector is computed another way: row by row, its bits do not depend on the rows beside it.
    for row in out.unbind():
        row.exp2_()
    return out


def _at_rows(logits: Tensor, rows: Tensor) -> Tensor:
    """``logits[rows]``; on the host a view where the rows are neighbours, as a response's are."""
    return logits[rows] if (run := _run(logits, rows)) is None else logits[run]


def _run(logits: Tensor, rows: Tensor) -> slice | None:
    # Reading the bounds would stall an accelerator.
    if logits.device.type != "cpu" or rows.shape[0] == 0:
        return None
    if not bool((rows.diff() == 1).all()):
        return None
    first = int(rows[0])
    return slice(first, first + rows.shape[0])


def write_gradient(
    out: Tensor,
    logits: Tensor,
    rows: Tensor,
    columns: int,
    peak: Tensor,
    level: Tensor,
    slope: Tensor | None,
    ids: Tensor,
    corrections: Tensor,
) -> None:
    """Write the gradient of everything that was read to ``out [N, C]``, once.

    At the first ``columns`` columns of row ``rows[r]``, with ``x`` the logits::

        out[j] = exp(x[j] - peak[r]) (level[r] + slope[r] (x[j] - peak[r])) + corrections[r, w where ids[r, w] == j]

    and 0 everywhere else.

    Args:
        out: of the dtype of ``logits``, and possibly ``logits`` itself.
        rows: ``[R]`` int64, without repetition.
        peak, level: ``[R]``.
        slope: ``[R]``, or None for 0.
        ids: ``[R, W]`` int64 columns, each once per row, negative for none.
        corrections: ``[R, W]``.
    """
    if kernels.available(logits.device) and working_dtype(logits) == torch.float32:
        kernels.write_gradient(out, logits, rows, columns, peak, level, slope, ids, corrections)
        return
    other = torch.ones(out.shape[0], dtype=torch.bool, device=out.device)
    other[rows] = False
    out.index_fill_(0, other.nonzero().squeeze(-1), 0)
    wanted = ids >= 0
    local_ids, corrections = ids.clamp_min(0), torch.where(wanted, corrections, 0.0)
    shape = (_block_rows(rows, columns), columns)
    buffer = torch.empty(shape, dtype=peak.dtype, device=out.device)
    weights = None if slope is None else torch.empty_like(buffer)
    for block in _row_blocks(rows, columns):
        dense = _at_rows(logits, rows[block])[:, :columns]
        run = _run(out, rows[block])
        target = None if run is None else out[run, :columns]
        in_place = target is not None and target.dtype == buffer.dtype
        if dense.dtype != buffer.dtype:
            dense = buffer[: dense.shape[0]].copy_(dense)
        gradient = torch.sub(dense, peak[block].unsqueeze(-1), out=target if in_place else buffer[: dense.shape[0]])
        if slope is None or weights is None:
            _exp(gradient, out=gradient).mul_(level[block].unsqueeze(-1))
        else:
            weight = _exp(gradient.clamp_min_(_LOG_ZERO), out=weights[: dense.shape[0]])
            gradient.mul_(slope[block].unsqueeze(-1)).add_(level[block].unsqueeze(-1)).mul_(weight)
        gradient.scatter_add_(-1, local_ids[block], corrections[block])
        if target is None:
            out[rows[block], :columns] = gradient.to(out.dtype)
        elif not in_place:
            target.copy_(gradient)
    if columns < out.shape[-1]:
        out[:, columns:] = 0


def _topk_by_groups(logits: Tensor, rows: Tensor, columns: int, maxima: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As :func:`ordered_topk` of ``logits[rows, :columns]``, with little more to sort than what it returns.

    The k largest entries lie in the k groups of neighbouring columns whose own largest entries are largest: each group
    that stands before another in that order holds an entry that stands before all of the other's. None of them is less
    than the least of these k largest entries, and few other entries are not.

    Args:
        maxima: ``[R, G]``, at least k, the largest entry of each group. Columns that fill no group belong to none.
    """
    groups = maxima.shape[-1]
    largest, chosen = ordered_topk(maxima, k)
    chosen = chosen.sort(dim=-1).values
    least = largest[:, -1:].to(logits.dtype)
    # The columns without a group come last, so that candidates stand in order of columns.
    parts = [_runs(logits, rows, chosen * _GROUP, _GROUP), logits[rows, groups * _GROUP : columns]]
    # Whatever is not less: what is not a number stands first.
    found = [(~(part < least)).nonzero(as_tuple=True) for part in parts]
    counts = [torch.bincount(row, minlength=rows.shape[0]) for row, _ in found]
    width = int(torch.stack(counts).sum(0).max())
    if width > _FEW * k:
        values, places = ordered_topk(torch.cat(parts, dim=-1), k)
    else:
        table = logits.new_full((rows.shape[0], width), -math.inf)
        table_places = torch.zeros(table.shape, dtype=torch.int64, device=logits.device)
        begin = torch.zeros_like(counts[0])
        for part, count, (row, place), offset in zip(parts, counts, found, (0, k * _GROUP), strict=True):
            slot = (begin - count.cumsum(0) + count)[row] + torch.arange(row.shape[0], device=logits.device)
            table[row, slot], table_places[row, slot] = part[row, place], place + offset
            begin = begin + count
        # Entries stand in order of columns, and a stable sort keeps that among equal ones.
        best = table.sort(dim=-1, descending=True, stable=True)
        values, places = best.values[:, :k], table_places.gather(-1, best.indices[:, :k])
    group = chosen.gather(-1, (places // _GROUP).clamp_max(k - 1))
    inside = places < k * _GROUP
    ids = torch.where(inside, group * _GROUP + places % _GROUP, places + (groups - k) * _GROUP)
    return values.to(maxima.dtype), ids


def _runs(logits: Tensor, rows: Tensor, starts: Tensor, width: int) -> Tensor:
    """``[R, G width]``: of each row, ``width`` columns from each of ``starts [R, G]`` on."""
    if logits.stride(-1) != 1:
        # Of these rows alone, so that no second tensor of the logits' size is made.
        logits, rows = logits[rows].contiguous(), torch.arange(len(rows), device=rows.device)
    # Copied whole out of every run of the memory that there is: an index per entry costs ten times as much.
    length = (logits.shape[0] - 1) * logits.stride(0) + logits.shape[1] - width + 1
    everywhere = logits.as_strided((length, width), (1, 1))
    return everywhere.index_select(0, (rows.unsqueeze(-1) * logits.stride(0) + starts).flatten()).view(len(rows), -1)


def ordered_topk(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns ``[R, k]`` of the k largest entries of ``[R, C]``, by falling value, then rising column.

    ``torch.topk`` leaves the order of equal values open, also across the k-th place: it is given integers that order
    value and column at once.
    """
    if rows.dtype == torch.float64:
        ordered = rows.sort(dim=-1, descending=True, stable=True)
        return ordered.values[:, :k], ordered.indices[:, :k]
    # Adding 0 makes -0 equal to 0.
    bits = (rows.float() + 0.0).view(torch.int32)
    keys = (bits ^ ((bits >> 31) & _INT32_MAX)).long() << 32
    keys |= _INT32_MAX - torch.arange(rows.shape[-1], device=rows.device)
    keys = keys.topk(k, dim=-1).values
    bits = (keys >> 32).int()
    values = (bits ^ ((bits >> 31) & _INT32_MAX)).view(torch.float32)
    return values.to(rows.dtype), _INT32_MAX - (keys & _INT32_MAX)
