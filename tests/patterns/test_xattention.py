"""XAttention's plan against the paper's rule, pair by pair and token by token."""

from __future__ import annotations

import math

import pytest
import torch
from permattn import plan_xattention, sparse_attention
from permattn.testing import assert_within, masked_attention, visible_pairs
from torch import Tensor

CASES = {
    "square": (1, 2, 2, 192, 192, 8, 32),
    "tail": (1, 2, 2, 201, 201, 4, 32),
    "grouped-batch": (2, 4, 2, 150, 150, 8, 16),
    "second-turn": (1, 2, 1, 64, 160, 4, 32),
    "unaligned-turn": (2, 2, 2, 75, 183, 8, 32),
    "one-query": (1, 2, 2, 1, 77, 4, 16),
    "stride-is-the-block": (1, 2, 2, 100, 100, 16, 16),
    "stride-one": (1, 1, 1, 50, 50, 1, 16),
    "shorter-than-a-block": (1, 2, 1, 9, 9, 4, 32),
}


def draw(batch: int, hq: int, hkv: int, sq: int, skv: int, dim: int = 16) -> list[Tensor]:
    g = torch.Generator().manual_seed(sq + 7 * skv)
    q, k, v = (
        torch.randn(batch, heads, n, dim, generator=g)
        for heads, n in ((hq, sq), (hkv, skv), (hkv, skv))
    )
    return [2 * q, 2 * k, v]


def antidiagonal_scores(q: Tensor, k: Tensor, stride: int) -> list[dict[int, float]]:
    """Per group of `stride` query positions: key group -> weight, for one head in float64."""
    sq, skv, dim = len(q), len(k), q.shape[1]
    offset, size = skv - sq, math.ceil(skv / stride)
    products = (q.double() @ k.double().T / math.sqrt(dim)).tolist()
    rows = []
    for a in range(size):
        score = {}
        for b in range(a + 1):
            total = 0.0
            for s in range(stride):
                i, j = a * stride + (stride - 1 - s) - offset, b * stride + s
                if 0 <= i < sq and j < skv:
                    total += products[i][j]
            score[b] = math.exp(total / stride)
        norm = sum(score.values())
        rows.append({b: x / norm for b, x in score.items()})
    return rows


