"""Mapping from tokens to rows of logits: packed, padded, and split over ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.launch import run_ranks
from verl_troll.plugin.layout import TokenLayout

# Two sequences of 3 and 2 tokens in rows of 4.
PADDED = TokenLayout(torch.tensor([0, 1, 2, 4, 5]), (2, 4), None)
PACKED = TokenLayout(torch.arange(5), (1, 5), None)
by_layout = pytest.mark.parametrize("layout", [PACKED, PADDED], ids=["packed", "padded"])


@by_layout
def test_where_one_rank_has_all_tokens_every_position_is_local(layout: TokenLayout) -> None:
    positions = torch.tensor([4, 0, 3])
    here, rows = layout.local(positions)
    assert here.tolist() == [0, 1, 2]
    assert rows.tolist() == {PACKED.shape: [4, 0, 3], PADDED.shape: [5, 0, 4]}[layout.shape]
    assert here.dtype == rows.dtype == torch.int64


@by_layout
def test_no_positions_give_no_rows(layout: TokenLayout) -> None:
    here, rows = layout.local(torch.empty(0, dtype=torch.int64))
    assert here.shape == rows.shape == (0,)
    assert not bool(layout.spread(rows, torch.empty(0)).any())


def test_values_are_spread_over_the_shape_of_the_logits_with_zeros_between() -> None:
    _, rows = PADDED.local(torch.tensor([4, 0, 3]))
    assert PADDED.spread(rows, torch.tensor([4.0, 1.0, 3.0])).tolist() == [[1, 0, 0, 0], [3, 4, 0, 0]]
    assert PACKED.spread(torch.tensor([4, 0, 3]), torch.tensor([4.0, 1.0, 3.0])).tolist() == [[1, 0, 0, 3, 4]]


@by_layout
def test_each_value_gets_the_gradient_of_its_own_position(layout: TokenLayout) -> None:
    _, rows = layout.local(torch.tensor([4, 0, 3]))
    values = torch.tensor([4.0, 1.0, 3.0], requires_grad=True)
    weights = torch.arange(float(layout.shape[0] * layout.shape[1])).view(layout.shape)
    (gradient,) = torch.autograd.grad((layout.spread(rows, values) * weights).sum(), values)
    assert gradient.tolist() == weights.flatten()[rows].tolist()


@by_layout
def test_without_a_group_nothing_is_gathered(layout: TokenLayout) -> None:
    values = torch.tensor([[1, -2], [3, 4]], dtype=torch.int32)
    assert layout.gather(torch.arange(2), values, 2) is values


# Positions 0, 1 and 6 lie on the first rank, whose last row is padding; the rest on the second.
SHARED = ([0, 1, -1, -1, -1, -1, 2], [-1, -1, 0, 1, 2, 3, -1])
BITS = torch.tensor([-1.5, 0.25, -0.0, -3e38]).view(torch.int32)


def share(positions: list[int]) -> dict[str, list[object]]:
    """The positions that one rank finds, and what the ranks gather."""
    layout = TokenLayout(torch.tensor(SHARED[dist.get_rank()]), (1, 4), dist.group.WORLD)
    here, rows = layout.local(torch.tensor(positions, dtype=torch.int64))
    # Float bits, which the old pass gathers; most are negative as integers.
    whole = torch.stack([10 * torch.tensor(positions, dtype=torch.int32), BITS[: len(positions)]], dim=-1)
    gathered: Tensor = layout.gather(here, whole[here], len(positions))
    assert torch.equal(gathered, whole)
    assert gathered.dtype == torch.int32
    spread = layout.spread(rows, 1.0 + here)
    return {"here": here.tolist(), "rows": rows.tolist(), "spread": spread.tolist()}


def shares() -> list[dict[str, list[object]]]:
    return [share(positions) for positions in ([6, 3, 1, 4], [5, 2], [])]


def test_ranks_that_share_the_tokens_bring_their_own_and_gather_all() -> None:
    first, second = run_ranks(shares, 2)
    assert first == [
        {"here": [0, 2], "rows": [2, 1], "spread": [[0, 3, 1, 0]]},
        {"here": [], "rows": [], "spread": [[0, 0, 0, 0]]},
        {"here": [], "rows": [], "spread": [[0, 0, 0, 0]]},
    ]
    assert second == [
        {"here": [1, 3], "rows": [1, 2], "spread": [[0, 2, 4, 0]]},
        {"here": [0, 1], "rows": [3, 0], "spread": [[2, 0, 0, 1]]},
        {"here": [], "rows": [], "spread": [[0, 0, 0, 0]]},
    ]
