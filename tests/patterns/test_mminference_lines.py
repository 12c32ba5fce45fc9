"""The online probe finds what was planted."""

import pytest
import torch
from permattn import TokenGrid, plan_prefill
from permattn.patterns.mminference import HeadPattern
from permattn.patterns.mminference.streams import describe_streams
from permattn.testing import visible_pairs

from .reference_masks import lines_of


def chosen(q, k, row, heads):
    """What the planner chose where there is one stream."""
    _, [(_, lines)] = lines_of(q, k, [row], heads)
    return lines


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
        (lines,) = chosen(q, k, [grid], heads).grids[0]
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
    (lines,) = chosen(q, k, [grid], heads).grids[0]
    assert (int(lines.s_stride[0]), int(lines.s_phase[0])) == (6, phase)
    assert int(lines.s_stride[1]) == 0


def test_each_video_gets_its_own_phase():
    torch.manual_seed(0)
    one, two = TokenGrid(4, 20, 3, 4), TokenGrid(260, 20, 4, 5)
    n = two.stop + 6
    q, k = planted(one, n, 12, 5, 6.0, heads=2)
    k[:, :, two.token_of_rank()[17::20], 0] += 6.0
    heads = [HeadPattern("grid", strides=("frame",), local=8, sink=0)] * 2
    first, second = chosen(q, k, [one, two], heads).grids[0]
    assert first.v_stride.tolist() == [12, 12] and first.v_phase.tolist() == [5, 5]
    assert second.v_stride.tolist() == [20, 20] and second.v_phase.tolist() == [17, 17]


def test_auto_leaves_noise_alone():
    torch.manual_seed(0)
    grid = TokenGrid(4, 50, 4, 5)
    n = grid.stop + 10
    q, k = torch.randn(1, 4, n, 16) * 0.3, torch.randn(1, 4, n, 16) * 0.3
    lines = chosen(q, k, [grid], [HeadPattern(local=32, sink=2, last=8)] * 4)
    assert (lines.grids[0][0].v_stride == 0).all() and (lines.grids[0][0].s_stride == 0).all()
    assert lines.columns.sum() == 4 * 2 and (lines.slashes == -1).all()
    assert lines.rows.sum() == 4 * 10


def test_a_video_is_probed_with_its_own_rows():
    """The first video's queries show its slash lines, though a second one follows."""
    one, two = TokenGrid(3, 40, 2, 3), TokenGrid(250, 30, 2, 4)
    n = two.stop + 5
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, n, 8) * 0.1, torch.randn(1, 2, n, 8) * 0.1
    for grid, stride, phase in ((one, 6, 2), (two, 8, 5)):
        code, rank = torch.eye(8), torch.arange(grid.num_tokens)
        k[:, :, grid.token_of_rank()] += 5 * code[rank % stride]
        q[:, :, grid.token_of_rank()] += 5 * code[(rank - phase) % stride]
    lines = chosen(q, k, [one, two], [HeadPattern("auto", local=12)] * 2).grids[0]
    assert [(int(x.s_stride[0]), int(x.s_phase[0])) for x in lines] == [(6, 2), (8, 5)]


def test_a_diagonal_is_not_64_columns():
    """A head that looks 300 tokens back touches another column in every probe row."""
    torch.manual_seed(0)
    n = 1500
    code = torch.randn(1, 1, n + 300, 64)
    q, k = code[:, :, :n] * 1.5, code[:, :, 300:] * 1.0
    lines = chosen(q, k, [], [HeadPattern("auto", local=64, sink=0, slash=4)])
    assert lines.slashes[0, 0].max() == 300 and (lines.slashes[0, 0] >= 0).sum() == 1
    assert lines.columns.sum() < 8


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_coverage_keeps_the_fewest_columns_that_hold_the_share(share):
    torch.manual_seed(0)
    n = 900
    q, k = torch.randn(1, 1, n, 16) * 0.1, torch.randn(1, 1, n, 16) * 0.1
    q[..., 0] = 4.0
    k[0, 0, 100:200, 0] += torch.linspace(4, 12, 100)
    head = HeadPattern("vertical_slash", local=50, sink=10, vertical=1000, slash=9, coverage=share)
    lines = chosen(q, k, [], [head])
    p = (q[0, 0, -64:] @ k[0, 0].T / 4).softmax(-1)
    key = torch.arange(n)
    p = p.masked_fill(key > torch.arange(n - 64, n)[:, None], 0.0)
    mass = (p / p.sum(-1, keepdim=True)).mean(0)
    mass[(key < 10) | (key > n - 1 - 50)] = 0.0
    ordered = mass.sort(descending=True).values.cumsum(0)
    fewest = int((ordered < share * mass.sum()).sum()) + 1
    assert int(lines.columns.sum()) - 10 == fewest
    assert (lines.slashes < 0).all(), "nothing is left for diagonals to hold"


def test_every_modality_is_probed_by_its_own_queries():
    """Q-boundary: text looks at one column, vision at another; each stream finds its own."""
    torch.manual_seed(0)
    grid = TokenGrid(100, 10, 4, 5)
    n = grid.stop + 100
    q, k = torch.randn(1, 1, n, 8) * 0.1, torch.randn(1, 1, n, 8) * 0.1
    visual = grid.token_of_rank()
    q[..., 0] = 6.0
    q[:, :, visual, 0], q[:, :, visual, 1] = 0.0, 6.0
    k[..., 30, 0], k[..., 50, 1] = 12.0, 12.0
    head = HeadPattern("vertical_slash", local=9, sink=0, vertical=1, slash=0, boundary="q")
    _, streams = lines_of(q, k, [[grid]], [head])
    found = {
        stream.query: lines.columns[0, 0].nonzero()[:, 0].tolist() for stream, lines in streams
    }
    assert found == {"text": [30], "vision": [50]}


def test_streams_follow_the_boundaries_that_heads_ask_for():
    q = torch.randn(1, 3, 200, 8)
    row = [TokenGrid(20, 5, 4, 4)]
    heads = [HeadPattern(), HeadPattern(boundary="q"), HeadPattern(boundary="2d")]
    prompt, streams = lines_of(q, q, [row], heads)
    pairs = [(s.query, s.key) for s, _ in streams]
    text, vision = "text", "vision"
    assert pairs == [
        (None, None),
        (text, None),
        (vision, None),
        *[(a, b) for a in (text, vision) for b in (text, vision)],
    ]
    assert describe_streams(prompt, tuple(heads)) is describe_streams(prompt, tuple(heads))


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
