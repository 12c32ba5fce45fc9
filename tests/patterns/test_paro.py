"""plan_paro and ParoPlan against masks written apart from them, on every backend that runs here."""

from __future__ import annotations

from dataclasses import replace

import permattn as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from permattn import testing
from permattn.core.axis_order import AXIS_ORDERS
from permattn.paro_file import load_paro, save_paro
from permattn.patterns.paro import ParoOrigin, ParoPlan, pack_bits, unpack_bits
from torch import Tensor

BACKENDS = ("reference", "cpu")


def visible_pairs(
    grid: pa.TokenGrid, orders: list[int], mask: Tensor, num_tokens: int, block: tuple[int, int]
) -> Tensor:
    """bool [H, S, S] by plain loops: place of every token, block of every place."""
    sizes = (grid.frames, grid.height, grid.width)
    heads = len(orders)
    seen = torch.ones(heads, num_tokens, num_tokens, dtype=torch.bool)
    inside = slice(grid.start, grid.stop)
    for h, order in enumerate(orders):
        axes = tuple("FHW".index(axis) for axis in AXIS_ORDERS[order])
        read = torch.arange(grid.num_tokens).view(sizes).permute(axes).reshape(-1)
        place = torch.empty_like(read)
        place[read] = torch.arange(grid.num_tokens)
        head = mask[min(h, mask.shape[0] - 1)]
        seen[h, inside, inside] = head[place // block[0]][:, place // block[1]]
    return seen


def check(plan: pa.AttnPlan, seen: Tensor, backend: str, batch: int = 1, dim: int = 16) -> None:
    """The plan's attention against masked float64 attention; empty rows must be zeros."""
    heads, n = seen.shape[-3], seen.shape[-1]
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(batch, heads, n, dim, generator=generator) for _ in range(3))
    out, lse = pa.sparse_attention_with_lse(q, k, v, plan, backend=backend)
    exact, exact_lse = testing.masked_attention(q.double(), k.double(), v.double(), seen, dim**-0.5)
    plain, plain_lse = testing.masked_attention(q, k, v, seen, dim**-0.5)
    testing.assert_within(out, plain, exact, "out")
    testing.assert_within(lse, plain_lse, exact_lse, "lse")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grid", [(5, 9, 10), (1, 8, 9), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("start", [0, 7], ids=["no-text", "text"])
