"""Reading and writing logits, in Triton's interpreter (run by ``tests/core/test_kernels.py``)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from verl_troll.core import kernels
from verl_troll.core.kernels import logits_triton as form

INF = math.inf
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Small tiles and groups, so that a row has several tiles and a tile several groups.
WIDE, GROUP, TILE, COLUMNS = 2, 4, 16, 16


@pytest.fixture
def blocks_of_a_gpu() -> None:
    """Keep the real block sizes, which are slow here."""


@pytest.fixture(autouse=True)
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.available(torch.device("cpu"))
    if "blocks_of_a_gpu" not in request.fixturenames:
        monkeypatch.setattr(form, "READ_WIDE", WIDE)
        monkeypatch.setattr(form, "READ_TILE_BYTES", 2 * TILE)
        monkeypatch.setattr(form, "GROUP_COLUMNS", ((kernels.MAX_K, GROUP),))
        monkeypatch.setattr(form, "WRITE_COLUMNS", COLUMNS)


def normal(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def padded(values: Tensor, dtype: torch.dtype, extra: int = 3) -> Tensor:
    """The same values with a row stride above their width; nothing may touch the gap."""
    wide = torch.full((values.shape[0], values.shape[1] + extra), 77.0, dtype=dtype)
    wide[:, : values.shape[1]] = values.to(dtype)
    return wide[:, : values.shape[1]]


# --- reading ----------------------------------------------------------------------------------------------------------


def read(logits: Tensor, rows: Tensor, columns: int, k: int = 0, ids: Tensor | None = None) -> tuple[Tensor, ...]:
    none = torch.empty(rows.shape[0], 0, dtype=torch.int64)
    found = kernels.read_rows(logits, rows, none if ids is None else ids, columns, k=k, energy=True)
    return tuple(part for part in found if part is not None)


def assert_reads(logits: Tensor, rows: Tensor, columns: int, k: int) -> None:
    """Compare with float64."""
    dense = logits[rows, :columns].double()
    highest = dense.amax(-1) if columns > 0 else torch.full((rows.shape[0],), -INF, dtype=torch.float64)
    shift = torch.where(dense > -INF, dense - highest.unsqueeze(-1), 0.0)
    weight = torch.where(dense > -INF, shift.exp(), 0.0)
    ordered, order = dense.sort(dim=-1, descending=True, stable=True)
    missing = max(0, k - columns)
    wanted = torch.randint(-1, columns, (rows.shape[0], 3), generator=torch.Generator().manual_seed(columns))

    peak, mass, energy, values, top_values, top_ids = read(logits, rows, columns, k, wanted)
    assert all(x.dtype == torch.float32 for x in (peak, mass, energy, values, top_values))
    assert top_ids.dtype == torch.int64
    assert torch.equal(peak.double(), highest)
    torch.testing.assert_close(mass.double(), weight.sum(-1), rtol=2e-6, atol=0.0)
    torch.testing.assert_close(energy.double(), (weight * shift).sum(-1), rtol=2e-6, atol=1e-6)
    for row, ids in enumerate(wanted.tolist()):
        assert values[row].tolist() == [float(dense[row, i]) if i >= 0 else 0.0 for i in ids]
    assert torch.equal(top_values.double(), torch.nn.functional.pad(ordered[:, :k], (0, missing), value=-INF))
    assert torch.equal(top_ids, torch.nn.functional.pad(order[:, :k], (0, missing), value=-1))


@by_dtype
@pytest.mark.parametrize("columns", [0, 1, GROUP, TILE, 4 * TILE, 77])
def test_reading(dtype: torch.dtype, columns: int) -> None:
    logits = padded(normal(4, 80), dtype)
    assert_reads(logits, torch.tensor([0, 2]), columns, 3)


@pytest.mark.parametrize("k", [0, 1, 2, 8, 11, 50])
def test_numbers_of_entries(k: int) -> None:
    assert_reads(padded(normal(2, 45), torch.float32), torch.tensor([1]), 43, k)


@by_dtype
def test_reading_more_changes_no_bit(dtype: torch.dtype) -> None:
    logits, rows = normal(4, 45).to(dtype), torch.arange(4)
    everything = read(logits, rows, 45, 3)
    for k in (0, 1, 5):
        assert all(torch.equal(x, y) for x, y in zip(read(logits, rows, 45, k)[:3], everything[:3], strict=True))
    for some in (rows[2:], rows.flip(0), rows[1:2]):
        alone = read(logits[some].contiguous(), torch.arange(len(some)), 45, 3)
        assert all(torch.equal(x, y[some]) for x, y in zip(alone, everything, strict=True))


def test_ids_beyond_the_columns_are_passed_over() -> None:
    logits = normal(1, 40).float()
    values = read(logits, torch.tensor([0]), 37, ids=torch.tensor([[36, 37, 39, 4000, -2]]))[3]
    assert values.tolist() == [[float(logits[0, 36]), 0, 0, 0, 0]]


@by_dtype
def test_equal_logits_go_by_column(dtype: torch.dtype) -> None:
    few = torch.randint(3, (2, 60), generator=torch.Generator().manual_seed(1)).double()
    assert_reads(few.to(dtype), torch.arange(2), 60, 4)
    assert_reads(torch.zeros(1, 60, dtype=dtype), torch.arange(1), 59, 4)
    signed = torch.where(few > 1, 0.0, -0.0)
    assert_reads(signed.to(dtype), torch.arange(2), 60, 4)


@by_dtype
def test_logits_without_mass(dtype: torch.dtype) -> None:
    logits = normal(5, 60)
    logits[0] = -INF
    logits[1, 5:] = -INF
    logits[2, :58] = -INF
    logits[3, ::2] = -INF
    # Some models use this instead of -inf.
    logits[4, ::2] = torch.finfo(dtype).min
    assert_reads(logits.to(dtype), torch.arange(5), 60, 4)


def test_the_smallest_float_is_a_logit() -> None:
    assert_reads(torch.full((1, 60), torch.finfo(torch.float32).min), torch.arange(1), 60, 4)


def test_the_best_entries_share_a_group_or_come_last() -> None:
    logits = normal(4, 10 * TILE, scale=0.1)
    logits[0, 3::TILE] += 5
    logits[1] = torch.arange(10 * TILE) / 7
    logits[2] = -torch.arange(10 * TILE) / 7
    logits[3, 5 * TILE : 5 * TILE + 2 * GROUP] += 5
    assert_reads(logits.float(), torch.arange(4), 10 * TILE, 8)


@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("column", [0, 17, 59])
def test_broken_logits_leave_no_mass_to_trust(bad: float, column: int) -> None:
    logits = normal(1, 60).float()
    logits[0, column] = bad
    for k in (0, 4):
        _, mass, _, _, _, ids = read(logits, torch.tensor([0]), 60, k)
        assert bool(mass.isnan().all()) and bool(((ids >= 0) & (ids < 60)).all())


def test_no_rows() -> None:
    found = kernels.read_rows(
        normal(2, 9).float(),
        torch.tensor([], dtype=torch.int64),
        torch.empty(0, 2, dtype=torch.int64),
        9,
        k=3,
        energy=True,
    )
    assert [tuple(x.shape) for x in found if x is not None] == [(0,), (0,), (0,), (0, 2), (0, 3), (0, 3)]


@settings(max_examples=30, deadline=None, database=None, derandomize=True)
@given(data=st.data())
def test_any_row(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    numbers = st.sampled_from([-INF, -2.0, -0.0, 0.0, 1.0, 1.5, 3e4])
    row = data.draw(st.lists(numbers, min_size=1, max_size=40))
    columns = data.draw(st.integers(0, len(row)))
    k = data.draw(st.integers(0, 6))
    assert_reads(torch.tensor([row], dtype=dtype), torch.tensor([0]), columns, k)


@pytest.mark.usefixtures("blocks_of_a_gpu")
def test_reading_with_the_blocks_of_a_gpu() -> None:
    assert_reads(normal(1, 9000).bfloat16(), torch.tensor([0]), 8900, 2)
    assert_reads(normal(1, 700).float(), torch.tensor([0]), 700, 70)
    assert_reads(normal(1, 700).float(), torch.tensor([0]), 700, 300)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=1025), "k must lie between 0 and 1024, got 1025"),
        (dict(k=-1), "k must lie"),
        (dict(columns=10), "columns must lie between 0 and 9, got 10"),
        (dict(logits=torch.zeros(9, 4).T), "contiguous in the last dimension"),
        (dict(logits=torch.zeros(4, 9, dtype=torch.int32)), "float32, bfloat16 or float16"),
        (dict(logits=torch.zeros(4, 9, dtype=torch.float64)), "float32, bfloat16 or float16"),
    ],
)
def test_reading_refuses(change: dict[str, object], message: str) -> None:
    ids = torch.zeros(1, 1, dtype=torch.int64)
    arguments = dict(logits=torch.zeros(4, 9), rows=torch.tensor([0]), ids=ids, columns=9, k=0) | change
    with pytest.raises(ValueError, match=message):
        form.read_rows(**arguments)  # type: ignore[arg-type]


# --- writing ----------------------------------------------------------------------------------------------------------


class Case:
    """A gradient to write, and its exact value."""

    def __init__(self, dtype: torch.dtype, *, columns: int = 43, width: int = 5, slope: bool = True) -> None:
        self.logits = padded(normal(6, 50), dtype)
        self.logits[1, 3] = -INF
        self.logits[4] = -INF
        self.rows, self.columns = torch.tensor([1, 2, 4]), columns
        dense = self.logits[self.rows].double()
        self.peak = dense.amax(-1).float()
        self.a, self.b = (normal(3, seed=seed).float() for seed in (1, 2))
        order = [
            torch.randperm(max(columns, width), generator=torch.Generator().manual_seed(i))[:width] for i in range(3)
        ]
        self.ids = torch.stack(order) if columns > 0 else torch.full((3, width), -1)
        self.ids[0, : width // 2] = -1
        shift = torch.where(dense > -INF, dense - self.peak.double().unsqueeze(-1), 0.0)
        self.slope = self.b if slope else None
        factor = self.a.double().unsqueeze(-1) + (self.b.double().unsqueeze(-1) * shift if slope else 0)
        values = torch.where(dense > -INF, shift.exp() * factor, 0.0)
        # The corrections nearly cancel, so rounding before the sum would be far off.
        at = values.gather(-1, self.ids.clamp_min(0))
        self.corrections = (-at + 1e-3 * normal(3, width, seed=3)).float()
        self.exact = torch.zeros(6, 50, dtype=torch.float64)
        corrected = values.scatter_add(
            -1, self.ids.clamp_min(0), torch.where(self.ids >= 0, self.corrections.double(), 0)
        )
        self.exact[self.rows, :columns] = corrected[:, :columns]
        self.size = torch.zeros_like(self.exact)
        self.size[self.rows] = values.abs()

    def write(self, out: Tensor) -> None:
        kernels.write_gradient(
            out, self.logits, self.rows, self.columns, self.peak, self.a, self.slope, self.ids, self.corrections
        )

    def check(self, out: Tensor) -> None:
        """Allow one rounding of the exact value plus the working precision's error."""
        lost = 2e-6 * self.size
        # The interpreter truncates float32 to bfloat16; the compile tests check that compiled code rounds.
        cut = out.dtype == torch.bfloat16
        once = self.exact.abs() * 2**-7 if cut else (self.exact.to(out.dtype).double() - self.exact).abs()
        error = (out.double() - self.exact).abs()
        assert bool((error <= once * (1 + 1e-3) + lost).all())
        assert bool((out[self.exact == 0] == 0).all())


