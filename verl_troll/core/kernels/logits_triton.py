# mypy: disable-error-code="no-untyped-def"
"""Reading and writing ``[tokens, columns]`` logits once. See :mod:`verl_troll.core.kernels` for the contracts.

**Reading.** One program per row streams its columns in tiles of ``lanes x wide``. A lane keeps its own maximum, sum and
energy, and rescales them once per tile, so lanes exchange nothing before the row ends. If the largest logits are
requested, the maximum of every group of consecutive columns is stored too.

**Searching.** The k largest logits, by value and then by lower column, lie in the k groups with the largest maxima. A
second kernel finds these groups by bisection on the bits of the values, then the k largest logits in them in the same
way. It reads 1 to 3 % of the row again.

**Writing.** One program per row. Logits that get a correction are read before the dense pass can overwrite them,
and stored after it; barriers inside the program order the three steps.
"""

from __future__ import annotations

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from verl_troll.core.kernels import MAX_K

# Bytes per tile, and columns per lane: 16 bytes of half precision, one load of a thread.
READ_TILE_BYTES = 8192
READ_WIDE = 8
# Sums must have the same bits whatever else is read; with fusion, the compiler's choices would depend on it.
READ_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
READ_STAGES = 3
# Columns per group for k up to a limit: fewer for larger k, to get about as many groups as candidates.
GROUP_COLUMNS = ((64, 64), (256, 32), (MAX_K, 16))
# Groups or candidates per warp of a searching program.
SEARCHED_PER_WARP = 1024
SEARCH_OPTIONS: dict[str, int | bool] = {"enable_fp_fusion": False}
if torch.version.hip is None:
    # More programs per multiprocessor outweigh a few spilled registers: they save 7 % of the time on an H200.
    SEARCH_OPTIONS["maxnreg"] = 96
# Columns that a writing program holds at a time, and its number of warps.
WRITE_COLUMNS = 8192
WRITE_OPTIONS = {"num_warps": 16, "enable_fp_fusion": True}

_LOG2_E = tl.constexpr(math.log2(math.e))
# Lowest float32: the maximum of a lane that has seen nothing yet, because -inf minus -inf would be NaN.
_LOWEST = tl.constexpr(-3.4028234663852886e38)
# Below this shift a weight is 0 in float32, and so is its product with the shift.
_LEAST_SHIFT = tl.constexpr(-1e4)
# Key of unused lanes: below all others.
_NO_KEY = tl.constexpr(-(2**31))
_NO_ENTRY = tl.constexpr(-(2**63))
# Low bits of a float32 key that are the same for all numbers of the dtype.
_IDLE_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


