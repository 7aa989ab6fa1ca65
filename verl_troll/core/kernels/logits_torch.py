"""Reading logits and writing their gradient block by block, without ever holding a second tensor of their size.

Much of this is tuned for CPUs, where it trains tiny models; on a GPU it is slow. See :mod:`verl_troll.core.kernels` for
the contract of each function.

Shapes: N packed tokens, C columns, R rows of interest (indices into N), W ids per row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Logits processed at a time: as many as a host's cache holds, or as keep an accelerator busy.
_HOST_BLOCK = 1 << 20
_DEVICE_BLOCK = 1 << 24
_INT32_MAX = 2**31 - 1
# Columns per group; groups are ordered by their maxima first.
_GROUP = 64
# Sorting only the large candidates pays off up to this many candidates per requested logit. Many equal or NaN logits
# give more.
_MAX_CANDIDATES = 4
# Candidates that are sorted together fill at most a working block divided by this.
_SORT_SHARE = 4
_LOG2_E = math.log2(math.e)
# Rows of at least this length get a call of their own.
_LONG_ROW = 8192
# Replaces log(0) where sumexp is 0: its exponential is 0 in every dtype, and so is 0 times it.
LOG_ZERO = -1e4


def block_elements(device: torch.device) -> int:
    """Number of logits to process at a time."""
    return _HOST_BLOCK if device.type == "cpu" else _DEVICE_BLOCK


def slices(size: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most ``step`` that cover ``size``."""
    step = max(1, step)
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _block_rows(rows: Tensor, columns: int) -> int:
    return min(rows.shape[0], max(1, block_elements(rows.device) // max(1, columns)))


def _row_blocks(rows: Tensor, columns: int) -> Iterator[slice]:
    """Slices of ``rows`` whose logits fit one working block; none if there are no columns."""
    return slices(rows.shape[0], _block_rows(rows, columns)) if columns > 0 else iter(())


def working_dtype(logits: Tensor) -> torch.dtype:
    """float32 for half precisions, the logits' own dtype otherwise."""
    return torch.promote_types(logits.dtype, torch.float32)


def read_rows(
    logits: Tensor, rows: Tensor, ids: Tensor, columns: int, k: int, energy: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """See :func:`verl_troll.core.kernels.read_rows`."""
    dtype = working_dtype(logits)
    if columns == 0:
        values = torch.zeros(ids.shape, dtype=dtype, device=logits.device)
    else:
        values = torch.where(ids >= 0, logits[rows.unsqueeze(-1), ids.clamp_min(0)], 0.0).to(dtype)
    max_logit, sumexp, total_energy, top_values, top_ids = _read_rows(logits, rows, columns, k, energy)
    return max_logit, sumexp, total_energy, values, top_values, top_ids


def _read_rows(
    logits: Tensor, rows: Tensor, columns: int, k: int, energy: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    dtype = working_dtype(logits)
    max_logit = torch.full((rows.shape[0],), -math.inf, dtype=dtype, device=logits.device)
    sumexp = torch.zeros_like(max_logit)
    total_energy = torch.zeros_like(max_logit) if energy else None
    values = torch.full((rows.shape[0], k), -math.inf, dtype=dtype, device=logits.device)
    ids = torch.full((rows.shape[0], k), -1, dtype=torch.int64, device=logits.device)
    own = min(k, columns)
    groups = columns // _GROUP if 0 < 4 * own <= columns // _GROUP else 0
    # Rows whose largest logits are found together: few enough that the tables of candidates stay small.
    step = _block_rows(rows, _SORT_SHARE * max(groups, own * _GROUP) if groups > 0 else columns)
    maxima = torch.empty(step, groups, dtype=dtype, device=logits.device)
    # One buffer for all blocks: allocating a new one costs the host a page fault per page.
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
                max_logit[block] = maxima[inner].amax(-1)
                if groups * _GROUP < columns:
                    max_logit[block] = torch.maximum(max_logit[block], dense[:, groups * _GROUP :].amax(-1))
            elif own > 0:
                values[block, :own], ids[block, :own] = ordered_topk(dense, own)
                max_logit[block] = values[block, 0]
            else:
                max_logit[block] = dense.amax(-1)
            # If every local logit is -inf, subtracting the maximum would give NaN.
            shift = max_logit[block].clamp_min(torch.finfo(dtype).min).unsqueeze(-1)
            shifted = torch.sub(dense, shift, out=buffer[: dense.shape[0]])
            if total_energy is None or weights is None:
                sumexp[block] = _exp(shifted, out=shifted).sum(-1)
            else:
                weight = _exp(shifted.clamp_min_(LOG_ZERO), out=weights[: dense.shape[0]])
                sumexp[block] = weight.sum(-1)
                total_energy[block] = weight.mul_(shifted).sum(-1)
        if groups > 0:
            own_maxima = maxima[: chunk.stop - chunk.start]
            values[chunk], ids[chunk] = _topk_by_groups(logits, rows[chunk], columns, own_maxima, own)
    return max_logit, sumexp, total_energy, values, ids


def _exp(values: Tensor, *, out: Tensor) -> Tensor:
    """``exp`` of ``values [rows, columns]``, written to ``out``, which may be ``values``."""
    if values.device.type != "cpu" or values.dtype != torch.float32 or values.shape[-1] < _LONG_ROW:
        return torch.exp(values, out=out)
    # torch leaves exp to MKL, which is slow on processors that it does not know; exp2 takes a third of the time there.
    # Rounding the product changes exp(-x) by x 2^-24, relative.
    torch.mul(values, _LOG2_E, out=out)
    # Elements that do not fill a vector take another code path. Row by row, no bit depends on the neighbouring rows.
    for row in out.unbind():
        row.exp2_()
    return out


def _at_rows(logits: Tensor, rows: Tensor) -> Tensor:
    """``logits[rows]``; on the host a view if the rows are consecutive, as a response's rows are."""
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
    max_logit: Tensor,
    level: Tensor,
    slope: Tensor | None,
    ids: Tensor,
    corrections: Tensor,
) -> None:
    """See :func:`verl_troll.core.kernels.write_gradient`."""
    other = torch.ones(out.shape[0], dtype=torch.bool, device=out.device)
    other[rows] = False
    out.index_fill_(0, other.nonzero().squeeze(-1), 0)
    wanted = ids >= 0
    local_ids, corrections = ids.clamp_min(0), torch.where(wanted, corrections, 0.0)
    shape = (_block_rows(rows, columns), columns)
    buffer = torch.empty(shape, dtype=max_logit.dtype, device=out.device)
    weights = None if slope is None else torch.empty_like(buffer)
    for block in _row_blocks(rows, columns):
        dense = _at_rows(logits, rows[block])[:, :columns]
        run = _run(out, rows[block])
        target = None if run is None else out[run, :columns]
        in_place = target is not None and target.dtype == buffer.dtype
        if dense.dtype != buffer.dtype:
            dense = buffer[: dense.shape[0]].copy_(dense)
        gradient = torch.sub(
            dense, max_logit[block].unsqueeze(-1), out=target if in_place else buffer[: dense.shape[0]]
        )
        if slope is None or weights is None:
            _exp(gradient, out=gradient).mul_(level[block].unsqueeze(-1))
        else:
            weight = _exp(gradient.clamp_min_(LOG_ZERO), out=weights[: dense.shape[0]])
            gradient.mul_(slope[block].unsqueeze(-1)).add_(level[block].unsqueeze(-1)).mul_(weight)
        gradient.scatter_add_(-1, local_ids[block], corrections[block])
        if target is None:
            out[rows[block], :columns] = gradient.to(out.dtype)
        elif not in_place:
            target.copy_(gradient)
    if columns < out.shape[-1]:
        out[:, columns:] = 0


def _topk_by_groups(logits: Tensor, rows: Tensor, columns: int, maxima: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """:func:`ordered_topk` of ``logits[rows, :columns]``, sorting little more than it returns.

    Order groups of consecutive columns by their maximum. The k largest logits lie in the first k groups: each of these
    has a maximum that comes before every logit of a later group. No result is below the smallest of these k maxima,
    and few other logits reach it.

    Args:
        maxima: ``[R, G]`` maximum of each group, G >= k. The last columns, too few to fill a group, belong to none.
    """
    groups = maxima.shape[-1]
    largest, chosen = ordered_topk(maxima, k)
    chosen = chosen.sort(dim=-1).values
    threshold = largest[:, -1:].to(logits.dtype)
    # Columns without a group come last, which keeps candidates in column order.
    parts = [_runs(logits, rows, chosen * _GROUP, _GROUP), logits[rows, groups * _GROUP : columns]]
    # Not "part >= threshold": NaN must be found too, since it sorts first.
    found = [(~(part < threshold)).nonzero(as_tuple=True) for part in parts]
    counts = [torch.bincount(row, minlength=rows.shape[0]) for row, _ in found]
    width = int(torch.stack(counts).sum(0).max())
    if width > _MAX_CANDIDATES * k:
        values, indices = ordered_topk(torch.cat(parts, dim=-1), k)
    else:
        table = logits.new_full((rows.shape[0], width), -math.inf)
        table_indices = torch.zeros(table.shape, dtype=torch.int64, device=logits.device)
        begin = torch.zeros_like(counts[0])
        for part, count, (row, index), offset in zip(parts, counts, found, (0, k * _GROUP), strict=True):
            slot = (begin - count.cumsum(0) + count)[row] + torch.arange(row.shape[0], device=logits.device)
            table[row, slot], table_indices[row, slot] = part[row, index], index + offset
            begin = begin + count
        # Candidates are in column order, and a stable sort keeps equal ones in that order.
        best = table.sort(dim=-1, descending=True, stable=True)
        values, indices = best.values[:, :k], table_indices.gather(-1, best.indices[:, :k])
    group = chosen.gather(-1, (indices // _GROUP).clamp_max(k - 1))
    inside = indices < k * _GROUP
    ids = torch.where(inside, group * _GROUP + indices % _GROUP, indices + (groups - k) * _GROUP)
    return values.to(maxima.dtype), ids


def _runs(logits: Tensor, rows: Tensor, starts: Tensor, width: int) -> Tensor:
    """``[R, G * width]``: for each row, ``width`` columns starting at each of ``starts [R, G]``."""
    if logits.stride(-1) != 1:
        # Copy only these rows, not a second tensor of the logits' size.
        logits, rows = logits[rows].contiguous(), torch.arange(len(rows), device=rows.device)
    # Select whole runs of memory from a view of all overlapping ones: one index per element would cost ten times as
    # much.
    length = (logits.shape[0] - 1) * logits.stride(0) + logits.shape[1] - width + 1
    everywhere = logits.as_strided((length, width), (1, 1))
    return everywhere.index_select(0, (rows.unsqueeze(-1) * logits.stride(0) + starts).flatten()).view(len(rows), -1)


def ordered_topk(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns ``[R, k]`` of the k largest entries of ``[R, C]``, by falling value, then rising column.

    ``torch.topk`` does not specify which of several equal values it returns. Here it sorts integer keys that encode
    value and column.
    """
    if rows.dtype == torch.float64:
        ordered = rows.sort(dim=-1, descending=True, stable=True)
        return ordered.values[:, :k], ordered.indices[:, :k]
    # Adding 0 turns -0 into 0.
    bits = (rows.float() + 0.0).view(torch.int32)
    keys = (bits ^ ((bits >> 31) & _INT32_MAX)).long() << 32
    keys |= _INT32_MAX - torch.arange(rows.shape[-1], device=rows.device)
    keys = keys.topk(k, dim=-1).values
    bits = (keys >> 32).int()
    values = (bits ^ ((bits >> 31) & _INT32_MAX)).view(torch.float32)
    return values.to(rows.dtype), _INT32_MAX - (keys & _INT32_MAX)