@by_dtype
@pytest.mark.parametrize("slope", [False, True], ids=["flat", "slope"])
def test_writing(dtype: torch.dtype, slope: bool) -> None:
    case = Case(dtype, slope=slope)
    before = case.logits.clone()
    out = padded(torch.full((6, 50), math.nan), dtype, extra=5)
    case.write(out)
    case.check(out)
    assert torch.equal(case.logits, before)
    assert out._base is not None and bool((out._base[:, 50:] == 77).all())


@by_dtype
def test_writing_over_the_logits(dtype: torch.dtype) -> None:
    case = Case(dtype)
    apart = torch.empty_like(case.logits)
    case.write(apart)
    case.write(case.logits)
    assert torch.equal(case.logits, apart)
    case.check(case.logits)
    assert case.logits._base is not None and bool((case.logits._base[:, 50:] == 77).all())


@pytest.mark.parametrize(("columns", "width"), [(43, 0), (43, 1), (50, 5), (16, 16), (1, 1), (0, 5), (0, 0)])
def test_writing_few_columns_or_corrections(columns: int, width: int) -> None:
    case = Case(torch.bfloat16, columns=columns, width=width)
    out = torch.full((6, 50), math.nan, dtype=torch.bfloat16)
    case.write(out)
    case.check(out)