def kept_pairs(q: Tensor, k: Tensor, stride: int, threshold: float, block: int) -> Tensor:
    """bool [Sq, Skv] of one head, from the rule of the paper."""
    sq, skv = len(q), len(k)
    offset, per_block = skv - sq, block // stride
    weight = antidiagonal_scores(q, k, stride)
    keep = torch.zeros(sq, skv, dtype=torch.bool)
    for own in range(offset // block, math.ceil(skv / block)):
        mass = [0.0] * (own + 1)
        for a in range(own * per_block, (own + 1) * per_block):
            first, last = a * stride - offset, (a + 1) * stride - 1 - offset
            if last < 0 or first >= sq:
                continue
            for b, x in weight[a].items():
                mass[b // per_block] += x
        chosen = {0, own}
        for j in sorted(range(own), key=lambda j: (-mass[j], j)):
            if threshold < 1 and sum(mass[c] for c in chosen) >= threshold * sum(mass):
                break
            chosen.add(j)
        rows = slice(max(own * block - offset, 0), (own + 1) * block - offset)
        for j in chosen:
            keep[rows, j * block : (j + 1) * block] = True
    return keep & (torch.arange(skv) <= torch.arange(sq)[:, None] + offset)


@pytest.mark.parametrize("threshold", [0.3, 0.9])
@pytest.mark.parametrize("name", CASES)
def test_plan_is_the_rule_of_the_paper(name: str, threshold: float):
    batch, hq, hkv, sq, skv, stride, block = CASES[name]
    q, k, v = draw(batch, hq, hkv, sq, skv)
    plan = plan_xattention(q, k, stride=stride, threshold=threshold, block=block)
    plan.check_values()
    want = torch.stack(
        [
            torch.stack(
                [
                    kept_pairs(q[b, h], k[b, h * hkv // hq], stride, threshold, block)
                    for h in range(hq)
                ]
            )
            for b in range(batch)
        ]
    )
    assert torch.equal(visible_pairs(plan, batch, hq) == 1, want)
    exact, _ = masked_attention(*(x.double() for x in (q, k, v)), want, 0.25)
    plain, _ = masked_attention(q, k, v, want, 0.25)
    for backend in ("reference", "cpu"):
        assert_within(sparse_attention(q, k, v, plan, backend=backend), plain, exact, backend)


@pytest.mark.parametrize("name", CASES)
def test_keeping_everything_is_dense(name: str):
    batch, hq, hkv, sq, skv, stride, block = CASES[name]
    q, k, _ = draw(batch, hq, hkv, sq, skv)
    plan = plan_xattention(q, k, stride=stride, threshold=1.0, block=block)
    seen = visible_pairs(plan, batch, hq) == 1
    want = torch.arange(skv) <= torch.arange(sq)[:, None] + skv - sq
    assert torch.equal(seen, want.expand_as(seen))


def test_a_stronger_block_is_kept_and_a_weaker_one_is_not():
    q, k, _ = draw(1, 1, 1, 512, 512)
    q, k = 0.1 * q, 0.1 * k
    q[..., 0], k[:, :, 128:160, 0] = 6.0, 6.0
    plan = plan_xattention(q, k, stride=8, threshold=0.9, block=32)
    mask = plan.parts[0].index.to_block_mask(16)[0, 0]
    assert mask[5:].sum(-1).max() <= 3 and mask[5:, 4].all()


def test_chunks_do_not_change_a_list(monkeypatch):
    from permattn.core import selection

    q, k, _ = draw(2, 4, 2, 300, 421)
    whole = plan_xattention(q, k, stride=4, block=32).parts[0].index
    monkeypatch.setattr(selection, "_CHUNK_BYTES", 1)
    rows = plan_xattention(q, k, stride=4, block=32).parts[0].index
    assert torch.equal(whole.to_block_mask(14), rows.to_block_mask(14))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_other_dtypes_and_strided_inputs(dtype: torch.dtype):
    inputs = draw(2, 4, 2, 90, 130)
    q, k, v = (x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in inputs)
    plan = plan_xattention(q, k, stride=4, block=16)
    plan.check_values()
    want = visible_pairs(plan, 2, 4) == 1
    assert want[..., 40:].diagonal(dim1=-2, dim2=-1).all(), "every query sees itself"
    exact, _ = masked_attention(*(x.double() for x in (q, k, v)), want, 0.25)
    plain, _ = masked_attention(q, k, v, want, 0.25)
    assert_within(sparse_attention(q, k, v, plan), plain, exact, str(dtype))


def test_never_waits_for_the_device():
    q, k = torch.empty(2, 4, 5000, 64, device="meta"), torch.empty(2, 2, 9001, 64, device="meta")
    plan = plan_xattention(q, k)
    assert plan.device.type == "meta" and plan.parts[0].index.num_q_blocks == 40


@pytest.mark.parametrize(("sq", "skv"), [(0, 0), (0, 40)])
def test_no_query_is_an_empty_plan(sq: int, skv: int):
    q, k, v = draw(1, 2, 1, sq, skv)
    assert sparse_attention(q, k, v, plan_xattention(q, k)).shape == (1, 2, 0, 16)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"stride": 0}, "stride: wants an integer that divides block 128, got 0"),
        ({"stride": 7}, "stride: .* got 7"),
        ({"threshold": 0.0}, "threshold: wants a share"),
        ({"threshold": 1.5}, "threshold: .* got 1.5"),
        ({"block": 0}, "block: wants an integer >= 1, got 0"),
    ],
    ids=str,
)
def test_bad_input_is_named(change: dict, match: str):
    q, k, _ = draw(1, 2, 1, 40, 40)
    with pytest.raises(ValueError, match=match):
        plan_xattention(q, k, **change)


@pytest.mark.parametrize(
    ("q_shape", "k_shape", "match"),
    [
        ((1, 2, 9, 8), (1, 2, 5, 8), r"q: wants at most as many rows as keys \(5\), got 9"),
        ((1, 3, 9, 8), (1, 2, 9, 8), "Hq % Hkv"),
        ((1, 2, 9, 8), (2, 2, 9, 8), "q, k: want"),
        ((1, 2, 9, 8), (1, 2, 9, 4), "q, k: want"),
    ],
    ids=["rows", "heads", "batch", "head-dim"],
)
def test_sizes_that_disagree_are_named(q_shape, k_shape, match: str):
    with pytest.raises(ValueError, match=match):
        plan_xattention(torch.zeros(q_shape), torch.zeros(k_shape))
