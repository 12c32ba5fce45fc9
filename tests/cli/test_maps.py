"""Maps equal the dense thing that they never make."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from permattn import HeadPattern, TokenGrid, plan_prefill
from permattn.cli.demo import maps
from permattn.cli.demo.maps import Window, attention_map, plan_map
from permattn.testing import visible_pairs

WINDOWS = [Window(0, 300, 7), Window(270, 300, 1), Window(140, 300, 16), Window(172, 300, 4)]


@pytest.fixture(params=WINDOWS, ids=lambda w: f"{w.start}-{w.stop}-cell{w.cell}")
def window(request):
    return request.param


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(maps, "_TILE_VALUES", 5000)


def pooled(values: torch.Tensor, window: Window) -> torch.Tensor:
    """Sum over the cells of a dense [S, S] matrix, cell by cell."""
    edges = [*range(window.start, window.stop, window.cell), window.stop]
    spans = list(pairwise(edges))
    return torch.tensor([[float(values[a:b, c:d].sum()) for c, d in spans] for a, b in spans])


def rows_of(window: Window) -> torch.Tensor:
    return pooled(torch.eye(window.stop), window).diagonal()[:, None]


def test_attention_map_is_the_dense_softmax(window):
    torch.manual_seed(0)
    q, k = torch.randn(300, 16), torch.randn(300, 16)
    score = (q @ k.mT * 0.3).masked_fill(~torch.ones(300, 300).tril().bool(), float("-inf"))
    want = pooled(score.softmax(-1), window) / rows_of(window)
    got = attention_map(q, k, window, 0.3)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    if window.start == 0:
        torch.testing.assert_close(got.sum(-1), torch.ones(window.cells))


def test_plan_map_counts_visible_pairs(window):
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 300, 16), torch.randn(1, 2, 300, 16)
    video = TokenGrid(start=5, frames=12, height=4, width=6)
    heads = [
        HeadPattern("grid", sink=3, local=20, last=9),
        HeadPattern("vertical_slash", sink=3, local=20, vertical=10, slash=3),
        HeadPattern("a_shape", sink=5, local=33),
        HeadPattern("dense"),
    ]
    plan = plan_prefill(q, k, [[video]], heads)
    visible = visible_pairs(plan, 1, 4)[0]
    causal = pooled(torch.ones(300, 300).tril(), window)
    for head in range(4):
        got = plan_map(plan, head, window)
        want = pooled(visible[head].float(), window) / causal
        hidden = causal == 0
        assert bool(got[hidden].isnan().all())
        torch.testing.assert_close(got[~hidden], want[~hidden])
    assert float(plan_map(plan, 3, window)[causal > 0].min()) == 1.0
