# mypy: disable-error-code="no-untyped-def"
"""Reading and writing ``[tokens, columns]`` logits once. See :mod:`verl_troll.kernels` for the contracts.

**Reading.** One program per row streams its columns in steps of L lanes; lane i sees columns i, i + L, i + 2 L and so
on. A lane keeps its own peak, mass and the step of its peak, so that nothing crosses lanes before the row ends. The k
largest entries are found from the lanes: order all entries of the row by (value, lower column). If an entry is among
the k first, fewer than k lanes have a peak before it, so its lane is among the k lanes with the first peaks. Only these
lanes are read again, and what does not beat the k-th entry so far is dropped without sorting. Of random columns, about
k^2 / (2 L) entries beat it.

**Writing.** The corrected entries are computed before and stored after the dense pass, in kernels of their own: the
boundaries between kernels order them where the gradient is written over the logits.
"""

from __future__ import annotations

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from verl_troll.kernels import MAX_K

# Lanes of a reading program and its warps. 16 lanes per thread keep 32 bytes of bfloat16 in flight each, and leave
# registers for several programs per multiprocessor. More lanes mean fewer entries to sort, and more registers.
READ_LANES = 2048
# Sums must have the same bits whatever else is read along: without fusion their arithmetic does not depend on it.
READ_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
# Entries, at least 2 k, that are sorted at a time when the best lanes are read again.
READ_TABLE = 1024
# Columns per program and warps of the dense pass: 16 columns per thread.
WRITE_COLUMNS = 2048
WRITE_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
# Corrected entries per program.
CORRECT_ENTRIES = 512

# A key orders entries: the value's bits, made to rise with it, then the inverted column. This one is below them all.
_NO_KEY = tl.constexpr(-(2**63))


