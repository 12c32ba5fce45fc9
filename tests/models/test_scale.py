"""A model's own softmax scale reaches the planner, whose probe assumes 1 / sqrt(D)."""

from __future__ import annotations

import pytest
import torch
from permattn import plan_dense
from permattn.models.attention import mark_layer, run_layer, unmark_layer
from permattn.models.layer import CallCounts
from permattn.models.layout import TokenLayout
from permattn.patterns.mminference import HeadPattern


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_planner_probes_with_the_models_scale(factor: float):
    seen = []

    def planner(q, k, rows, heads, *, left_pad, right_pad):
        seen.append(q)
        return plan_dense(q.shape[2], k.shape[2], causal=True)

    module = torch.nn.Module()
    mark_layer(
        module,
        owner=object(),
        index=0,
        heads=(HeadPattern(),) * 2,
        min_q_len=1,
        planner=planner,
        backend="reference",
        counts=CallCounts(),
        report_plan=lambda layer, plan: None,
    )
    q = torch.randn(1, 2, 12, 16)
    layout = TokenLayout(rows=((),), left_pad=(0,), right_pad=(0,), q_offset=0, q_len=12)
    scale = factor * 16**-0.5
    out = run_layer(module, q, q, q, None, layout, scale)
    unmark_layer(module)
    torch.testing.assert_close(seen[0], factor * q)
    want = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True, scale=scale)
    torch.testing.assert_close(out.transpose(1, 2), want, atol=1e-5, rtol=1e-5)