def test_all_true_equals_dense(backend, grid, start):
    """Softmax does not see an order: every order, ragged grids included."""
    orders = torch.arange(6)
    n = grid[0] * grid[1] * grid[2]
    blocks = -(-n // 64)
    mask = torch.ones(1, blocks, blocks, dtype=torch.bool)
    plan = pa.plan_paro(pa.TokenGrid(start, *grid), orders, mask, num_tokens=n + 2 * start)
    plan.check_values()
    check(plan, torch.ones(6, n + 2 * start, n + 2 * start, dtype=torch.bool), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_run_of_active_and_skipped_blocks(backend):
    """All 2^6 patterns of six key blocks, one per head and query row: the public code's defect."""
    n, block = 6 * 16, (16, 16)
    bits = torch.arange(64)[:, None] >> torch.arange(6) & 1
    mask = bits.bool()[:, None].repeat(1, 6, 1)
    # Every query block has another pattern, so that runs cross rows as well.
    for row in range(6):
        mask[:, row] = mask[:, row].roll(row, 0)
    grid, orders = pa.TokenGrid(0, 4, 4, 6), [i % 6 for i in range(64)]
    plan = pa.plan_paro(grid, torch.tensor(orders), mask, num_tokens=n, block=block)
    check(plan, visible_pairs(grid, orders, mask, n, block), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rest", [0, 1, 30, 63])
@pytest.mark.parametrize("text", [0, 30, 64, 65])
def test_lengths_that_blocks_do_not_divide(backend, rest, text):
    n = 128 + rest
    grid = pa.TokenGrid(text, 1, 1, n)
    mask = torch.rand(2, -(-n // 64), -(-n // 64), generator=torch.Generator().manual_seed(n)) < 0.5
    plan = pa.plan_paro(grid, torch.tensor([0, 0]), mask, num_tokens=n + text)
    plan.check_values()
    check(plan, visible_pairs(grid, [0, 0], mask, n + text, (64, 64)), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_masked_rows_are_zeros(backend):
    mask = torch.zeros(2, 3, 3, dtype=torch.bool)
    mask[1, 1] = True
    grid = pa.TokenGrid(0, 3, 4, 16)
    plan = pa.plan_paro(grid, torch.tensor([4, 1]), mask, num_tokens=192)
    check(plan, visible_pairs(grid, [4, 1], mask, 192, (64, 64)), backend)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)),
    prefix=st.integers(0, 9),
    suffix=st.integers(0, 9),
    block=st.tuples(st.sampled_from([4, 8, 16]), st.sampled_from([4, 8, 16])),
    orders=st.lists(st.integers(0, 5), min_size=2, max_size=2),
    seed=st.integers(0, 999),
)
def test_any_grid_text_and_block(sizes, prefix, suffix, block, orders, seed):
    grid = pa.TokenGrid(prefix, *sizes)
    n = prefix + grid.num_tokens + suffix
    shape = [-(-grid.num_tokens // b) for b in block]
    mask = torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    plan = pa.plan_paro(grid, torch.tensor(orders), mask, num_tokens=n, block=block)
    plan.check_values()
    seen = visible_pairs(grid, orders, mask, n, block)
    assert torch.equal(testing.visible_pairs(plan, 1, 2)[0] > 0, seen)
    assert testing.visible_pairs(plan, 1, 2).max() <= 1
    check(plan, seen, "cpu", dim=8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", ["prefix", "suffix"])
def test_padded_text_is_seen_by_nobody(backend, place):
    """HunyuanVideo's way: text behind the video, padded per sample."""
    text, n = 10, 48
    grid = pa.TokenGrid(text if place == "prefix" else 0, 3, 4, 4)
    visible = torch.ones(2, text, dtype=torch.bool)
    visible[1, 6:] = False
    mask = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.6
    plan = pa.plan_paro(
        *(grid, torch.tensor([3, 5]), mask),
        num_tokens=text + n,
        block=(16, 16),
        text_visible=visible,
    )
    plan.check_values()
    seen = visible_pairs(grid, [3, 5], mask, text + n, (16, 16))[None].repeat(2, 1, 1, 1)
    first = 0 if place == "prefix" else n
    seen[..., first : first + text] &= visible[:, None, None]
    check(plan, seen, backend, batch=2)


def test_tokens_in_an_order_of_their_own():
    """A merge-major tower (2 x 2 cells together): orders sort its cells, "native" leaves them."""
    height, width = 4, 6
    cells = torch.arange(height * width).view(2, 2, 3, 2).permute(0, 2, 1, 3).reshape(-1)
    grid, block = pa.TokenGrid(0, 1, height, width), (4, 4)
    mask = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(2)) < 0.5
    plan = pa.plan_paro(
        grid, torch.tensor([0, 1, 6]), mask, num_tokens=24, block=block, native_cells=cells
    )
    seen = testing.visible_pairs(plan, 1, 3)[0] > 0
    in_raster = visible_pairs(grid, [0, 1], mask[:2], 24, block)
    for h in range(2):
        assert torch.equal(seen[h], in_raster[h][cells][:, cells])
    place = torch.arange(24)
    assert torch.equal(seen[2], mask[2][place // 4][:, place // 4])


def test_planning_waits_for_nothing():
    """On the meta device any look at a value raises."""
    orders = torch.zeros(4, dtype=torch.uint8, device="meta")
    mask = torch.zeros(4, 8, 8, dtype=torch.bool, device="meta")
    plan = pa.plan_paro(pa.TokenGrid(30, 5, 9, 10), orders, mask, num_tokens=480)
    assert len(plan.parts) == 2 and plan.device.type == "meta"


GRID, ORDERS = pa.TokenGrid(0, 2, 4, 8), torch.tensor([0, 1])
MASK = torch.ones(2, 1, 1, dtype=torch.bool)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_tokens": 63}, "num_tokens: wants at least the grid's end 64, got 63"),
        ({"block": (0, 64)}, "block: wants two sizes >= 1"),
        ({"axis_orders": torch.tensor([0.0, 1.0])}, "axis_orders: wants integer"),
        ({"axis_orders": torch.tensor([[0, 1]])}, "axis_orders: wants integer"),
        ({"block_mask": MASK.float()}, "block_mask: wants bool"),
        ({"block_mask": torch.ones(2, 2, 1, dtype=torch.bool)}, "block_mask: wants bool"),
        ({"block_mask": torch.ones(3, 1, 1, dtype=torch.bool)}, "wants 1 or 2 heads, got 3"),
        ({"text_visible": torch.ones(1, 4, dtype=torch.bool)}, "text_visible: wants bool"),
        ({"grid": pa.TokenGrid(0, 2, 4, 8, (0, 40)), "num_tokens": 90}, "frame_starts"),
        ({"quant": pa.QuantSpec("int8", q_rows_per_scale=48)}, "must divide"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_arguments_are_named(changes, match):
    arguments = {"grid": GRID, "axis_orders": ORDERS, "block_mask": MASK, "num_tokens": 64}
    arguments |= changes
    grid, orders, mask = (arguments.pop(x) for x in ("grid", "axis_orders", "block_mask"))
    with pytest.raises(ValueError, match=match):
        pa.plan_paro(grid, orders, mask, **arguments)


def make_plan(**changes) -> ParoPlan:
    """Two bins, two layers, three heads on a ragged grid with text before it."""
    generator = torch.Generator().manual_seed(4)
    masks = torch.rand(2, 2, 3, 8, 8, generator=generator) < 0.4
    masks |= torch.eye(8, dtype=torch.bool)
    fields = {
        "grid": (5, 9, 10),
        "text": "prefix",
        "axis_orders": torch.tensor([[0, 3, 5], [1, 2, 4]], dtype=torch.uint8),
        "packed_masks": pack_bits(masks),
        "sigma_edges": (0.6,),
        "empty_heads": torch.zeros(2, 3, dtype=torch.bool),
        "origin": ParoOrigin("WanTransformer3DModel", 16, 4),
    }
    return ParoPlan(**(fields | changes))


def test_a_layers_plan_is_its_orders_and_bits():
    paro, text = make_plan(), 30
    for layer in range(2):
        for bin in range(2):
            plan = paro.attn_plan(layer, bin, num_text_tokens=text)
            plan.check_values()
            grid = pa.TokenGrid(text, *paro.grid)
            seen = visible_pairs(
                *(grid, paro.axis_orders[layer].tolist(), paro.block_mask(layer, bin)),
                *(480, paro.block),
            )
            assert torch.equal(testing.visible_pairs(plan, 1, 3)[0] > 0, seen)
            assert plan.parts[0].index.capacity == int(paro.num_blocks[bin, layer].max()) + 8


def test_some_heads_are_cut_from_the_plan_of_all():
    paro = make_plan()
    whole, part = (paro.attn_plan(1, 0, heads=s) for s in (slice(None), slice(1, 3)))
    seen = testing.visible_pairs(whole, 1, 3)
    assert torch.equal(testing.visible_pairs(part, 1, 2), seen[:, 1:])


@pytest.mark.parametrize(
    ("sigma", "want"), [(1.0, 0), (0.61, 0), (0.6, 1), (0.1, 1), (0.0, 1)], ids=str
)
def test_bins_are_found_by_noise_level(sigma, want):
    assert make_plan().bin_of(sigma) == want


def test_an_empty_head_sees_text_alone():
    masks = torch.eye(8, dtype=torch.bool).repeat(1, 1, 2, 1, 1)
    masks[0, 0, 1] = False
    paro = make_plan(
        packed_masks=pack_bits(masks),
        axis_orders=torch.zeros(1, 2, dtype=torch.uint8),
        sigma_edges=(),
        empty_heads=torch.tensor([[False, True]]),
    )
    seen = testing.visible_pairs(paro.attn_plan(0, 0, num_text_tokens=20), 1, 2)[0] > 0
    assert seen[1, 20:, :20].all() and not seen[1, 20:, 20:].any()
    assert seen[1, :20].all()
    with pytest.raises(ValueError, match="a head of this plan sees text alone, got 0"):
        paro.attn_plan(0, 0)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 99),
)
def test_bits_round_trip(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(mask)
    assert packed.shape == (shape[0], -(-shape[1] * shape[2] // 8))
    assert torch.equal(unpack_bits(packed, *shape[1:]), mask)


def test_a_file_keeps_everything(tmp_path):
    paro = make_plan(native_cells=torch.arange(450).flip(0))
    save_paro(paro, tmp_path / "plan.paro")
    back = load_paro(tmp_path / "plan.paro")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.paro"]
    for name in ("axis_orders", "packed_masks", "empty_heads", "native_cells", "num_blocks"):
        assert torch.equal(getattr(back, name), getattr(paro, name))
    for name in ("grid", "text", "sigma_edges", "block", "origin"):
        assert getattr(back, name) == getattr(paro, name)


@pytest.mark.parametrize(
    ("bins", "layers", "heads", "grid", "megabytes"),
    [
        (10, 42, 48, (13, 30, 45), 195),
        (16, 42, 48, (13, 30, 45), 312),
        (4, 40, 40, (21, 45, 80), 1120),
        (16, 60, 24, (33, 45, 80), 10_000),
        (16, 57, 24, (1, 64, 64), 14),
    ],
    ids=["cogvideox-10", "cogvideox-16", "wan-4", "hunyuan-16", "flux-16"],
)
def test_sizes_stay_under_one_bit_a_block(bins, layers, heads, grid, megabytes):
    """The paper's sizes count text and vision in shared blocks; text is not stored here."""
    blocks = -(-grid[0] * grid[1] * grid[2] // 64)
    masks = torch.empty(1, 1, 1, blocks, blocks, dtype=torch.bool)
    per_head = pack_bits(masks).shape[-1]
    assert bins * layers * heads * per_head + 2 * layers * heads <= megabytes * 1e6


def test_the_file_is_the_bits_and_a_header(tmp_path):
    paro = make_plan()
    save_paro(paro, tmp_path / "plan.paro")
    assert (tmp_path / "plan.paro").stat().st_size < paro.num_bytes + 1500


@pytest.mark.parametrize("damage", ["cut", "foreign", "text", "version", "header", "grid"])
def test_damaged_and_foreign_files_are_errors(tmp_path, damage):
    path = tmp_path / "plan.paro"
    save_paro(make_plan(), path)
    data = path.read_bytes()
    match = {
        "cut": "not a readable safetensors file",
        "foreign": "not one with a PARO plan",
        "text": "not a readable safetensors file",
        "version": "PARO format 7, this version reads 1",
        "header": "damaged PARO header",
        "grid": "packed_masks: wants uint8",
    }[damage]
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "foreign":
        pa.save_plan(pa.plan_dense(8, 8, causal=False), path)
    elif damage == "text":
        path.write_text("not a plan")
    else:
        old, new = {
            "version": (rb"\"format\": 1", rb"\"format\": 7"),
            "header": (rb"\"grid\": [5, 9, 10]", rb"\"grit\": [5, 9, 10]"),
            "grid": (rb"\"grid\": [5, 9, 10]", rb"\"grid\": [9, 9, 10]"),
        }[damage]
        assert old in data
        path.write_bytes(data.replace(old, new))
    with pytest.raises(ValueError, match=match):
        load_paro(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no plan file at"):
        load_paro(tmp_path / "none.paro")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"grid": (5, 9)}, "grid: wants three sizes"),
        ({"grid": (5, 9, 0)}, "grid: wants three sizes"),
        ({"text": "middle"}, "text: wants one of"),
        ({"block": (64,)}, "block: wants two sizes"),
        ({"axis_orders": torch.zeros(2, 3)}, "axis_orders: wants uint8"),
        ({"axis_orders": torch.full((2, 3), 7, dtype=torch.uint8)}, "wants numbers below 7"),
        ({"axis_orders": torch.zeros(2, 4, dtype=torch.uint8)}, "packed_masks: wants uint8"),
        ({"sigma_edges": ()}, "sigma_edges: wants 1 descending numbers"),
        ({"sigma_edges": (1.5,)}, "sigma_edges: wants 1 descending numbers"),
        ({"empty_heads": torch.zeros(2, 3)}, "empty_heads: wants bool"),
        ({"text": "none", "empty_heads": torch.ones(2, 3, dtype=torch.bool)}, "without text"),
        ({"native_cells": torch.zeros(450, dtype=torch.int64)}, "every raster cell once"),
        (
            {"packed_masks": torch.zeros(2, 2, 3, 8, dtype=torch.uint8)},
            "bin 0, layer 0, head 0 has a row of query blocks without any key block",
        ),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_fields_are_named(changes, match):
    with pytest.raises(ValueError, match=match):
        make_plan(**changes)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        ({"layer": 2, "bin": 0}, "layer: wants 0 to 1, got 2"),
        ({"layer": 0, "bin": -1}, "bin: wants 0 to 1, got -1"),
    ],
    ids=["layer", "bin"],
)
def test_a_layer_or_bin_that_is_not_there(call, match):
    with pytest.raises(ValueError, match=match):
        make_plan().attn_plan(**call)


def test_text_where_the_plan_has_none():
    with pytest.raises(ValueError, match="the plan has no joint text"):
        make_plan(text="none").attn_plan(0, 0, num_text_tokens=3)


def test_unpacking_checks_the_size():
    with pytest.raises(ValueError, match=r"wants uint8 \[..., 8\] for 8 x 8 blocks"):
        unpack_bits(torch.zeros(3, 9, dtype=torch.uint8), 8, 8)


def test_plans_differ_by_replacement_only():
    """A ParoPlan is a value: replace() checks again."""
    with pytest.raises(ValueError, match="text: wants one of"):
        replace(make_plan(), text="infix")
