"""plan_bilevel: the same pairs as the region kernels, in the engine's general form."""

from __future__ import annotations

import pytest
import torch
from permattn import (
    TokenGrid,
    bilevel_routing_attention,
    load_plan,
    plan_bilevel,
    route_regions,
    save_plan,
    sparse_attention,
)
from permattn.testing import visible_pairs


def maps(grid: TokenGrid, heads: int = 3, dim: int = 8) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shape = (2, heads, grid.num_tokens, dim)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3)]


def as_map(x: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    return x.unflatten(2, (grid.frames, grid.height, grid.width)).permute(0, 2, 3, 4, 1, 5)


CUTS = [
    ("even", TokenGrid(0, 1, 6, 8), (3, 4), None),
    ("ragged", TokenGrid(0, 1, 7, 9), (4, 2), "mask"),
    ("video", TokenGrid(0, 4, 4, 6), (2, 2, 3), None),
    ("ragged-video", TokenGrid(0, 5, 3, 4), (3, 2, 2), "mask"),
]


@pytest.mark.parametrize(
    ("grid", "regions", "pad_mode"), [c[1:] for c in CUTS], ids=[c[0] for c in CUTS]
)
@pytest.mark.parametrize("topk", [1, 3])
def test_a_plan_says_what_the_region_kernels_do(grid, regions, pad_mode, topk, tmp_path):
    q, k, v = maps(grid)
    plan = plan_bilevel(q, k, grid, regions, topk, pad_mode=pad_mode)
    plan.check_values()
    three = (1,) * (3 - len(regions)) + regions
    rows = [as_map(x, grid).requires_grad_() for x in (q, k, v)]
    graph, _ = route_regions(rows[0], rows[1], three, topk=topk, pad_mode=pad_mode)
    want = bilevel_routing_attention(*rows, graph, three, pad_mode=pad_mode)
    flat = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = sparse_attention(*flat, plan)
    torch.testing.assert_close(as_map(out, grid), want, atol=1e-12, rtol=1e-12)
    grads = torch.autograd.grad(out.square().sum(), flat)
    wanted = torch.autograd.grad(want.square().sum(), rows)
    for x, y in zip(grads, wanted, strict=True):
        torch.testing.assert_close(as_map(x, grid), y, atol=1e-12, rtol=1e-12)
    save_plan(plan, tmp_path / "plan.safetensors")
    assert torch.equal(sparse_attention(q, k, v, load_plan(tmp_path / "plan.safetensors")), out)


def test_only_whole_regions_are_full():
    grid = TokenGrid(0, 1, 5, 4)
    q, k, _ = maps(grid)
    plan = plan_bilevel(q, k, grid, (2, 2), 4, pad_mode="mask")
    index = plan.parts[0].index
    # Boxes of 3 x 2: the lower two of four regions lack a row.
    assert index.kv_num_full.unique().tolist() == [2]
    assert visible_pairs(plan, 2, 3).unique().tolist() == [1]


def test_query_groups_share_a_key_head():
    grid = TokenGrid(0, 1, 4, 4)
    q, k, v = maps(grid, heads=4)
    plan = plan_bilevel(q, k[:, :2], grid, (2, 2), 2)
    wide = [x[:, :2].repeat_interleave(2, 1) for x in (k, v)]
    same = plan_bilevel(q, wide[0], grid, (2, 2), 2)
    assert torch.equal(plan.parts[0].index.kv_indices, same.parts[0].index.kv_indices)
    out = sparse_attention(q, k[:, :2], v[:, :2], plan)
    torch.testing.assert_close(out, sparse_attention(q, *wide, same))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 2, 15, 4)}, "q: wants .* 16 tokens"),
        ({"k": torch.zeros(2, 16, 4)}, "k: wants"),
        ({"k": torch.zeros(1, 3, 16, 4)}, "Hq % Hkv"),
        ({"grid": TokenGrid(1, 1, 4, 4)}, "without text before"),
        ({"regions": (3, 2)}, "does not divide"),
        ({"regions": (2, 2, 2)}, "has no"),
        ({"topk": 5}, "topk: wants 1 to 4"),
        ({"pad_mode": "zero"}, "no keys of zeros"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_bad_input_is_named(change, message):
    given = {
        "q": torch.zeros(1, 2, 16, 4),
        "k": torch.zeros(1, 2, 16, 4),
        "grid": TokenGrid(0, 1, 4, 4),
        "regions": (2, 2),
        "topk": 2,
    } | change
    with pytest.raises(ValueError, match=message):
        plan_bilevel(**given)


def test_frames_want_three_numbers():
    grid = TokenGrid(0, 2, 4, 4)
    q, k, _ = maps(grid)
    with pytest.raises(ValueError, match=r"regions: wants \(T, H, W\) for 2 frames"):
        plan_bilevel(q, k, grid, (2, 2), 2)