def read_rows(
    logits: Tensor, rows: Tensor, ids: Tensor, columns: int, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`verl_troll.core.kernels.read_rows`."""
    _check_logits(logits, columns)
    if not 0 <= k <= MAX_K:
        raise ValueError(f"k must lie between 0 and {MAX_K}, got {k!r}")
    count, width = ids.shape
    device = logits.device
    max_logit, sumexp, energy = (torch.empty(count, dtype=torch.float32, device=device) for _ in range(3))
    values = torch.empty(count, width, dtype=torch.float32, device=device)
    top_values = torch.empty(count, k, dtype=torch.float32, device=device)
    top_ids = torch.empty(count, k, dtype=torch.int64, device=device)
    if count == 0:
        return max_logit, sumexp, energy, values, top_values, top_ids
    group = group_columns(k)
    groups = triton.cdiv(max(columns, 1), group)
    maxima = torch.empty(count, groups if k > 0 else 0, dtype=logits.dtype, device=device)
    rows, ids = rows.contiguous(), ids.contiguous()
    lanes = max(group // READ_WIDE, READ_TILE_BYTES // (READ_WIDE * logits.element_size()))
    with on_device(logits):
        _read[(count,)](
            logits,
            logits.stride(0),
            rows,
            columns,
            ids,
            width,
            max_logit,
            sumexp,
            energy,
            values,
            maxima,
            groups,
            TOP=k > 0,
            LANES=lanes,
            WIDE=READ_WIDE,
            GROUP=group,
            IDS=triton.next_power_of_2(max(width, 1)),
            STAGES=READ_STAGES,
            **READ_OPTIONS,
        )
        if k > 0:
            searched = triton.next_power_of_2(max(groups, k * group))
            _search[(count,)](
                logits,
                logits.stride(0),
                rows,
                columns,
                maxima,
                groups,
                top_values,
                top_ids,
                k,
                K=triton.next_power_of_2(k),
                GROUP=group,
                GROUPS=triton.next_power_of_2(groups),
                IDLE_BITS=_IDLE_BITS[logits.dtype],
                num_warps=min(16, max(1, searched // SEARCHED_PER_WARP)),
                **SEARCH_OPTIONS,
            )
    return max_logit, sumexp, energy, values, top_values, top_ids


def group_columns(k: int) -> int:
    """Columns per group when the ``k`` largest logits are requested."""
    return next(columns for most, columns in GROUP_COLUMNS if k <= most)


def write_gradient(
    out: Tensor,
    logits: Tensor,
    rows: Tensor,
    columns: int,
    max_logit: Tensor,
    a: Tensor,
    b: Tensor | None,
    ids: Tensor,
    corrections: Tensor,
) -> None:
    """See :func:`verl_troll.core.kernels.write_gradient`."""
    _check_logits(logits, columns)
    if out.shape != logits.shape or out.dtype != logits.dtype or (out.shape[-1] > 1 and out.stride(-1) != 1):
        raise ValueError(
            f"out must be contiguous in the last dimension, of shape {tuple(logits.shape)} and {logits.dtype}, got "
            f"{tuple(out.shape)}, strides {out.stride()}, {out.dtype}"
        )
    if out.numel() == 0:
        return
    count, width = ids.shape
    # Index into ``rows`` of each token, -1 for the others.
    index_of_token = torch.full((logits.shape[0],), -1, dtype=torch.int32, device=logits.device)
    index_of_token[rows] = torch.arange(count, dtype=torch.int32, device=logits.device)
    max_logit, a, ids, corrections = (x.contiguous() for x in (max_logit, a, ids, corrections))
    with on_device(logits):
        _write[(logits.shape[0],)](
            out,
            out.stride(0),
            logits,
            logits.stride(0),
            index_of_token,
            logits.shape[1],
            columns,
            max_logit,
            a,
            a if b is None else b.contiguous(),
            ids,
            corrections,
            width,
            SLOPE=b is not None,
            IDS=triton.next_power_of_2(max(width, 1)),
            BLOCK=WRITE_COLUMNS,
            **WRITE_OPTIONS,
        )
    # autograd does not see what a kernel writes; if another backward pass needs the logits, it must raise.
    torch.autograd.graph.increment_version(out)


def _check_logits(logits: Tensor, columns: int) -> None:
    if logits.ndim != 2 or logits.dtype not in _IDLE_BITS or (logits.shape[1] > 1 and logits.stride(1) != 1):
        raise ValueError(
            "logits must be a float32, bfloat16 or float16 matrix that is contiguous in the last dimension, got "
            f"{tuple(logits.shape)}, strides {logits.stride()}, {logits.dtype}"
        )
    if not 0 <= columns <= logits.shape[1]:
        raise ValueError(f"columns must lie between 0 and {logits.shape[1]}, got {columns!r}")


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's device current, since Triton launches there."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


@triton.jit
def _absorb(x, max_logit, sumexp, energy):
    """Each lane's state after one more tile ``x [lanes, wide]``, and the tile's largest entry in each lane."""
    best = tl.max(x, 1)
    new = tl.maximum(max_logit, best)
    moved = max_logit - new
    scale = tl.exp2(moved * _LOG2_E)
    shift = x - new[:, None]
    weight = tl.exp2(shift * _LOG2_E)
    energy = scale * (energy + tl.maximum(moved, _LEAST_SHIFT) * sumexp)
    energy += tl.sum(weight * tl.maximum(shift, _LEAST_SHIFT), 1)
    sumexp = sumexp * scale + tl.sum(weight, 1)
    return best, new, sumexp, energy


@triton.jit
def _read(
    logits,
    stride,
    rows,
    columns,
    ids,
    width,
    max_logit_out,
    sumexp_out,
    energy_out,
    values_out,
    maxima_out,
    groups,
    TOP: tl.constexpr,  # noqa: N803
    LANES: tl.constexpr,  # noqa: N803
    WIDE: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    IDS: tl.constexpr,  # noqa: N803
    STAGES: tl.constexpr,  # noqa: N803
):
    index = tl.program_id(0).to(tl.int64)
    row = logits + tl.load(rows + index) * stride
    lane = tl.arange(0, LANES)
    column = lane[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
    max_logit = tl.full((LANES,), _LOWEST, tl.float32)
    sumexp = tl.zeros((LANES,), tl.float32)
    energy = tl.zeros((LANES,), tl.float32)
    LANES_PER_GROUP: tl.constexpr = GROUP // WIDE  # noqa: N806
    GROUPS_PER_TILE: tl.constexpr = LANES // LANES_PER_GROUP  # noqa: N806
    maxima = maxima_out + index * groups
    group = tl.arange(0, GROUPS_PER_TILE)
    full_tiles = columns // (LANES * WIDE)
    for tile in tl.range(full_tiles, num_stages=STAGES):
        x = tl.load(row + tile * (LANES * WIDE) + column).to(tl.float32)
        best, max_logit, sumexp, energy = _absorb(x, max_logit, sumexp, energy)
        if TOP:
            largest = tl.max(tl.reshape(best, (GROUPS_PER_TILE, LANES_PER_GROUP)), 1)
            tl.store(maxima + tile * GROUPS_PER_TILE + group, largest.to(maxima_out.dtype.element_ty))
    rest = full_tiles * (LANES * WIDE) + column
    x = tl.load(row + rest, mask=rest < columns, other=-math.inf).to(tl.float32)
    best, max_logit, sumexp, energy = _absorb(x, max_logit, sumexp, energy)
    if TOP:
        largest = tl.max(tl.reshape(best, (GROUPS_PER_TILE, LANES_PER_GROUP)), 1)
        group += full_tiles * GROUPS_PER_TILE
        tl.store(maxima + group, largest.to(maxima_out.dtype.element_ty), mask=group < groups)

    highest = tl.max(max_logit, 0)
    moved = max_logit - highest
    scale = tl.exp2(moved * _LOG2_E)
    total = tl.sum(sumexp * scale, 0)
    # Lanes that saw no finite logit still have the initial maximum, and a sum of 0.
    tl.store(max_logit_out + index, tl.where((highest == _LOWEST) & (total == 0), -math.inf, highest))
    tl.store(sumexp_out + index, total)
    tl.store(energy_out + index, tl.sum(scale * (energy + tl.maximum(moved, _LEAST_SHIFT) * sumexp), 0))

    item = tl.arange(0, IDS)
    wanted = tl.load(ids + index * width + item, mask=item < width, other=-1)
    value = tl.load(row + wanted, mask=(wanted >= 0) & (wanted < columns), other=0.0).to(tl.float32)
    tl.store(values_out + index * width + item, value, mask=item < width)


@triton.jit
def _keys(x):
    """int32 keys in the order of float32 ``x``; -0.0 equals 0.0, and NaN sorts first."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _threshold(keys, wanted, low, high):
    """The largest key that at least ``wanted`` of ``keys`` reach, or any key that exactly ``wanted`` reach.

    At least ``wanted`` keys reach ``low``, and none exceeds ``high``; both int64.
    """
    while low < high:
        middle = (low + high + 1) >> 1
        reached = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32))
        low = tl.where(reached >= wanted, middle, low)
        high = tl.where(reached > wanted, high, tl.where(reached == wanted, middle, middle - 1))
    return low.to(tl.int32)


