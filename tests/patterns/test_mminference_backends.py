"""Plans of every pattern and boundary on the backends, against masked float64 attention."""

import itertools
from dataclasses import replace

import pytest
import torch
from permattn import AttnPlan, HeadPattern, TokenGrid, TokenRun, plan_prefill
from permattn import sparse_attention_with_lse as attend
from permattn.testing import assert_within, masked_attention, visible_pairs

from .test_mminference_plans import HEADS, PROMPTS


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("name", ["two-videos", "chunk-of-audio", "audio-between", "text-only"])
def test_backends_equal_masked_attention(name, kind, backend):
    sq, skv, rows = PROMPTS[name]
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, h, n, 16) for h, n in ((4, sq), (2, skv), (2, skv)))
    plan = plan_prefill(q, k, rows, HEADS[kind])
    out, lse = attend(q, k, v, plan, backend=backend)
    seen = visible_pairs(plan, 1, 4) > 0
    exact, exact_lse = masked_attention(q.double(), k.double(), v.double(), seen, 0.25)
    plain, _ = masked_attention(q, k, v, seen, 0.25)
    assert_within(out, exact, plain, "out")
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=1e-5)


KEEP_ALL = {
    "window": HeadPattern("a_shape", sink=0, local=10**6),
    "sink": HeadPattern("a_shape", sink=10**6, local=1),
    "last-rows": HeadPattern("tri_shape", sink=0, local=1, last=10**6),
    "columns": HeadPattern("vertical_slash", sink=1, local=2, vertical=10**6, slash=0),
    "blocks": HeadPattern("block_sparse", sink=0, local=1, blocks=10**6),
    "grid-of-stride-2": HeadPattern("grid", sink=300, local=7, strides=(2,)),
}


@pytest.mark.parametrize("boundary", ["none", "q", "2d"])
@pytest.mark.parametrize("kind", KEEP_ALL)
def test_a_pattern_that_keeps_everything_is_dense_attention(kind, boundary):
    torch.manual_seed(0)
    n = 300
    rows = [[TokenRun(0, 20, "audio"), TokenGrid(31, 10, 4, 5), TokenGrid(282, 3, 2, 3)]]
    q, k, v = (torch.randn(1, h, n, 32) for h in (4, 2, 2))
    plan = plan_prefill(q, k, rows, [replace(KEEP_ALL[kind], boundary=boundary)] * 4)
    causal = torch.ones(1, 4, n, n, dtype=torch.bool).tril()
    assert torch.equal(visible_pairs(plan, 1, 4) == 1, causal)
    exact, _ = masked_attention(q.double(), k.double(), v.double(), causal, 32**-0.5)
    plain = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    out, _ = attend(q, k, v, plan)
    assert_within(out, exact, plain, "out")
    for order in itertools.islice(itertools.permutations(plan.parts), 1, 6):
        again, _ = attend(q, k, v, AttnPlan(order))
        assert torch.equal(out, again), "parts in any order give the same bits"


@pytest.mark.parametrize("stride", [3, 7, 20, 59, 60, 150, 10**7])
def test_strides_that_fit_or_do_not(stride):
    """A stride that does not repeat inside the video leaves window and sink; nothing else."""
    torch.manual_seed(stride % 97)
    video, n = TokenGrid(5, 6, 4, 5), 140
    q = torch.randn(1, 2, n, 16)
    head = HeadPattern("grid", sink=2, local=10, last=0, strides=(stride,))
    seen = visible_pairs(plan_prefill(q, q, [[video]], [head] * 2), 1, 2) > 0
    i, j = torch.arange(n)[:, None], torch.arange(n)
    plain = (j <= i) & ((i - j < 10) | (j < 2) | (i >= video.stop))
    if stride > video.num_tokens // 2:
        assert torch.equal(seen, plain.expand_as(seen))
    else:
        assert (seen | ~plain).all() and (seen & ~plain).any()


@pytest.mark.parametrize("phase", range(12))
def test_grid_lines_at_every_residue(phase):
    """v, h and s lines of one planted phase, pair by pair, on an odd length."""
    grid, n = TokenGrid(7, 9, 3, 4), 127
    torch.manual_seed(phase)
    q, k = torch.randn(1, 1, n, 16) * 0.1, torch.randn(1, 1, n, 16) * 0.1
    q[..., 0] = 6.0
    token = grid.token_of_rank()
    k[:, :, token[phase::12], 0] += 8.0
    head = HeadPattern("grid", sink=0, local=5, last=0, strides=("frame",), s=False)
    seen = visible_pairs(plan_prefill(q, k, [[grid]], [head]), 1, 1)[0, 0] > 0
    i, j = torch.arange(n)[:, None], torch.arange(n)
    line = torch.zeros(n, dtype=torch.bool)
    line[token[phase::12]] = True
    want = (j <= i) & ((i - j < 5) | line | line[:, None] | (i >= grid.stop))
    assert torch.equal(seen, want)
