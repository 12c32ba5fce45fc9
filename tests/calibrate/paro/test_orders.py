"""Order choice: on constructed heads the chosen order loses next to nothing."""

from __future__ import annotations

import pytest
import torch
from permattn.block_mass import BlockMass
from permattn.calibrate.paro.options import MeasureOptions
from permattn.calibrate.paro.orders import (
    choose_orders,
    measure_orders,
    order_terms,
    orders_of,
    sampled_blocks,
)
from permattn.core import TokenGrid

from .fakes import local_head, widths_of

GRID = TokenGrid(0, 32, 8, 8)
SIZES = (32, 8, 8)


@pytest.fixture(scope="module")
def heads() -> tuple[torch.Tensor, torch.Tensor]:
    """40 heads that aggregate along axes of their own, q = k, and their lse."""
    q = torch.stack([local_head(SIZES, widths_of(SIZES, h % 6), h) for h in range(40)])[None]
    return q, ((q @ q.mT) * 64**-0.5).logsumexp(-1)


@pytest.fixture(scope="module")
def lost(heads) -> torch.Tensor:
    """float64 [orders, heads]: mass lost at 30 % density, on all query blocks."""
    options = MeasureOptions(density=0.3, order_stride=1)
    return measure_orders(*(heads[0], heads[0], heads[1]), GRID, options)[:, 0]


@pytest.fixture(scope="module")
def terms(heads) -> torch.Tensor:
    """Of the default metric, on sampled query blocks."""
    return measure_orders(*(heads[0], heads[0], heads[1]), GRID, MeasureOptions(density=0.3))


def loss_of(lost: torch.Tensor, terms: torch.Tensor, alpha: float) -> torch.Tensor:
    chosen = choose_orders(terms, orders_of(GRID, MeasureOptions()), alpha)
    return lost[chosen.long(), torch.arange(terms.shape[-1])]


def test_the_chosen_order_loses_a_hundredth_where_the_raster_loses_a_tenth(lost, terms):
    assert float(lost[0].mean()) > 0.1
    found = loss_of(lost, terms, 0.5)
    assert float(found.max()) <= 0.01
    assert float((found - lost.min(0).values).max()) <= 0.002


def test_incoherence_alone_is_a_choice(lost, terms):
    assert float(loss_of(lost, terms, 0.0).max()) <= 0.02


def test_the_papers_metric_beats_the_raster(heads, lost):
    q, lse = heads[0][:, :12], heads[1][:, :12]
    paper = measure_orders(*(q, q, lse), GRID, MeasureOptions(metric="paper"))
    found = loss_of(lost, paper, 0.5)
    assert float(found.mean()) < 0.5 * float(lost[0, :12].mean())


def test_terms_of_a_map_by_hand():
    """Two by two blocks of one head, 4 pairs each: the numbers of both metrics."""
    sums = torch.tensor([[[[0.9, 0.1], [0.4, 0.6]]]])
    maxima = torch.tensor([[[[0.5, 0.1], [0.1, 0.3]]]])
    small = torch.tensor([[[[0.0, 3.0], [4.0, 0.0]]]])
    mass, pairs = BlockMass(sums, maxima, small), torch.full((2, 2), 4)
    ours = order_terms(mass, pairs, 2, MeasureOptions(density=0.5))
    # 0.9 and 0.6 are kept; incoherence is (0.5 + 0.1 + 0.1 + 0.3) * 4 over a mass of 2.
    torch.testing.assert_close(ours[:, 0, 0], torch.tensor([0.25, 2.0]).double())
    options = MeasureOptions(metric="paper", sparse_share=0.75)
    paper = order_terms(mass, pairs, 2, options)
    mean = (0.5 * 4 / 0.9 + 4 + 1 + 2) / 4
    torch.testing.assert_close(paper[:, 0, 0], torch.tensor([0.5, mean]).double())


def test_equals_go_to_the_lower_number():
    terms = torch.ones(4, 2, 3, dtype=torch.double)
    assert choose_orders(terms, (0, 2, 4, 6), 0.5).tolist() == [0, 0, 0]
    terms[2, :, 1] = 0.5
    terms[3, :, 1] = 0.5 * (1 + 1e-9)
    assert choose_orders(terms, (0, 2, 4, 6), 0.5).tolist() == [0, 4, 0]
    assert choose_orders(terms * 0.0, (0, 2, 4, 6), 0.5).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("grid", "native", "want"),
    [
        ((4, 5, 6), False, (0, 1, 2, 3, 4, 5)),
        ((1, 5, 6), False, (0, 1)),
        ((1, 1, 6), False, (0,)),
        ((1, 5, 6), True, (0, 1, 6)),
    ],
    ids=["video", "image", "line", "native"],
)
def test_candidates(grid, native, want):
    cells = torch.arange(grid[0] * grid[1] * grid[2]) if native else None
    assert len(orders_of(TokenGrid(0, *grid), MeasureOptions(native_cells=cells))) == len(want)


def test_query_blocks_are_sampled_evenly_and_never_too_few():
    assert sampled_blocks(64 * 1000, MeasureOptions()).tolist() == list(range(3, 1000, 8))
    assert len(sampled_blocks(64 * 40, MeasureOptions())) == 20
    assert sampled_blocks(10, MeasureOptions()).tolist() == [0]
