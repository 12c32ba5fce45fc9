"""MMInference's plans of every pattern and boundary on the Triton kernels."""

import pytest
import torch
from patterns.test_mminference_plans import HEADS, PROMPTS
from permattn import plan_prefill
from permattn import sparse_attention_with_lse as attend
from permattn.testing import assert_within, masked_attention, visible_pairs


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("name", ["chunk-of-audio", "timestamps"])
def test_plans_equal_masked_attention(name, kind):
    sq, skv, rows = PROMPTS[name]
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, h, n, 16) for h, n in ((4, sq), (2, skv), (2, skv)))
    plan = plan_prefill(q, k, rows, HEADS[kind])
    out, lse = attend(q, k, v, plan, backend="triton")
    seen = visible_pairs(plan, 1, 4) > 0
    exact, exact_lse = masked_attention(q.double(), k.double(), v.double(), seen, 0.25)
    plain, _ = masked_attention(q, k, v, seen, 0.25)
    assert_within(out, exact, plain, "out")
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=1e-5)