def read_rows(
    logits: Tensor, rows: Tensor, columns: int, k: int, energy: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    _check_logits(logits, columns)
    if not 0 <= k <= MAX_K:
        raise ValueError(f"k must lie between 0 and {MAX_K}, got {k!r}")
    if k > 0 and logits.dtype == torch.float64:
        raise ValueError("logits must not be float64 where k > 0: use the torch form")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    count = rows.shape[0]
    peak, mass = (torch.empty(count, dtype=dtype, device=logits.device) for _ in range(2))
    total_energy = torch.empty_like(peak) if energy else None
    values = torch.empty(count, k, dtype=dtype, device=logits.device)
    ids = torch.empty(count, k, dtype=torch.int64, device=logits.device)
    width = max(2, triton.next_power_of_2(k)) if k > 0 else 0
    if count > 0:
        with on_device(logits):
            _read[(count,)](
                logits,
                logits.stride(0),
                rows.contiguous(),
                columns,
                peak,
                mass,
                peak if total_energy is None else total_energy,
                values,
                ids,
                k,
                ENERGY=energy,
                K=width,
                LANES=max(READ_LANES, width),
                TABLE=max(2, READ_TABLE // max(width, 1)),
                **READ_OPTIONS,
            )
    return peak, mass, total_energy, values, ids


def write_gradient(
    out: Tensor,
    logits: Tensor,
    rows: Tensor,
    columns: int,
    peak: Tensor,
    a: Tensor,
    b: Tensor | None,
    ids: Tensor,
    corrections: Tensor,
) -> None:
    _check_logits(logits, columns)
    if out.shape != logits.shape or out.dtype != logits.dtype or (out.shape[-1] > 1 and out.stride(-1) != 1):
        raise ValueError(
            f"out must be contiguous in the last dimension, of shape {tuple(logits.shape)} and {logits.dtype}, got "
            f"{tuple(out.shape)}, strides {out.stride()}, {out.dtype}"
        )
    if out.numel() == 0:
        return
    count, width = ids.shape
    place = torch.full((logits.shape[0],), -1, dtype=torch.int32, device=logits.device)
    place[rows] = torch.arange(count, dtype=torch.int32, device=logits.device)
    rows, peak, a, ids, corrections = (x.contiguous() for x in (rows, peak, a, ids, corrections))
    slope = a if b is None else b.contiguous()
    correct = count * width > 0 and columns > 0
    with on_device(logits):
        # Before the dense pass, which may write over them.
        values = logits[rows.unsqueeze(-1), ids.clamp_min(0)] if correct else ids
        _write_dense[(logits.shape[0], triton.cdiv(logits.shape[1], WRITE_COLUMNS))](
            out,
            out.stride(0),
            logits,
            logits.stride(0),
            place,
            logits.shape[1],
            columns,
            peak,
            a,
            slope,
            SLOPE=b is not None,
            BLOCK=WRITE_COLUMNS,
            **WRITE_OPTIONS,
        )
        if correct:
            _write_corrected[(triton.cdiv(count * width, CORRECT_ENTRIES),)](
                out,
                out.stride(0),
                values,
                rows,
                ids,
                corrections,
                count * width,
                width,
                columns,
                peak,
                a,
                slope,
                SLOPE=b is not None,
                BLOCK=CORRECT_ENTRIES,
                **WRITE_OPTIONS,
            )


def _check_logits(logits: Tensor, columns: int) -> None:
    if logits.ndim != 2 or not logits.is_floating_point() or (logits.shape[1] > 1 and logits.stride(1) != 1):
        raise ValueError(
            "logits must be a floating-point matrix that is contiguous in the last dimension, got "
            f"{tuple(logits.shape)}, strides {logits.stride()}, {logits.dtype}"
        )
    if not 0 <= columns <= logits.shape[1]:
        raise ValueError(f"columns must lie between 0 and {logits.shape[1]}, got {columns!r}")


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


@triton.jit
def _keys(x, columns):
    """int64 keys of float32 ``x`` at int32 ``columns``."""
    bits = x.to(tl.int32, bitcast=True)
    # -0.0 counts as 0.0.
    bits = tl.where(x == 0.0, 0, bits)
    rising = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (rising.to(tl.int64) << 32) | (0x7FFFFFFF - columns).to(tl.int64)


@triton.jit
def _key_values(keys):
    bits = (keys >> 32).to(tl.int32)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _key_columns(keys):
    return (0x7FFFFFFF - (keys & 0x7FFFFFFF)).to(tl.int32)


@triton.jit
def _absorb(x, step, peak, mass, energy, peak_step, ENERGY: tl.constexpr, TOP: tl.constexpr):  # noqa: N803
    """Each lane's state after one more entry ``x``."""
    empty = x == -math.inf
    shift = tl.where(empty, 0.0, x - peak)
    # The exponential by which the larger of the two outweighs the smaller; of -inf by -inf, none.
    weight = tl.where(empty, 0.0, tl.exp(-tl.abs(shift)))
    rises = shift > 0
    if ENERGY:
        # What weighs nothing may have an infinite energy.
        moved = tl.where(weight > 0, weight * (energy - shift * mass), 0.0)
        energy = tl.where(rises, moved, energy + weight * tl.where(weight > 0, shift, 0.0))
    mass = tl.where(rises, mass * weight + 1, mass + weight)
    peak = tl.where(rises, x, peak)
    if TOP:
        peak_step = tl.where(rises, step, peak_step)
    return peak, mass, energy, peak_step


@triton.jit
def _read(
    logits,
    stride,
    rows,
    columns,
    peak_out,
    mass_out,
    energy_out,
    values_out,
    ids_out,
    k,
    ENERGY: tl.constexpr,  # noqa: N803
    K: tl.constexpr,  # noqa: N803
    LANES: tl.constexpr,  # noqa: N803
    TABLE: tl.constexpr,  # noqa: N803
):
    index = tl.program_id(0).to(tl.int64)
    row = logits + tl.load(rows + index) * stride
    dtype: tl.constexpr = peak_out.dtype.element_ty
    lane = tl.arange(0, LANES)
    peak = tl.full((LANES,), -math.inf, dtype)
    mass = tl.zeros((LANES,), dtype)
    energy = tl.zeros((LANES,), dtype)
    peak_step = tl.zeros((LANES,), tl.int32)
    full_steps = columns // LANES
    for step in range(full_steps):
        x = tl.load(row + step * LANES + lane).to(dtype)
        peak, mass, energy, peak_step = _absorb(x, step, peak, mass, energy, peak_step, ENERGY, K > 0)
    tail = full_steps * LANES + lane
    x = tl.load(row + tail, mask=tail < columns, other=-math.inf).to(dtype)
    peak, mass, energy, peak_step = _absorb(x, full_steps, peak, mass, energy, peak_step, ENERGY, K > 0)

    highest = tl.max(peak, 0)
    shift = peak - highest
    weight = tl.where(peak == -math.inf, 0.0, tl.exp(shift))
    tl.store(peak_out + index, highest)
    tl.store(mass_out + index, tl.sum(mass * weight, 0))
    if ENERGY:
        part = tl.where(weight > 0, weight * (energy + shift * mass), 0.0)
        tl.store(energy_out + index, tl.sum(part, 0))

    if K > 0:
        first = peak_step * LANES + lane
        best = tl.topk(tl.where(first < columns, _keys(peak, first), _NO_KEY), K)
        worst = tl.min(best, 0)
        # The best lanes, and the columns of theirs that are among the best already.
        known = tl.where(best > _NO_KEY, _key_columns(best), columns)
        best_lane = known % LANES
        # A table of the best entries so far, and of some steps of the best lanes below them.
        line = tl.arange(0, TABLE)[:, None]
        for start in range(0, full_steps + 1, TABLE - 1):
            again = (start + line - 1) * LANES + best_lane[None, :]
            wanted = (line > 0) & (again < columns) & (again != known[None, :]) & (known < columns)[None, :]
            entry = tl.load(row + again, mask=wanted, other=-math.inf).to(dtype)
            keys = tl.where(wanted, _keys(entry, again), _NO_KEY)
            if tl.max(tl.max(keys, 1), 0) > worst:
                keys = tl.where(line > 0, keys, best[None, :])
                best = tl.topk(tl.reshape(keys, (TABLE * K,)), K)
                worst = tl.min(best, 0)
        place = tl.arange(0, K)
        exists = best > _NO_KEY
        tl.store(values_out + index * k + place, tl.where(exists, _key_values(best), -math.inf), mask=place < k)
        tl.store(ids_out + index * k + place, tl.where(exists, _key_columns(best), -1).to(tl.int64), mask=place < k)


@triton.jit
def _gradient(x, peak, a, b, SLOPE: tl.constexpr):  # noqa: N803
    shift = x - peak
    factor = a
    if SLOPE:
        factor = a + b * shift
    return tl.where(x == -math.inf, 0.0, tl.exp(shift) * factor)


@triton.jit
def _write_dense(
    out,
    out_stride,
    logits,
    stride,
    place,
    all_columns,
    columns,
    peak_in,
    a_in,
    b_in,
    SLOPE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(place + token)
    target = out + token * out_stride + column
    if index < 0:
        tl.store(target, tl.zeros((BLOCK,), out.dtype.element_ty), mask=column < all_columns)
    else:
        dtype: tl.constexpr = peak_in.dtype.element_ty
        real = column < columns
        x = tl.load(logits + token * stride + column, mask=real, other=-math.inf).to(dtype)
        gradient = _gradient(x, tl.load(peak_in + index), tl.load(a_in + index), tl.load(b_in + index), SLOPE)
        tl.store(target, gradient.to(out.dtype.element_ty), mask=column < all_columns)


@triton.jit
def _write_corrected(
    out,
    out_stride,
    values,
    rows,
    ids,
    corrections,
    entries,
    width,
    columns,
    peak_in,
    a_in,
    b_in,
    SLOPE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = entry < entries
    column = tl.load(ids + entry, mask=real, other=-1)
    real &= (column >= 0) & (column < columns)
    index = entry // width
    token = tl.load(rows + index, mask=real, other=0)
    dtype: tl.constexpr = peak_in.dtype.element_ty
    x = tl.load(values + entry, mask=real, other=-math.inf).to(dtype)
    peak = tl.load(peak_in + index, mask=real, other=0.0)
    a = tl.load(a_in + index, mask=real, other=0.0)
    b = tl.load(b_in + index, mask=real, other=0.0)
    gradient = _gradient(x, peak, a, b, SLOPE) + tl.load(corrections + entry, mask=real, other=0.0).to(dtype)
    tl.store(out + token * out_stride + column, gradient.to(out.dtype.element_ty), mask=real)