@triton.jit
def _counts(keys, threshold):
    """1 for each key above the threshold, 1 << 16 for each key equal to it."""
    return (keys > threshold).to(tl.int32) + ((keys == threshold).to(tl.int32) << 16)


@triton.jit
def _choose(keys, threshold, wanted, seen):
    """Which keys are the ``wanted`` largest (the first of equal ones), and how many chosen ones precede each.

    ``seen`` is the cumulative sum of :func:`_counts`.
    """
    missing = wanted - tl.sum((keys > threshold).to(tl.int32))
    equal_seen = seen >> 16
    chosen = (keys > threshold) | ((keys == threshold) & (equal_seen <= missing))
    return chosen, (seen & 0xFFFF) + tl.minimum(equal_seen, missing) - 1


@triton.jit
def _search(
    logits,
    stride,
    rows,
    columns,
    maxima,
    groups,
    values_out,
    ids_out,
    k,
    K: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    GROUPS: tl.constexpr,  # noqa: N803
    IDLE_BITS: tl.constexpr,  # noqa: N803
):
    index = tl.program_id(0).to(tl.int64)
    row = logits + tl.load(rows + index) * stride
    ids = ids_out + index * k
    # Until the result is written, its memory holds first the chosen groups, then the chosen columns.
    chosen_out = ids.to(tl.pointer_type(tl.int32), bitcast=True)

    group = tl.arange(0, GROUPS)
    real = group < groups
    largest = tl.load(maxima + index * groups + group, mask=real, other=-math.inf).to(tl.float32)
    keys = tl.where(real, _keys(largest) >> IDLE_BITS, _NO_KEY)
    wanted = tl.minimum(k, groups)
    lowest = tl.min(tl.where(real, keys, 0x7FFFFFFF)).to(tl.int64)
    threshold = _threshold(keys, wanted, lowest, tl.max(keys).to(tl.int64))
    chosen, before = _choose(keys, threshold, wanted, tl.cumsum(_counts(keys, threshold), 0))
    tl.store(chosen_out + before, group, mask=chosen)
    tl.debug_barrier()

    item = tl.arange(0, K)
    own_group = tl.load(chosen_out + item, mask=item < wanted, other=0)
    column = own_group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    real = (item < wanted)[:, None] & (column < columns)
    x = tl.load(row + column, mask=real, other=-math.inf).to(tl.float32)
    keys = tl.where(real, _keys(x) >> IDLE_BITS, _NO_KEY)
    # Each of the k groups has a logit that reaches their threshold, and few other logits do: all of these are sorted.
    # If there is no room for all, the threshold is raised to that of the k-th logit.
    found = tl.minimum(k, columns)
    lowest = tl.min(tl.where(real, keys, 0x7FFFFFFF)).to(tl.int64)
    low = tl.where(wanted == k, threshold.to(tl.int64), lowest)
    reached = tl.sum((keys >= low.to(tl.int32)).to(tl.int32))
    few = reached <= 2 * k
    threshold = _threshold(keys, found, low, tl.where(few, low, tl.max(keys).to(tl.int64)))
    taken = tl.where(few, reached, found)
    counts = _counts(keys, threshold)
    in_group = tl.sum(counts, 1)
    seen = tl.cumsum(counts, 1) + (tl.cumsum(in_group, 0) - in_group)[:, None]
    chosen, before = _choose(keys, threshold, taken, seen)
    tl.debug_barrier()
    tl.store(chosen_out + before, column, mask=chosen)
    tl.debug_barrier()

    item = tl.arange(0, 2 * K)
    column = tl.load(chosen_out + item, mask=item < taken, other=0)
    x = tl.load(row + column, mask=item < taken, other=-math.inf).to(tl.float32)
    # An entry is the key, then the inverted column.
    entry = (_keys(x).to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)
    best = tl.sort(tl.where(item < taken, entry, _NO_ENTRY), descending=True)
    bits = (best >> 32).to(tl.int32)
    value = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
    tl.debug_barrier()
    tl.store(values_out + index * k + item, tl.where(item < found, value, -math.inf), mask=item < k)
    tl.store(ids + item, tl.where(item < found, 0x7FFFFFFF - (best & 0x7FFFFFFF), -1), mask=item < k)


