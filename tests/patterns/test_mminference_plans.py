"""Every plan against a dense boolean mask that is written apart from the planner."""

import pytest
import torch
from permattn import TokenGrid, TokenRun, plan_prefill, sparse_attention
from permattn.patterns.mminference import (
    HeadPattern,
    plan_a_shape,
    plan_grid_prefill,
    plan_tri_shape,
    plan_vertical_slash,
)
from permattn.testing import masked_attention, visible_pairs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .reference_masks import lines_of, wanted

VIDEO = TokenGrid(7, 12, 4, 5)
SECOND = TokenGrid(256, 6, 3, 4)
STAMPED = TokenGrid(10, 8, 3, 4, frame_starts=tuple(10 + i * 17 + i % 3 for i in range(8)))
IMAGE = TokenGrid(20, 1, 6, 6)

SMALL_A = HeadPattern("a_shape", sink=3, local=5)
DENSE = HeadPattern("dense")
BLOCKS = HeadPattern("block_sparse", sink=2, local=5, blocks=1)
HEADS = {
    "grid": [
        HeadPattern("grid", sink=4, local=20, last=10),
        HeadPattern("grid", sink=0, local=20, last=0, h=False),
        HeadPattern("grid", sink=3, local=33, s=False),
        HeadPattern("grid", sink=3, local=9, v=False, h=False, strides=(7, "row")),
    ],
    "mixed": [
        HeadPattern("auto", sink=4, local=16, vertical=30, slash=4),
        HeadPattern("vertical_slash", sink=4, local=16, vertical=30, slash=4),
        HeadPattern("a_shape", sink=9, local=40),
        HeadPattern("tri_shape", sink=9, local=40, last=30),
    ],
    "dense-among-sparse": [
        HeadPattern("dense"),
        HeadPattern("a_shape", sink=0, local=1),
        HeadPattern("dense", sink=0),
        HeadPattern("grid", local=5),
    ],
    "slash-at-every-lag": [HeadPattern("vertical_slash", sink=0, local=1, vertical=9, slash=7)] * 4,
    "blocks": [
        HeadPattern("block_sparse", sink=0, local=1, blocks=2),
        HeadPattern("block_sparse", sink=5, local=70, blocks=3),
        HeadPattern("block_sparse", sink=70, local=16, blocks=100, coverage=0.6),
        HeadPattern("grid", sink=3, local=70),
    ],
    "q-boundary": [
        HeadPattern("vertical_slash", sink=4, local=9, vertical=20, slash=3, boundary="q"),
        HeadPattern("grid", sink=4, local=20, last=10, boundary="q"),
        HeadPattern("grid", local=9, boundary="q", when={"text": SMALL_A, "audio": DENSE}),
        HeadPattern("block_sparse", local=8, blocks=2, boundary="q", when={"vision": SMALL_A}),
    ],
    "2d-boundary": [
        HeadPattern("vertical_slash", sink=4, local=9, vertical=20, slash=3, boundary="2d"),
        HeadPattern("grid", sink=4, local=20, last=10, boundary="2d"),
        HeadPattern(
            "auto",
            local=9,
            boundary="2d",
            when={"text,vision": SMALL_A, "vision,text": BLOCKS, "text,text": DENSE},
        ),
        HeadPattern("block_sparse", local=8, blocks=2, boundary="2d"),
    ],
    "every-boundary": [
        HeadPattern("vertical_slash", sink=4, local=9, vertical=20, slash=3, boundary="2d"),
        HeadPattern("grid", sink=4, local=20, last=10, boundary="k"),
        HeadPattern("dense", boundary="2d"),
        HeadPattern("auto", local=9, boundary="q"),
    ],
}
PROMPTS = {
    "two-videos": (350, 350, [[TokenRun(0, 7), VIDEO, SECOND]]),
    "chunk": (150, 350, [[VIDEO, SECOND]]),
    "chunk-after-the-video": (20, 350, [[VIDEO]]),
    "timestamps": (170, 170, [[STAMPED]]),
    "audio-between": (
        280,
        280,
        [[TokenRun(0, 10, "audio"), STAMPED, TokenRun(170, 20, "audio"), TokenGrid(195, 5, 3, 4)]],
    ),
    "chunk-of-audio": (33, 203, [[STAMPED, TokenRun(160, 43, "audio")]]),
    "many-frames": (1060, 1060, [[TokenGrid(5, 520, 1, 2)]]),
    "no-text": (180, 180, [[TokenGrid(0, 9, 4, 5)]]),
    "image-only": (90, 90, [[IMAGE]]),
    "text-only": (333, 333, None),
    "one-token": (1, 1, None),
    "last-token": (1, 260, [[VIDEO]]),
    "cut-video": (100, 100, [[VIDEO]]),
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("name", PROMPTS)
def test_plan_equals_its_mask(name, kind):
    sq, skv, rows = PROMPTS[name]
    heads = HEADS[kind]
    torch.manual_seed(len(name))
    q, k = torch.randn(1, 4, sq, 16) * 2, torch.randn(1, 2, skv, 16) * 2
    plan = plan_prefill(q, k, rows, heads)
    plan.check_values()
    seen = visible_pairs(plan, 1, 4)
    assert seen.max() <= 1, "parts must be disjoint"
    prompt, chosen = lines_of(q, k, rows, heads)
    want, legal = wanted(q, k, rows, heads, prompt, chosen)
    assert not ((seen > 0) & ~legal).any(), "only causal pairs"
    assert not (want & (seen == 0)).any(), "every wanted pair"
    # A diagonal covers whole granules; every other pattern is exact to the pair.
    exact = ~torch.stack([(lines.slashes >= 0).any(-1) for _, lines in chosen]).any(0)
    assert torch.equal((seen > 0)[exact], want[exact])


@pytest.mark.parametrize("kind", HEADS)
def test_batch_with_padding(kind):
    torch.manual_seed(1)
    heads = HEADS[kind]
    q, k, v = torch.randn(2, 4, 200, 16), torch.randn(2, 2, 300, 16), torch.randn(2, 2, 300, 16)
    left, right = (3, 150), (0, 17)
    rows = [[VIDEO], [TokenGrid(160, 9, 2, 6), TokenRun(270, 9, "audio")]]
    plan = plan_prefill(q, k, rows, heads, left_pad=left, right_pad=right)
    plan.check_values()
    seen = visible_pairs(plan, 2, 4)
    prompt, chosen = lines_of(q, k, rows, heads, left, right)
    want, legal = wanted(q, k, rows, heads, prompt, chosen)
    assert seen.max() == 1 and not ((seen > 0) & ~legal).any()
    assert not (want & (seen == 0)).any()
    out = sparse_attention(q, k, v, plan)
    exact, _ = masked_attention(*(x.double() for x in (q, k, v)), seen > 0, 0.25)
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
    assert (out[1, :, -17:] == 0).all() and (out[1, :, :50] == 0).all()


@pytest.mark.parametrize("n", [1, 17, 200])
def test_static_patterns_are_what_they_say(n):
    i, j = torch.arange(n)[:, None], torch.arange(n)
    a_shape = (j <= i) & ((j < 9) | (i - j < 30))
    plan = plan_a_shape(n, sink=9, local=30)
    assert plan.leading_sizes() == (1, 1)
    assert torch.equal(visible_pairs(plan, 1, 1)[0, 0] == 1, a_shape)
    tri = a_shape | ((j <= i) & (i >= n - 12))
    plan = plan_tri_shape(n, sink=9, local=30, last=12)
    assert torch.equal(visible_pairs(plan, 1, 1)[0, 0] == 1, tri)


def test_vertical_slash_keeps_the_strongest():
    torch.manual_seed(0)
    n, head_dim = 400, 32
    q, k = torch.randn(1, 1, n, head_dim) * 0.1, torch.randn(1, 1, n, head_dim) * 0.1
    q[..., 0] += 6.0
    for column in (100, 171):
        k[:, :, column, 0] += 8.0
    plan = plan_vertical_slash(q, k, vertical=2, slash=0, local=20, sink=0)
    seen = visible_pairs(plan, 1, 1)[0, 0]
    assert (seen[200:, [100, 171]] == 1).all()
    i, j = torch.arange(n)[:, None], torch.arange(n)
    other = (j <= i) & (i - j >= 20) & (j != 100) & (j != 171)
    assert not seen[other].any()


def test_a_text_tail_after_the_video_is_dense():
    torch.manual_seed(0)
    video = TokenGrid(0, 10, 3, 4)
    q = torch.randn(1, 2, 220, 16)
    plan = plan_grid_prefill(q, q, [video], HeadPattern(local=8, last=4, sink=1))
    seen = visible_pairs(plan, 1, 2)
    tail = torch.arange(120, 220)
    assert torch.equal(seen[0, 0, tail] == 1, torch.arange(220) <= tail[:, None])


class LargestTensor(TorchDispatchMode):
    """Watches every operator's results."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("kind", ["no-boundary", "boundaries"])
@pytest.mark.parametrize("padding", [(0, 0), (5, 9)], ids=["whole", "padded"])
def test_planning_never_waits_for_the_device_and_makes_nothing_quadratic(padding, kind):
    """On the meta device any wait (.item(), bool(), a data-dependent size) raises."""
    n = 1 << 17
    video = TokenGrid(100, 500, 16, 16)
    rows = [[video, TokenRun(video.stop + 5, 400, "audio")]]
    q, k = torch.empty(1, 4, n, 64, device="meta"), torch.empty(1, 2, n, 64, device="meta")
    heads = [
        HeadPattern("auto"),
        *(HeadPattern(x) for x in ("grid", "vertical_slash", "tri_shape")),
    ]
    if kind != "no-boundary":
        heads[1:] = [
            HeadPattern("block_sparse", coverage=0.9),
            HeadPattern(boundary="q", coverage=0.9, local=100),
            HeadPattern("grid", boundary="2d", when={"text,vision": HeadPattern("block_sparse")}),
        ]
    with LargestTensor() as seen:
        plan = plan_prefill(q, k, rows, heads, left_pad=padding[:1], right_pad=padding[1:])
        for part in plan.parts:
            part.index.transpose(part.num_kv_blocks)
    assert plan.device.type == "meta" and seen.numel <= 1 << 26 < n * n // 100


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda q: plan_prefill(q, q[:, :, :4], None, [HeadPattern()] * 4), r"q: .*\(4\), got 8"),
        (lambda q: plan_prefill(q, q, None, [HeadPattern()] * 3), "heads: wants 4 patterns, got 3"),
        (lambda q: plan_prefill(q, q[:, :3], None, [HeadPattern()] * 4), "Hq % Hkv"),
        (lambda q: plan_prefill(q, q, [[]] * 2, [HeadPattern()] * 4), r"rows: .*\(1\), got 2"),
        (
            lambda q: plan_prefill(q, q, None, [HeadPattern()] * 4, left_pad=[9]),
            "left_pad, right_pad: .* 8 keys",
        ),
        (
            lambda q: plan_prefill(q, q, [[TokenRun(99, 1)]], [HeadPattern()] * 4),
            "starts at 99, past the 8 keys",
        ),
        (
            lambda q: plan_prefill(
                q, q, [[TokenGrid(0, 2, 1, 2), TokenRun(3, 2)]], HEADS["blocks"]
            ),
            "claims tokens of another segment",
        ),
        (lambda q: plan_prefill(q[0], q, None, []), r"q: wants \[B, H, S, D\], got shape"),
        (lambda q: plan_prefill(q, q[..., :4], None, HEADS["blocks"]), r"k: wants q's batch"),
        (lambda q: HeadPattern("gird"), "pattern: wants one of .* got 'gird'"),
        (lambda q: HeadPattern(local=0), "local: wants an integer >= 1, got 0"),
        (lambda q: HeadPattern(sink=-1), "sink: wants an integer >= 0, got -1"),
        (lambda q: HeadPattern(strides=("column",)), "strides: wants 'frame', 'row'"),
        (lambda q: plan_a_shape(9, num_kv_tokens=5), "Sq = 9, Skv = 5"),
    ],
    ids=[
        "q",
        "heads",
        "gqa",
        "rows",
        "pads",
        "segment",
        "overlap",
        "axes",
        "head-dim",
        "name",
        "local",
        "sink",
        "stride",
        "static",
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call(torch.randn(1, 4, 8, 16))


@pytest.mark.parametrize("kind", ["grid", "2d-boundary"])
def test_two_plans_of_one_prompt_are_the_same(kind):
    torch.manual_seed(0)
    sq, skv, rows = PROMPTS["timestamps"]
    q, k = torch.randn(1, 4, sq, 16) * 2, torch.randn(1, 2, skv, 16) * 2
    first = plan_prefill(q, k, rows, HEADS[kind])
    for _ in range(40):
        again = plan_prefill(q, k, rows, HEADS[kind])
        for one, other in zip(tree_leaves(first), tree_leaves(again), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"strides": (2.5,)}, r"strides: wants 'frame', 'row' or an integer >= 2, got 2\.5"),
        ({"strides": (True,)}, "strides: .* got True"),
        ({"strides": (0,)}, "strides: .* got 0"),
        ({"strides": "frame"}, "strides: wants a sequence, got 'frame'"),
        ({"coverage": 0.0}, r"coverage: wants None or a share in \(0, 1\], got 0\.0"),
        ({"coverage": "0.9"}, "coverage: .* got '0.9'"),
        ({"coverage": float("nan")}, "coverage: .* got nan"),
        ({"h": 1}, "h: wants True or False, got 1"),
        ({"boundary": "3d"}, "boundary: wants one of .* got '3d'"),
        ({"when": {"text": DENSE}}, "boundary 'none' has one pattern for all modalities"),
        ({"boundary": "q", "when": {"text,vision": DENSE}}, "boundary 'q' wants '<modality>'"),
        ({"boundary": "2d", "when": {"text": DENSE}}, "wants '<query modality>,<key modality>'"),
        ({"boundary": "q", "when": {"text": "dense"}}, "when.'text'.: wants a HeadPattern"),
    ],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, dict) else None,
)
def test_bad_fields_of_a_head_are_named(fields, match):
    with pytest.raises(ValueError, match=match):
        HeadPattern(**fields)


def test_what_is_no_segment_is_named():
    q = torch.randn(1, 4, 8, 16)
    with pytest.raises(TypeError, match=r"rows\[0\]: wants TokenGrid and TokenRun, got 'video'"):
        plan_prefill(q, q, [["video"]], HEADS["blocks"])
