"""The online probe finds what was planted."""

import pytest
import torch
from permattn import TokenGrid, plan_prefill
from permattn.patterns.mminference import HeadPattern
from permattn.patterns.mminference import probe as probe_module
from permattn.patterns.mminference.lines import choose_lines
from permattn.patterns.mminference.probe import (
    column_mass,
    diagonal_mass,
    make_probe,
    slash_mass,
    vertical_mass,
)
from permattn.patterns.mminference.prompt import describe_prompt
from permattn.testing import visible_pairs

CPU = torch.device("cpu")


def prompt(segments, n, skv=None):
    return describe_prompt((tuple(segments),), n, skv or n, (0,), (0,), CPU)


def planted(grid: TokenGrid, n: int, stride: int, phase: int, signal: float, heads: int):
    """Keys on one vertical line stand out by `signal` logits against unit noise."""
    q = torch.randn(1, heads, n, 16)
    k = torch.randn(1, heads, n, 16)
    q[..., 0] = 4.0
    k[..., 0] = torch.randn(1, heads, n) * 0.25
    token = grid.token_of_rank()
    k[:, :, token[phase::stride], 0] += signal
    return q, k


def test_stride_and_phase_of_planted_grids():
    """98 of 100: 400 planted cases, 5 candidate strides, noise of the size of the signal."""
    g = torch.Generator().manual_seed(0)
    right = total = 0
    for case in range(50):
        torch.manual_seed(case)
        height, width = (int(torch.randint(3, 9, (1,), generator=g)) for _ in range(2))
        grid = TokenGrid(int(torch.randint(0, 30, (1,), generator=g)), 24, height, width)
        n = grid.stop + 20
        options = sorted({height * width, width, height * width + 1, 7, 11} - {1})
        stride = options[int(torch.randint(len(options), (1,), generator=g))]
        phase = int(torch.randint(stride, (1,), generator=g))
        q, k = planted(grid, n, stride, phase, 4.0, heads=8)
        heads = [HeadPattern("grid", strides=tuple(options), local=16, sink=0)] * 8
        (lines,) = choose_lines(q, k, prompt([grid], n), heads).grids[0]
        right += int(((lines.v_stride == stride) & (lines.v_phase == phase)).sum())
        total += 8
    assert total == 400 and right >= 392, f"{right} of {total}"


@pytest.mark.parametrize("phase", range(6))
def test_same_place_in_earlier_frames_is_found_at_every_shift(phase):
    """Slash lines: a query of rank r looks at ranks r - phase modulo the frame."""
    grid = TokenGrid(3, 40, 2, 3)
    n = grid.stop + 5
    torch.manual_seed(phase)
    code = torch.eye(6)
    q, k = torch.randn(1, 2, n, 8) * 0.1, torch.randn(1, 2, n, 8) * 0.1
    rank = torch.arange(grid.num_tokens)
    k[:, :, grid.token_of_rank(), :6] += 5 * code[rank % 6]
    q[:, :, grid.token_of_rank(), :6] += 5 * code[(rank - phase) % 6]
    heads = [HeadPattern("auto", local=12), HeadPattern("auto", local=12, s=False)]
    (lines,) = choose_lines(q, k, prompt([grid], n), heads).grids[0]
    assert (int(lines.s_stride[0]), int(lines.s_phase[0])) == (6, phase)
    assert int(lines.s_stride[1]) == 0


def test_each_video_gets_its_own_phase():
    torch.manual_seed(0)
    one, two = TokenGrid(4, 20, 3, 4), TokenGrid(260, 20, 4, 5)
    n = two.stop + 6
    q, k = planted(one, n, 12, 5, 6.0, heads=2)
    k[:, :, two.token_of_rank()[17::20], 0] += 6.0
    heads = [HeadPattern("grid", strides=("frame",), local=8, sink=0)] * 2
    first, second = choose_lines(q, k, prompt([one, two], n), heads).grids[0]
    assert first.v_stride.tolist() == [12, 12] and first.v_phase.tolist() == [5, 5]
    assert second.v_stride.tolist() == [20, 20] and second.v_phase.tolist() == [17, 17]


