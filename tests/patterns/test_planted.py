"""Stride and phase of planted grid lines, read off the plan: right in at least 98 of 100 cases.

Signal to noise: scores are unit normal noise, and keys on the planted line stand out by 4 logits.
Of a query's mass the line then holds 81 % (stride 14) to 18 % (stride 257). 13 candidate strides.
"""

from __future__ import annotations

import pytest
import torch
from permattn import HeadPattern, TokenGrid, plan_prefill
from torch import Tensor

from bench.gate import visible_rows

CANDIDATES = (7, 14, 16, 28, 32, 64, 91, 128, 182, 256, 257, 364, 514)
PLANTED = (14, 16, 64, 182, 257)
SIGNAL = 4.0
VIDEO = TokenGrid(37, 40, 16, 16)
NUM_KV, NUM_Q, HEADS, DIM = VIDEO.stop + 60, 192, 8, 64
# A visual query that stands after most keys, and its rank.
ROW = VIDEO.stop - 100


def draw(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A chunk of queries at the end of the video, all keys; per head a stride and a phase."""
    g = torch.Generator().manual_seed(seed)
    stride = torch.tensor(PLANTED)[torch.randint(len(PLANTED), (HEADS,), generator=g)]
    phase = (torch.rand(HEADS, generator=g) * stride).long()
    q = torch.randn(1, HEADS, NUM_Q, DIM, generator=g)
    k = torch.randn(1, HEADS, NUM_KV, DIM, generator=g)
    # Dimension 0 carries the signal, and no noise.
    q[..., 0], k[..., 0] = DIM**0.5, 0.0
    return q, k, stride, phase


def far_ranks(q: Tensor, k: Tensor, head: HeadPattern, row: int) -> list[Tensor]:
    """Per head the ranks of the visual keys that one query sees outside its window."""
    plan = plan_prefill(q, k, [[VIDEO]], [head] * HEADS)
    seen = visible_rows(plan, torch.tensor([row - NUM_KV + NUM_Q]), 1, HEADS)[0, :, 0]
    seen[:, max(row - head.local + 1, 0) :] = False
    return [x[VIDEO.start :].nonzero()[:, 0] for x in seen]


def is_line(rank: Tensor, stride: int, phase: int) -> bool:
    """Whether some ranks are every one of a line, and no other."""
    return torch.equal(rank, torch.arange(phase, VIDEO.num_tokens, stride)[: len(rank)]) and (
        len(rank) >= (ROW - VIDEO.start - 600) // stride
    )


@pytest.mark.parametrize("pattern", ["grid", "auto"])
def test_stride_and_phase_of_400_vertical_lines(pattern: str):
    head = HeadPattern(
        pattern, strides=CANDIDATES, h=False, s=False, sink=0, local=64, vertical=0, slash=0
    )
    wrong = []
    for seed in range(400 // HEADS):
        q, k, stride, phase = draw(seed)
        rank = torch.arange(VIDEO.num_tokens)
        for h in range(HEADS):
            on_line = rank % stride[h] == phase[h]
            k[0, h, VIDEO.start : VIDEO.stop, 0] = torch.where(on_line, SIGNAL, 0.0)
        found = far_ranks(q, k, head, ROW)
        for x, s, p in zip(found, stride.tolist(), phase.tolist(), strict=True):
            if not is_line(x, s, p):
                wrong.append((s, p, x[:4].tolist()))
    assert len(wrong) <= 8, f"{len(wrong)} of 400 (stride, phase, first ranks): {wrong[:10]}"


def test_stride_and_phase_of_80_slash_lines():
    """Queries see keys a whole number of strides (plus a phase) before them."""
    head = HeadPattern(
        "grid", strides=CANDIDATES, h=False, v=False, sink=0, local=64, vertical=0, slash=0
    )
    row_rank, wrong = ROW - VIDEO.start, []
    for seed in range(80 // HEADS):
        q, k, stride, phase = draw(1000 + seed)
        g = torch.Generator().manual_seed(seed)
        rank = torch.arange(VIDEO.num_tokens)
        query_rank = torch.arange(NUM_Q) + (NUM_KV - NUM_Q - VIDEO.start)
        for h in range(HEADS):
            # Places of a stride are told apart by codes of length sqrt(4 * SIGNAL * 8): 16 logits
            # where they match, and of noise 2 logits where they do not.
            code = torch.randn(int(stride[h]), DIM, generator=g)
            code = torch.nn.functional.normalize(code, dim=-1) * (4 * SIGNAL * DIM**0.5) ** 0.5
            k[0, h, VIDEO.start : VIDEO.stop] += code[rank % stride[h]]
            q[0, h] = 0.5 * q[0, h] + code[(query_rank - phase[h]) % stride[h]]
        found = far_ranks(q, k, head, ROW)
        for x, s, p in zip(found, stride.tolist(), phase.tolist(), strict=True):
            if not is_line(x, s, (row_rank - p) % s):
                wrong.append((s, p, x[:4].tolist()))
    assert len(wrong) <= 1, f"{len(wrong)} of 80 (stride, phase, first ranks): {wrong}"


def test_a_divisor_of_the_stride_does_not_win():
    """A frame line beside slash lines: row lines hold it too, and noise, for 16 times the keys."""
    head = HeadPattern("grid", strides=("row", "frame"), h=False, s=False, sink=0, local=64)
    rank, wrong = torch.arange(VIDEO.num_tokens), []
    for seed in range(10):
        q, k, _, _ = draw(2000 + seed)
        code = torch.randn(256, DIM, generator=torch.Generator().manual_seed(seed))
        code = torch.nn.functional.normalize(code, dim=-1) * (8 * DIM**0.5) ** 0.5
        code[:, 0] = 0.0
        k[0, :, VIDEO.start : VIDEO.stop] += code[rank % 256]
        q[0] += code[(torch.arange(NUM_Q) + (NUM_KV - NUM_Q - VIDEO.start)) % 256]
        k[0, :, VIDEO.start + 100 : VIDEO.stop : 256, 0] = 6.0
        wrong += [x[:3].tolist() for x in far_ranks(q, k, head, ROW) if not is_line(x, 256, 100)]
    assert not wrong, f"first ranks: {wrong}"


def test_noise_alone_has_no_line():
    head = HeadPattern(strides=CANDIDATES, sink=0, local=64, vertical=0, slash=0)
    q, k, _, _ = draw(0)
    assert all(len(x) == 0 for x in far_ranks(q, k, head, ROW))
