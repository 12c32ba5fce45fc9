"""FlexPrefill's plan against the paper's rule, pair by pair and token by token."""

from __future__ import annotations

import math

import pytest
import torch
from permattn import plan_flexprefill, sparse_attention
from permattn.testing import assert_within, masked_attention, visible_pairs
from torch import Tensor

CASES = {
    "square": (1, 2, 2, 192, 192, 32),
    "tail": (1, 2, 2, 201, 201, 32),
    "grouped-batch": (2, 4, 2, 150, 150, 16),
    "second-turn": (1, 2, 1, 64, 160, 32),
    "unaligned-turn": (2, 2, 2, 75, 183, 32),
    "fewer-rows-than-a-block": (1, 2, 2, 5, 77, 16),
    "one-query": (1, 2, 2, 1, 77, 16),
    "shorter-than-a-block": (1, 2, 1, 9, 9, 32),
}


def draw(batch: int, hq: int, hkv: int, sq: int, skv: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(sq + 7 * skv)
    q, k, v = (
        torch.randn(batch, heads, n, 16, generator=g)
        for heads, n in ((hq, sq), (hkv, skv), (hkv, skv))
    )
    # The first heads have smooth scores, which pooling can tell; the others attend to one key.
    q *= 0.2
    q[:, hq // 2 :, :, 0] += 2.0
    k[:, :, skv // 3 : skv // 3 + 1, 0] += 4.0
    return [2 * q, 2 * k, v]


def softmax(row: list[float]) -> list[float]:
    weight = [math.exp(x) for x in row]
    return [x / sum(weight) for x in weight]


def fewest(mass: list[float], share: float, least: int) -> set[int]:
    order = sorted(range(len(mass)), key=lambda i: (-mass[i], i))
    kept: list[int] = []
    for i in order:
        enough = share < 1 and sum(mass[j] for j in kept) >= share * sum(mass)
        if enough and len(kept) >= least:
            break
        kept.append(i)
    return set(kept)


def mean(rows: Tensor) -> Tensor:
    return rows.double().mean(0)


def kept_pairs(
    q: Tensor, k: Tensor, gamma: float, tau: float, block: int, least: int
) -> tuple[Tensor, bool]:
    """bool [Sq, Skv] of one head, from the rules of the paper; whether it is query-aware."""
    sq, skv, scale = len(q), len(k), q.shape[1] ** -0.5
    offset, num_blocks = skv - sq, math.ceil(skv / block)
    columns, diagonals = [0.0] * num_blocks, [0.0] * num_blocks
    rows = range(max(0, sq - block), sq)
    for i in rows:
        seen = i + offset + 1
        for j, p in enumerate(softmax((q[i].double() @ k[:seen].double().T * scale).tolist())):
            columns[j // block] += p / len(rows)
            diagonals[(i + offset - j) // block] += p / len(rows)
    k_pooled = torch.stack([mean(k[j * block : (j + 1) * block]) for j in range(num_blocks)])
    guess = softmax((k_pooled @ mean(q[rows.start :]) * scale).tolist())
    divergence = 0.0
    for a, b in zip(guess, columns, strict=True):
        m = (a + b) / 2
        divergence += sum(x * math.log(x / m) for x in (a, b) if x > 0) / 2
    aware = math.sqrt(max(divergence, 0.0)) < tau

    def on_lines(share: float, own: int) -> set[int]:
        kept = fewest(columns, share, least) | {0}
        for g in fewest(diagonals, share, least) | {0}:
            kept |= {own - g, own - g - 1}
        return {j for j in kept if 0 <= j <= own}

    chosen: dict[int, set[int]] = {}
    pooled: dict[tuple[int, int], float] = {}
    for own in range(offset // block, num_blocks):
        chosen[own] = on_lines(0.0 if aware else gamma, own)
        first, last = max(own * block - offset, 0), (own + 1) * block - offset
        weight = softmax((k_pooled[: own + 1] @ mean(q[first:last]) * scale).tolist())
        pooled |= {(own, j): p for j, p in enumerate(weight)}
    if aware:
        pairs = list(pooled)
        for n in fewest(list(pooled.values()), gamma, 0):
            own, j = pairs[n]
            chosen[own].add(j)
    keep = torch.zeros(sq, skv, dtype=torch.bool)
    for own, blocks in chosen.items():
        for j in blocks:
            first, last = max(own * block - offset, 0), (own + 1) * block - offset
            keep[first:last, j * block : (j + 1) * block] = True
    return keep & (torch.arange(skv) <= torch.arange(sq)[:, None] + offset), aware


@pytest.mark.parametrize("gamma", [0.4, 0.9])
@pytest.mark.parametrize("tau", [0.0, 0.3, 9.0], ids=["lines", "mixed", "query-aware"])
@pytest.mark.parametrize("name", CASES)
def test_plan_is_the_rule_of_the_paper(name: str, tau: float, gamma: float):
    batch, hq, hkv, sq, skv, block = CASES[name]
    q, k, v = draw(batch, hq, hkv, sq, skv)
    plan = plan_flexprefill(q, k, gamma=gamma, tau=tau, block=block, min_budget=2 * block - 1)
    plan.check_values()
    found = [
        [kept_pairs(q[b, h], k[b, h * hkv // hq], gamma, tau, block, 2) for h in range(hq)]
        for b in range(batch)
    ]
    want = torch.stack([torch.stack([mask for mask, _ in row]) for row in found])
    if 0 < tau < 1 and name in ("square", "tail", "grouped-batch"):
        assert len({aware for row in found for _, aware in row}) == 2, "wants heads of both kinds"
    assert torch.equal(visible_pairs(plan, batch, hq) == 1, want)
    exact, _ = masked_attention(*(x.double() for x in (q, k, v)), want, 0.25)
    plain, _ = masked_attention(q, k, v, want, 0.25)
    for backend in ("reference", "cpu"):
        assert_within(sparse_attention(q, k, v, plan, backend=backend), plain, exact, backend)


@pytest.mark.parametrize("tau", [0.0, 9.0], ids=["lines", "query-aware"])
@pytest.mark.parametrize("name", CASES)
def test_keeping_everything_is_dense(name: str, tau: float):
    batch, hq, hkv, sq, skv, block = CASES[name]
    q, k, _ = draw(batch, hq, hkv, sq, skv)
    plan = plan_flexprefill(q, k, gamma=1.0, tau=tau, block=block, min_budget=0)
    seen = visible_pairs(plan, batch, hq) == 1
    want = torch.arange(skv) <= torch.arange(sq)[:, None] + skv - sq
    assert torch.equal(seen, want.expand_as(seen))


def test_a_column_and_a_diagonal_are_found():
    n, block = 512, 32
    g = torch.Generator().manual_seed(0)
    q, k = (0.2 * torch.randn(1, 2, n, 64, generator=g) for _ in range(2))
    q[:, 0, :, 0], k[:, 0, 130, 0] = 6.0, 12.0
    # Query i and key i - 200 of the second head share a direction.
    code = torch.randn(n + 200, 64, generator=g)
    code = 9 * torch.nn.functional.normalize(code, dim=-1)
    q[0, 1] += code[:n]
    k[0, 1] += code[200:]
    plan = plan_flexprefill(q, k, gamma=0.8, tau=0.0, block=block, min_budget=0)
    column, diagonal = plan.parts[0].index.to_block_mask(n // block)[0]
    assert column[5:, 130 // block].all()
    row = torch.arange(200, n)
    assert diagonal[row // block, (row - 200) // block].all()
    # The diagonal and the own one, two blocks each; the first; two columns that the last rows see.
    assert diagonal[8:].sum(-1).max() <= 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_other_dtypes_and_strided_inputs(dtype: torch.dtype):
    inputs = draw(2, 4, 2, 90, 130)
    q, k, v = (x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in inputs)
    plan = plan_flexprefill(q, k, block=16, min_budget=16)
    plan.check_values()
    want = visible_pairs(plan, 2, 4) == 1
    assert want[..., 40:].diagonal(dim1=-2, dim2=-1).all(), "every query sees itself"
    exact, _ = masked_attention(*(x.double() for x in (q, k, v)), want, 0.25)
    plain, _ = masked_attention(q, k, v, want, 0.25)
    assert_within(sparse_attention(q, k, v, plan), plain, exact, str(dtype))


def test_never_waits_for_the_device():
    q, k = torch.empty(2, 4, 5000, 64, device="meta"), torch.empty(2, 2, 9001, 64, device="meta")
    plan = plan_flexprefill(q, k)
    assert plan.device.type == "meta" and plan.parts[0].index.num_q_blocks == 40


@pytest.mark.parametrize(("sq", "skv"), [(0, 0), (0, 40)])
def test_no_query_is_an_empty_plan(sq: int, skv: int):
    q, k, v = draw(1, 2, 1, sq, skv)
    assert sparse_attention(q, k, v, plan_flexprefill(q, k)).shape == (1, 2, 0, 16)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"gamma": 0.0}, "gamma: wants a share"),
        ({"gamma": 1.01}, "gamma: .* got 1.01"),
        ({"tau": -0.1}, "tau: wants a distance >= 0, got -0.1"),
        ({"tau": float("nan")}, "tau: .* got nan"),
        ({"min_budget": -1}, "min_budget: wants an integer >= 0, got -1"),
        ({"block": 0}, "block: wants an integer >= 1, got 0"),
    ],
    ids=str,
)
def test_bad_input_is_named(change: dict, match: str):
    q, k, _ = draw(1, 2, 1, 40, 40)
    with pytest.raises(ValueError, match=match):
        plan_flexprefill(q, k, **change)