def test_auto_leaves_noise_alone():
    torch.manual_seed(0)
    grid = TokenGrid(4, 50, 4, 5)
    n = grid.stop + 10
    q, k = torch.randn(1, 4, n, 16) * 0.3, torch.randn(1, 4, n, 16) * 0.3
    lines = choose_lines(q, k, prompt([grid], n), [HeadPattern(local=32, sink=2, last=8)] * 4)
    assert (lines.grids[0][0].v_stride == 0).all() and (lines.grids[0][0].s_stride == 0).all()
    assert lines.columns.sum() == 4 * 2 and (lines.slashes == -1).all()
    assert lines.rows.sum() == 4 * 10


@pytest.mark.parametrize("chunk", [1 << 28, 1], ids=["whole", "chunks"])
def test_masses_are_those_of_the_softmax(chunk, monkeypatch):
    monkeypatch.setattr(probe_module, "_CHUNK_BYTES", chunk)
    torch.manual_seed(0)
    n, skv = 300, 2500
    q, k = torch.randn(1, 4, n, 8, dtype=torch.float64), torch.randn(1, 2, skv, 8).double()
    frames = tuple(2100 + 11 * i for i in range(30))
    grid = TokenGrid(2100, 30, 2, 4, frame_starts=frames)
    where = prompt([grid], n, skv)
    probe = make_probe(q, k, where, visual=True)
    assert (probe.whole is None) == (chunk == 1)
    last = probe.first_position[0] + 63
    assert last == grid.stop - 1
    rows = torch.arange(last - 63, last + 1)
    score = q[:, :, rows - (skv - n)] @ k.repeat_interleave(2, 1).mT * 8**-0.5
    lag = rows[:, None] - torch.arange(skv)
    p = torch.softmax(score.masked_fill(lag < 0, float("-inf")), -1)
    torch.testing.assert_close(column_mass(probe).double(), p.mean(2), atol=1e-6, rtol=1e-4)
    by_lag = torch.zeros(1, 4, skv).double()
    flat = lag.clamp_min(0).flatten().expand(1, 4, -1)
    by_lag.scatter_add_(-1, flat, torch.where(lag >= 0, p, 0.0).flatten(2))
    torch.testing.assert_close(diagonal_mass(probe).double(), by_lag / 64, atol=1e-6, rtol=1e-4)
    before = 2300
    (slash,) = slash_mass(probe, 0, where.grids[0][0], (8,), before)
    ((vertical, _),) = vertical_mass(column_mass(probe)[0], where.grids[0][0], (8,), before)
    token = grid.token_of_rank()
    rank_of = {int(t): r for r, t in enumerate(token)}
    want_v, want_s = torch.zeros(4, 8).double(), torch.zeros(4, 8).double()
    visual = [r for r in range(64) if int(rows[r]) in rank_of]
    for t, r in rank_of.items():
        if t < before:
            want_v[:, r % 8] += p[0, :, :, t].mean(1)
            for row in visual:
                c = (rank_of[int(rows[row])] - r) % 8
                want_s[:, c] += p[0, :, row, t] / len(visual)
    torch.testing.assert_close(vertical.double(), want_v, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(slash.double(), want_s, atol=1e-6, rtol=1e-4)


def test_recall_of_constructed_heads():
    """At most 14 % density, at least 95 % of the attention mass: grid, local, sink and vertical."""
    torch.manual_seed(0)
    grid = TokenGrid(8, 64, 4, 8)
    n = grid.stop + 16
    q, k = torch.randn(1, 4, n, 32) * 0.3, torch.randn(1, 4, n, 32) * 0.3
    q[..., 0] = 8.0
    k[0, 0, grid.token_of_rank()[5::32], 0] += 8.0  # grid line by frame
    k[0, 2, 0, 0] += 12.0  # sink
    k[0, 3, torch.randint(8, n, (20,)), 0] += 10.0  # vertical
    position = torch.arange(n)
    angle = position[:, None] * 0.5 ** torch.arange(13) * 0.7
    wave = torch.cat([angle.cos(), angle.sin()], -1) * 4.0
    q[0, 1, :, :26], k[0, 1, :, :26] = wave, wave  # local
    plan = plan_prefill(q, k, [[grid]], [HeadPattern(local=64, sink=4, last=16)] * 4)
    seen = visible_pairs(plan, 1, 4)[0] > 0
    p = (q[0] @ k[0].mT * 32**-0.5).masked_fill(position[:, None] < position, float("-inf"))
    p = p.softmax(-1)
    recall = (p * seen).sum(-1).mean(-1)
    density = seen.float().sum((1, 2)) / (n * (n + 1) / 2)
    assert (recall >= 0.95).all() and (density <= 0.14).all(), (recall, density)