def test_writing_no_rows() -> None:
    case = Case(torch.float32)
    case.rows, case.peak, case.a, case.slope = case.rows[:0], case.peak[:0], case.a[:0], None
    case.ids, case.corrections = case.ids[:0], case.corrections[:0]
    case.write(case.logits)
    assert bool((case.logits == 0).all())


def test_autograd_notices_overwritten_logits() -> None:
    case = Case(torch.float32)
    leaf = torch.ones((), requires_grad=True)
    kept = (leaf * case.logits.masked_fill(case.logits == -INF, 0.0)).exp()
    case.logits = kept.detach()
    case.write(case.logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(kept.sum())


def test_writing_to_no_tokens() -> None:
    none = torch.zeros(0, 9)
    ids = torch.zeros(0, 2, dtype=torch.int64)
    kernels.write_gradient(none, none, ids[:, 0], 9, none[:, 0], none[:, 0], None, ids, none[:, :2])


@pytest.mark.usefixtures("blocks_of_a_gpu")
def test_writing_with_the_blocks_of_a_gpu() -> None:
    case = Case(torch.bfloat16)
    case.write(case.logits)
    case.check(case.logits)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("out", [torch.zeros(6, 49), torch.zeros(6, 50, dtype=torch.float16), torch.zeros(50, 6).T])
def test_writing_refuses_another_form_of_out(out: Tensor) -> None:
    with pytest.raises(ValueError, match="out must be"):
        Case(torch.float32).write(out)
