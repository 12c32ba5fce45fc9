"""Regions: closed forms, means, stable picks and the reverse graph, against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from permattn.core.regions import (
    RegionGrid,
    empty_region_out,
    region_means,
    reverse_graph,
    top_regions,
)

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))
BOXES = st.tuples(st.integers(1, 5), st.integers(1, 10), st.integers(1, 10))


def token_by_loops(grid: RegionGrid) -> list[int]:
    """Region-major tokens, read off nested loops."""
    (nt, nh, nw), (t, h, w), (frames, height, width) = grid.counts, grid.box, grid.size
    found = []
    for rt in range(nt):
        for ry in range(nh):
            for rx in range(nw):
                for z in range(rt * t, rt * t + t):
                    for y in range(ry * h, ry * h + h):
                        for x in range(rx * w, rx * w + w):
                            inside = z < frames and y < height and x < width
                            found.append((z * height + y) * width + x if inside else -1)
    return found


@settings(deadline=None, max_examples=60)
@given(size=SIZES, box=BOXES)
def test_tokens_of_slots(size, box):
    grid = RegionGrid(size, box)
    token = grid.token_of_slot()
    assert token.dtype == torch.int32 and token.tolist() == token_by_loops(grid)
    assert len(token) == grid.num_regions * grid.tokens_per_region
    assert sorted(t for t in token.tolist() if t >= 0) == list(range(grid.num_tokens))
    assert grid.hangs_over == (-1 in token.tolist())
    # No region is empty: routing never names one that has no cell.
    assert (token.view(grid.num_regions, -1) >= 0).any(-1).all()


@settings(deadline=None, max_examples=30)
@given(size=SIZES, box=BOXES)
def test_means_are_over_the_cells_inside(size, box):
    grid = RegionGrid(size, box)
    x = torch.randn(2, 3, *size, 2, dtype=torch.float64, requires_grad=True)
    means = region_means(x, grid)
    rows = x.permute(0, 2, 3, 4, 1, 5).reshape(2, grid.num_tokens, 6)
    for r, cells in enumerate(grid.token_of_slot().view(grid.num_regions, -1)):
        want = rows[:, cells[cells >= 0].long()].mean(1)
        torch.testing.assert_close(means[:, r], want)
    means.sum().backward()
    assert x.grad is not None and bool((x.grad > 0).all())


def test_means_of_half_numbers_are_in_single():
    x = torch.full((1, 1, 1, 64, 64, 1), 0.1, dtype=torch.bfloat16)
    means = region_means(x, RegionGrid((1, 64, 64), (1, 64, 64)))
    assert means.dtype == torch.float32
    torch.testing.assert_close(means.flatten(), x.flatten()[:1].float())


def test_picks_are_stable_and_descending():
    affinity = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    graph, values = top_regions(affinity, 4)
    assert graph.dtype == torch.int32
    assert graph.tolist() == [[1, 2, 4, 3], [0, 1, 2, 3]]
    assert values.tolist() == [[3.0, 3.0, 3.0, 2.0], [0.0] * 4]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 9),
    topk=st.integers(1, 5),
    regions=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_reverse_graph(rows, topk, regions, seed):
    g = torch.Generator().manual_seed(seed)
    # Values just outside stand for bad ones, which belong to nobody.
    graph = torch.randint(-1, regions + 1, (2, 3, rows, topk), generator=g, dtype=torch.int32)
    offsets, entries = reverse_graph(graph, regions)
    assert offsets.shape == (2, 3, regions + 1) and entries.shape == (2, 3, rows * topk)
    assert offsets.dtype == entries.dtype == torch.int32
    for b in range(2):
        for h in range(3):
            flat = graph[b, h].flatten().tolist()
            for j in range(regions):
                row = entries[b, h, offsets[b, h, j] : offsets[b, h, j + 1]].tolist()
                assert row == [e for e, named in enumerate(flat) if named == j]
            rest = entries[b, h, offsets[b, h, -1] :].tolist()
            assert rest == [e for e, named in enumerate(flat) if not 0 <= named < regions]


@pytest.mark.parametrize("layout", ["last", "first"])
def test_results_lie_as_inputs_do(layout):
    x = torch.randn(2, 5, 6, 3, 4).permute(0, 3, 1, 2, 4)[:, :, None]
    if layout == "first":
        x = torch.randn(2, 3, 4, 1, 5, 6).permute(0, 1, 3, 4, 5, 2)
    out = empty_region_out(x, x)
    assert out.shape == x.shape and out.dtype == x.dtype
    flat = out.permute(0, 2, 3, 4, 1, 5) if layout == "last" else out.permute(0, 1, 5, 2, 3, 4)
    assert flat.is_contiguous()