@triton.jit
def _gradient(x, max_logit, a, b, SLOPE: tl.constexpr):  # noqa: N803
    shift = tl.maximum(x - max_logit, _LEAST_SHIFT)
    weight = tl.exp2(shift * _LOG2_E)
    if SLOPE:
        return weight * (a + b * shift)
    return weight * a


@triton.jit
def _write(
    out,
    out_stride,
    logits,
    stride,
    index_of_token,
    all_columns,
    columns,
    max_logit_in,
    a_in,
    b_in,
    ids,
    corrections,
    width,
    SLOPE: tl.constexpr,  # noqa: N803
    IDS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    token = tl.program_id(0).to(tl.int64)
    index = tl.load(index_of_token + token).to(tl.int64)
    row = logits + token * stride
    target = out + token * out_stride
    dtype: tl.constexpr = out.dtype.element_ty
    lane = tl.arange(0, BLOCK)
    if index < 0:
        for start in range(0, all_columns, BLOCK):
            tl.store(target + start + lane, tl.zeros((BLOCK,), dtype), mask=start + lane < all_columns)
    else:
        max_logit = tl.load(max_logit_in + index)
        max_logit = tl.where(max_logit == -math.inf, 0.0, max_logit)
        a = tl.load(a_in + index)
        b = tl.load(b_in + index)
        entry = tl.arange(0, IDS)
        corrected = tl.load(ids + index * width + entry, mask=entry < width, other=-1)
        mine = (corrected >= 0) & (corrected < columns)
        there = tl.load(row + corrected, mask=mine, other=-math.inf).to(tl.float32)
        correction = tl.load(corrections + index * width + entry, mask=mine, other=0.0)
        total = _gradient(there, max_logit, a, b, SLOPE) + correction
        tl.debug_barrier()
        for start in range(0, columns, BLOCK):
            here = start + lane < columns
            x = tl.load(row + start + lane, mask=here, other=-math.inf).to(tl.float32)
            tl.store(target + start + lane, _gradient(x, max_logit, a, b, SLOPE).to(dtype), mask=here)
        for start in range(columns, all_columns, BLOCK):
            tl.store(target + start + lane, tl.zeros((BLOCK,), dtype), mask=start + lane < all_columns)
        tl.debug_barrier()
        tl.store(target + corrected, total.to(dtype), mask=mine)
