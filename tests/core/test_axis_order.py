"""Axis orders: closed forms against torch's permute, both ways, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from permattn.core.axis_order import (
    AXIS_ORDERS,
    candidate_orders,
    cells_in_order,
    places_in_order,
)

GRIDS = [(13, 30, 45), (21, 45, 80), (1, 64, 64), (5, 9, 10), (1, 1, 1)]


def by_permute(grid: tuple[int, int, int], name: str) -> torch.Tensor:
    """The order as a nested loop over axes would read it."""
    cells = torch.arange(grid[0] * grid[1] * grid[2]).view(grid)
    return cells.permute(tuple("FHW".index(axis) for axis in name)).reshape(-1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("order", range(len(AXIS_ORDERS)), ids=AXIS_ORDERS)
def test_round_trip_is_exact(grid, order):
    number = torch.tensor([order])
    cells, places = cells_in_order(grid, number)[0], places_in_order(grid, number)[0]
    assert torch.equal(cells.long(), by_permute(grid, AXIS_ORDERS[order]))
    every = torch.arange(len(cells), dtype=torch.int32)
    assert torch.equal(places[cells.long()], every)
    assert torch.equal(cells[places.long()], every)
    x = torch.randn(len(cells), 3)
    assert torch.equal(x[cells.long()][places.long()], x)


@given(
    grid=st.tuples(*[st.integers(1, 7)] * 3),
    orders=st.lists(st.integers(0, 5), min_size=1, max_size=6),
)
def test_all_heads_at_once_equal_one_by_one(grid, orders):
    heads = torch.tensor(orders, dtype=torch.uint8)
    for found, order in zip(cells_in_order(grid, heads), orders, strict=True):
        assert torch.equal(found.long(), by_permute(grid, AXIS_ORDERS[order]))


@pytest.mark.parametrize(
    ("grid", "want"),
    [
        ((5, 9, 10), (0, 1, 2, 3, 4, 5)),
        ((1, 64, 64), (0, 1)),
        ((7, 1, 4), (0, 2)),
        ((7, 4, 1), (0, 2)),
        ((1, 1, 9), (0,)),
        ((1, 1, 1), (0,)),
    ],
    ids=str,
)
def test_candidates_are_the_orders_that_differ(grid, want):
    assert candidate_orders(grid) == want
    read = {tuple(by_permute(grid, name).tolist()) for name in AXIS_ORDERS}
    assert {tuple(by_permute(grid, AXIS_ORDERS[n]).tolist()) for n in want} == read
