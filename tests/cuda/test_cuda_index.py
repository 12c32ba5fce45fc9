"""Lists of blocks made by the CUDA kernels: exactly those of the core, two runs alike."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from permattn import testing
from permattn.core import BlockIndex
from permattn.core.selection import pooled_blocks, strongest_of
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))
from cuda_on_cpu import on_cpu, one_thread, shim_path  # noqa: F401

pytestmark = pytest.mark.usefixtures("on_cpu", "one_thread")


def ops():
    return torch.ops.permattn_native


def unwritten(heads: tuple[int, int], rows: int, capacity: int) -> list[Tensor]:
    """Room for indices, row_offsets and num_full."""
    return [torch.full((*heads, n), -7, dtype=torch.int32) for n in (capacity, rows + 1, rows)]


def assert_lists(found: list[Tensor], want: BlockIndex) -> None:
    assert torch.equal(found[1], want.row_offsets)
    assert torch.equal(found[2], want.kv_num_full)
    assert torch.equal(found[0], want.kv_indices)


# B, H, query blocks, key blocks: one word of bits, more than one, more rows than a block sums at
# once, and none.
SHAPES = [(1, 1, 1, 1), (2, 3, 7, 33), (1, 2, 70, 70), (1, 1, 1100, 40), (1, 2, 5, 300)]
EMPTY = [(1, 1, 3, 0), (1, 2, 0, 4), (0, 1, 2, 2)]


def mask_of(shape: tuple[int, int, int, int], density: float) -> Tensor:
    g = torch.Generator().manual_seed(sum(shape))
    return torch.rand(shape, generator=g) < density


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_masks_become_the_core_s_lists(shape, density):
    mask = mask_of(shape, density)
    for full in (False, True):
        for capacity in (None, shape[2] * shape[3] // 2):
            want = BlockIndex.from_block_mask(mask, 64, 64, full=full, capacity=capacity)
            found = unwritten(shape[:2], shape[2], want.capacity)
            ops().cuda_compact(mask, full, *found)
            assert_lists(found, want)


def mixed_index(mask: Tensor) -> BlockIndex:
    """Full blocks and partial ones, each ascending."""
    g = torch.Generator().manual_seed(1)
    partial = mask & (torch.rand(mask.shape, generator=g) < 0.5)
    kind = torch.where(mask, partial.int(), 2)
    order = kind.sort(dim=-1, stable=True).indices
    full = mask & ~partial
    return BlockIndex.from_padded(order, mask.sum(-1), full.sum(-1), 64, 32)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lists_turn_as_the_core_turns_them(shape, density):
    index = mixed_index(mask_of(shape, density))
    found = unwritten(shape[:2], shape[3], index.capacity)
    ops().cuda_transpose(index.kv_indices, index.row_offsets, index.kv_num_full, *found)
    assert_lists(found, index.transpose(shape[3]))


WILD_OFFSETS = {
    "past-the-capacity": [0, 4, 1 << 30],
    "before-the-first": [-(1 << 30), 2, 4],
    "shared-entries": [0, 4, 0, 4, 0, 4],
    "descending": [4, 0, 4],
}


@pytest.mark.parametrize("offsets", WILD_OFFSETS.values(), ids=list(WILD_OFFSETS))
def test_lists_that_were_not_checked_are_turned_inside_their_memory(offsets):
    rows, columns = len(offsets) - 1, 5
    entries = torch.tensor([[[0, 1, 4, 1 << 30]]], dtype=torch.int32)
    full = torch.full((1, 1, rows), 1 << 30, dtype=torch.int32)
    # What lies behind a result begins as -7 and must stay so.
    places = [torch.full((1, 1, 64), -7, dtype=torch.int32) for _ in range(3)]
    sizes = (entries.shape[-1], columns + 1, columns)
    found = [place[..., :n] for place, n in zip(places, sizes, strict=True)]
    given = torch.tensor([[offsets]], dtype=torch.int32)
    ops().cuda_transpose(entries, given, full, *found)
    for place, n in zip(places, sizes, strict=True):
        assert bool((place[..., n:] == -7).all())
    assert int(found[0].min()) >= 0 and int(found[0].max()) < rows


@pytest.mark.parametrize("per_item", [1, 2], ids=["tiles", "pairs"])
@pytest.mark.parametrize(
    ("batch", "heads", "units", "tiles_per_unit"),
    [(1, 1, 1, 1), (2, 3, 5, 2), (2, 3, 7, 1), (1, 1, 40, 1), (1, 4, 300, 2), (1, 2, 701, 3)],
)
def test_items_come_longest_first(batch, heads, units, tiles_per_unit, per_item):
    """Two parts of other blocks; lists of one head, or of all; lengths of one byte and of two."""
    g, unit = torch.Generator().manual_seed(2), 128
    for slots in (3200, 90000):
        offsets, ints, keys = [], [], torch.zeros(batch, heads, units, dtype=torch.int64)
        for block_q, block_kv, size in ((128, 64, (batch, 1)), (256, 48, (1, heads))):
            rows, blocks = -(-units * unit // block_q), -(-slots // block_kv)
            length = torch.randint(0, min(blocks, 300) + 1, (*size, rows), generator=g)
            offset = torch.nn.functional.pad(length.cumsum(-1), (1, 0)).to(torch.int32)
            offsets.append(offset.contiguous())
            ints += [block_q, block_kv, slots]
            of_unit = length.repeat_interleave(block_q // unit, -1)[..., :units]
            keys = keys + of_unit * block_kv
        tiles = units * tiles_per_unit
        keys = keys.repeat_interleave(tiles_per_unit, -1)
        # The last item may lack a tile.
        keys = torch.nn.functional.pad(keys, (0, -tiles % per_item))
        want = keys.unflatten(-1, (-1, per_item)).sum(-1).flatten()
        want = want.sort(descending=True, stable=True).indices.int()
        found = torch.full_like(want, -1)
        sizes = [batch, heads, tiles, tiles_per_unit, per_item, unit]
        ops().cuda_order(offsets, [*sizes, *ints], found)
        assert torch.equal(found, want)


@pytest.mark.parametrize("permuted", [False, True], ids=["tokens", "slots"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_are_pooled_over_the_tokens_they_hold(dtype, permuted):
    g = torch.Generator().manual_seed(3)
    perm = testing.random_permutation(150, heads=3, holes=20, keep=0.7, generator=g)
    token = perm.token_of_slot.contiguous() if permuted else None
    for dim, block in ((40, 16), (7, 5), (128, 64), (256, 100), (64, 1000)):
        x = torch.randn(2, 150, 3, dim, generator=g).to(dtype).transpose(1, 2)
        if permuted:
            x = x.masked_fill((perm.slot_of_token < 0)[..., None], 0.0)
        want = pooled_blocks(x, block, token)
        if permuted:
            x = x.masked_fill((perm.slot_of_token < 0)[..., None], float("nan"))
        found = torch.full_like(want, float("nan"))
        ops().cuda_pool(x, token, block, found)
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "columns", "dim"), [(70, 130, 40), (1, 1, 1), (64, 128, 33)])
def test_scores_are_scaled_products(rows, columns, dim):
    g = torch.Generator().manual_seed(4)
    q, k = (torch.randn(2, h, n, dim, generator=g) for h, n in ((4, rows), (2, columns)))
    found = torch.full((2, 4, rows, columns), float("nan"))
    ops().cuda_scores(q, k, 0.3, found)
    torch.testing.assert_close(found, q @ k.repeat_interleave(2, 1).mT * 0.3)


def scores_of(kind: str, shape: tuple[int, ...]) -> Tensor:
    score = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    if kind == "equals":
        score = score.round()
    if kind == "unreachable":
        score[..., ::3] = -float("inf")
    if kind == "zeros":
        score = torch.zeros_like(score)
        score[..., 1::2] = -0.0
    if kind == "close":
        score = (1.0 + score * 1e-6) * -1e30
    return score


@pytest.mark.parametrize("kind", ["any", "equals", "unreachable", "zeros", "close"])
@pytest.mark.parametrize(
    ("rows", "columns", "count"), [(20, 130, 9), (9, 31, 31), (5, 300, 64), (4, 8, 20), (3, 9, 1)]
)
def test_the_strongest_are_the_core_s(rows, columns, count, kind):
    g = torch.Generator().manual_seed(6)
    score = scores_of(kind, (2, 3, rows, columns))
    budget = torch.randint(0, count + 1, (3,), generator=g)
    for shape in ((1, 1, rows), (2, 3, rows)):
        stop = torch.randint(0, columns + 1, shape, generator=g)
        for of_head in (None, budget):
            want = strongest_of(score, stop, count if of_head is None else of_head, None, count)
            found = torch.full_like(want, -9)
            given = stop.int().flatten() if shape[0] == 1 else stop.int()
            ops().cuda_strongest(score, given, None if of_head is None else of_head.int(), found)
            assert torch.equal(found, want)
    found, again = (torch.full((2, 3, rows, count), -9, dtype=torch.int32) for _ in range(2))
    whole = torch.full((1, 1, rows), columns)
    ops().cuda_strongest(score, None, None, found)
    ops().cuda_strongest(score, None, None, again)
    assert torch.equal(found, strongest_of(score, whole, count, None, count))
    assert torch.equal(found, again)


def test_nan_is_never_chosen():
    score = torch.tensor([[[[1.0, float("nan"), 3.0, -float("nan"), 2.0]]]])
    found = torch.full((1, 1, 1, 4), -9, dtype=torch.int32)
    ops().cuda_strongest(score, None, None, found)
    assert found.flatten().tolist() == [0, 2, 4, -1]
