from itertools import pairwise

import pytest
import torch
from permattn import BlockIndex
from permattn.testing import random_plan


def lists(index: BlockIndex, b: int = 0, h: int = 0) -> list[list[int]]:
    offsets = index.row_offsets[b, h].tolist()
    kv = index.kv_indices[b, h].tolist()
    return [kv[a:z] for a, z in pairwise(offsets)]


def test_from_block_mask_compacts_in_order():
    mask = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 1]]).bool()
    index = BlockIndex.from_block_mask(mask, 16, 32)
    assert lists(index) == [[1, 2], [], [0, 2]]
    assert index.capacity == 9 and index.kv_num_full.sum() == 0
    assert torch.equal(index.to_block_mask(3)[0, 0], mask)


def test_from_padded_keeps_order_and_full_counts():
    kv = torch.tensor([[[[2, 0, 9], [1, 9, 9]]]])
    index = BlockIndex.from_padded(kv, torch.tensor([[[2, 1]]]), torch.tensor([[[1, 0]]]), 8, 8)
    assert lists(index) == [[2, 0], [1]]
    assert index.kv_num_full.tolist() == [[[1, 0]]]


def test_from_ranges_lists_full_ranges_first():
    starts = torch.tensor([[[[3, 0, 7], [0, 5, 2]]]])
    stops = torch.tensor([[[[5, 1, 7], [0, 4, 4]]]])
    index = BlockIndex.from_ranges(
        starts, stops, num_full_ranges=1, capacity=8, block_q=4, block_kv=4
    )
    assert lists(index) == [[3, 4, 0], [2, 3]]
    assert index.kv_num_full.tolist() == [[[2, 0]]]
    index.validate(8)


@pytest.mark.parametrize("seed", range(6))
def test_transpose_is_the_matrix_transpose(seed):
    plan = random_plan(130, 90, heads=3, block_q=16, block_kv=8, density=0.3, seed=seed)
    part = plan.parts[0]
    index = part.index
    back = index.transpose(part.num_kv_blocks)
    back.validate(index.num_q_blocks)
    assert back.capacity == index.capacity
    assert torch.equal(
        back.to_block_mask(index.num_q_blocks).mT, index.to_block_mask(part.num_kv_blocks)
    )
    for h in range(3):
        full = torch.zeros(index.num_q_blocks, part.num_kv_blocks, dtype=torch.bool)
        for i, row in enumerate(lists(index, h=h)):
            full[i, row[: index.kv_num_full[0, h, i]]] = True
        for j, row in enumerate(lists(back, h=h)):
            n = int(back.kv_num_full[0, h, j])
            assert row[:n] == sorted(row[:n]) and row[n:] == sorted(row[n:])
            assert sorted(row[:n]) == full[:, j].nonzero().flatten().tolist()


def test_transpose_of_an_empty_index():
    index = BlockIndex.from_block_mask(torch.zeros(0, 0, dtype=torch.bool), 4, 4)
    assert index.transpose(3).row_offsets.tolist() == [[[0, 0, 0, 0]]]


def broken(**change) -> BlockIndex:
    good = {
        "kv_indices": torch.tensor([[[0, 1, 2]]], dtype=torch.int32),
        "row_offsets": torch.tensor([[[0, 2, 3]]], dtype=torch.int32),
        "kv_num_full": torch.tensor([[[1, 0]]], dtype=torch.int32),
        "block_q": 4,
        "block_kv": 4,
    }
    changed = {k: torch.tensor(v, dtype=torch.int32) for k, v in change.items()}
    return BlockIndex(**{**good, **changed})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kv_indices": [[[0, 3, 2]]]}, r"\[0, 3\), got 3"),
        ({"kv_indices": [[[0, -1, 2]]]}, r"\[0, 3\), got -1"),
        ({"kv_indices": [[[1, 1, 2]]]}, "twice"),
        ({"row_offsets": [[[0, 2, 1]]]}, "never descend"),
        ({"row_offsets": [[[1, 2, 3]]]}, "start at 0"),
        ({"row_offsets": [[[0, 2, 4]]]}, "capacity 3, got 4"),
        ({"kv_num_full": [[[3, 0]]]}, "kv_num_full"),
        ({"kv_num_full": [[[-1, 0]]]}, "kv_num_full"),
    ],
    ids=[
        "large",
        "negative",
        "repeated",
        "descending",
        "start",
        "capacity",
        "full",
        "full-negative",
    ],
)
def test_bad_values_raise(change, match):
    with pytest.raises(ValueError, match=match):
        broken(**change).validate(3)


def test_bad_shapes_raise():
    with pytest.raises(ValueError, match="num_q_blocks"):
        broken(row_offsets=[[[0, 2]]])
    with pytest.raises(ValueError, match="int32"):
        BlockIndex(*(torch.zeros(1, 1, n) for n in (1, 2, 1)), 4, 4)


def test_without_blocks_keeps_order_and_full_marks():
    torch.manual_seed(0)
    starts, stops = torch.tensor([[[[1, 4], [0, 2]]]]), torch.tensor([[[[4, 7], [1, 7]]]])
    index = BlockIndex.from_ranges(
        starts, stops, num_full_ranges=1, capacity=15, block_q=2, block_kv=2
    )
    dropped = torch.tensor([[[False, True, False, False, True, False, False]]])
    left = index.without_blocks(dropped)
    rows = [left.kv_indices[0, 0, a:b].tolist() for a, b in ((0, 4), (4, 9))]
    assert rows == [[2, 3, 5, 6], [0, 2, 3, 5, 6]]
    assert left.row_offsets.tolist() == [[[0, 4, 9]]] and left.kv_num_full.tolist() == [[[2, 1]]]
