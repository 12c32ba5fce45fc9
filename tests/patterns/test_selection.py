"""Choosing key blocks by score, against plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from permattn.core import selection
from permattn.core.selection import list_blocks, pooled_blocks, strongest_blocks, strongest_of
from torch import Tensor


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def chosen(row: Tensor) -> list[int]:
    """The entries of one padded row; checks that they ascend and that only -1 follows."""
    found = [x for x in row.tolist() if x >= 0]
    assert row.tolist() == found + [-1] * (len(row) - len(found))
    assert found == sorted(set(found))
    return found


def slow_choice(
    score: list[float], budget: int, coverage: float | None, forced: tuple[int, ...] = ()
) -> list[int]:
    """Sorts one row, walks it until budget or coverage are reached."""
    weight = [math.exp(x) for x in score]
    order = sorted(range(len(score)), key=lambda j: (j not in forced, -score[j], j))
    kept: list[int] = []
    held = 0.0
    for j in order[:budget]:
        enough = coverage is not None and coverage < 1 and held >= coverage * sum(weight)
        if enough and j not in forced:
            break
        kept.append(j)
        held += weight[j]
    return sorted(kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("tokens", "block"), [(64, 16), (70, 16), (3, 8), (16, 16), (33, 1)])
def test_pooled_is_the_mean_of_a_block(tokens: int, block: int, dtype: torch.dtype):
    x = draw(2, 3, tokens, 5).to(dtype)
    got = pooled_blocks(x, block)
    assert got.dtype == torch.float32
    want = torch.stack([part.double().mean(2) for part in x.split(block, 2)], 2)
    torch.testing.assert_close(got, want.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shared", [True, False], ids=["one-order", "order-per-head"])
def test_pooled_leaves_holes_out(shared: bool, monkeypatch):
    monkeypatch.setattr(selection, "_CHUNK_BYTES", 4 * 2 * 3 * 8 * 5 * 2)
    x = draw(2, 3, 40, 5)
    heads = 1 if shared else 3
    token = torch.stack([torch.randperm(40)[:27] for _ in range(heads)]).int()[None]
    token[..., 3] = token[..., 5] = -1
    token[..., 8:16] = -1
    got = pooled_blocks(x, 8, token)
    assert got.shape == (2, 3, 4, 5)
    assert not got[:, :, 1].any()
    for h in range(3):
        for i in (0, 2, 3):
            rows = [t for t in token[0, min(h, heads - 1), i * 8 : i * 8 + 8].tolist() if t >= 0]
            torch.testing.assert_close(got[:, h, i], x[:, h, rows].mean(1), rtol=0, atol=1e-6)


def test_pooled_poison_in_holes_is_not_read():
    x = draw(1, 1, 16, 4)
    x[:, :, 3] = float("nan")
    token = torch.arange(16, dtype=torch.int32)[None, None].clone()
    token[..., 3] = -1
    assert pooled_blocks(x, 8, token).isfinite().all()


@pytest.mark.parametrize("coverage", [None, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("budget", [1, 4, 99])
def test_choice_is_the_sorted_walk(budget: int, coverage: float | None):
    score = 3 * draw(2, 3, 10, 17, seed=budget)
    stop = torch.arange(10) * 2
    got = strongest_of(score, stop[None, None], budget, coverage, min(budget, 17))
    for b in range(2):
        for h in range(3):
            for i in range(10):
                row = score[b, h, i, : 2 * i].double().tolist()
                want = slow_choice(row, budget, coverage)
                assert chosen(got[b, h, i]) == want, (b, h, i)


@pytest.mark.parametrize("coverage", [0.2, 0.8, 1.0])
def test_forced_blocks_come_first_and_count(coverage: float):
    score = 2 * draw(1, 2, 12, 12, seed=3)
    row = torch.arange(12)
    forced = (row == row[:, None]) | (row == 0)
    got = strongest_of(score, row[None, None] + 1, 99, coverage, 12, forced)
    for h in range(2):
        for i in range(12):
            want = slow_choice(score[0, h, i, : i + 1].double().tolist(), 99, coverage, (0, i))
            assert chosen(got[0, h, i]) == want


@pytest.mark.parametrize("value", [0.0, -1.5, 1e-30])
def test_ties_go_to_the_lower_block(value: float):
    score = torch.full((1, 1, 1, 200), value)
    score[..., ::3] = -0.0 if value == 0.0 else value
    got = strongest_of(score, torch.tensor([[[150]]]), 40, None, 40)
    assert chosen(got[0, 0, 0]) == list(range(40))
    half = strongest_of(score, torch.tensor([[[100]]]), 100, 0.495, 100)
    assert chosen(half[0, 0, 0]) == list(range(50))


def test_heads_have_budgets_and_coverages_of_their_own():
    score = draw(1, 3, 4, 20)
    stop = torch.tensor([0, 1, 9, 20])
    budget, coverage = torch.tensor([2, 20, 5]), torch.tensor([1.0, 0.5, 0.9])
    got = strongest_of(score, stop[None, None], budget, coverage, 20)
    for h in range(3):
        for i, n in enumerate(stop.tolist()):
            row = score[0, h, i, :n].double().tolist()
            want = slow_choice(row, int(budget[h]), float(coverage[h]))
            assert chosen(got[0, h, i]) == want


@pytest.mark.parametrize("heads", [2, 6], ids=["one-to-one", "grouped"])
def test_scores_are_scaled_products_of_the_heads_own_keys(heads: int, monkeypatch):
    monkeypatch.setattr(selection, "_CHUNK_BYTES", 4 * 2 * heads * 9 * 4)
    q, k = draw(2, heads, 11, 8, seed=1), draw(2, 2, 9, 8, seed=2)
    stop = torch.randint(0, 10, (2, heads, 11))
    got = strongest_blocks(
        q, k, allowed_stop=stop, budget=3, coverage=0.7, max_blocks=3, scale=0.37
    )
    assert got.dtype == torch.int32 and got.shape == (2, heads, 11, 3)
    for b in range(2):
        for h in range(heads):
            score = 0.37 * q[b, h].double() @ k[b, h // (heads // 2)].double().T
            for i in range(11):
                row = score[i, : int(stop[b, h, i])].tolist()
                assert chosen(got[b, h, i]) == slow_choice(row, 3, 0.7)


def test_nothing_allowed_is_nothing_chosen():
    args = {"budget": 5, "coverage": 0.9, "max_blocks": 5, "scale": 1.0}
    q, k = draw(1, 1, 4, 8), draw(1, 1, 4, 8)
    none = strongest_blocks(q, k, allowed_stop=torch.zeros(4, dtype=torch.long), **args)
    assert (none == -1).all()
    no_keys = strongest_blocks(
        q, k[:, :, :0], allowed_stop=torch.zeros(4, dtype=torch.long), **args
    )
    assert no_keys.shape == (1, 1, 4, 5) and (no_keys == -1).all()


def test_lists_hold_full_blocks_first():
    kv = torch.tensor([[[[5, 2, -1, 9], [-1, -1, -1, -1], [3, 1, 4, 0]]]], dtype=torch.int32)
    full = torch.tensor([[[[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 0]]]]).bool()
    index = list_blocks(kv, full, 16, 32)
    assert index.kv_indices[0, 0, :7].tolist() == [2, 9, 5, 4, 0, 1, 3]
    assert index.row_offsets.tolist() == [[[0, 3, 3, 7]]]
    assert index.kv_num_full.tolist() == [[[2, 0, 1]]]
    assert (index.block_q, index.block_kv, index.capacity) == (16, 32, 12)
    index.validate(10)
    partial = list_blocks(kv, None, 16, 32)
    assert partial.kv_indices[0, 0, :7].tolist() == [2, 5, 9, 0, 1, 3, 4]
    assert not partial.kv_num_full.any()


def test_shapes_are_known_without_data():
    with torch.device("meta"):
        q, k = torch.empty(1, 4, 300, 8), torch.empty(1, 2, 300, 8)
        token = torch.empty(1, 1, 320, dtype=torch.int32)
        stop = torch.empty(10, dtype=torch.long)
    pooled = pooled_blocks(q, 32), pooled_blocks(k, 32)
    assert pooled_blocks(q, 32, token).shape == (1, 4, 10, 8)
    kv = strongest_blocks(
        *pooled, allowed_stop=stop, budget=4, coverage=0.9, max_blocks=4, scale=1.0
    )
    index = list_blocks(kv, None, 32, 32)
    assert index.kv_indices.shape == (1, 4, 40) and index.kv_indices.is_meta


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: pooled_blocks(draw(3, 4, 5), 8), "B, H, S, D"),
        (lambda: pooled_blocks(draw(1, 1, 4, 5), 0), "block >= 1"),
        (
            lambda: strongest_blocks(
                draw(1, 3, 4, 5),
                draw(1, 2, 4, 5),
                allowed_stop=torch.arange(4),
                budget=1,
                coverage=None,
                max_blocks=1,
                scale=1.0,
            ),
            "Hq % Hkv",
        ),
    ],
    ids=["axes", "block", "heads"],
)
def test_bad_input_is_named(call, match: str):
    with pytest.raises(ValueError, match=match):
        call()
