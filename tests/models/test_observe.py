"""An observer sees the tensors of every prefill call, and may answer for the layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import BOUND, assert_same_generation, assert_same_logits, generate, logits, patched


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Lower-right causal attention: [B, Sq, Hq, Dv]."""
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


@pytest.mark.parametrize(
    "options",
    [{}, {"prefill_chunk_size": 32}, {"cache_implementation": "static", "prefill_chunk_size": 32}],
    ids=["whole", "chunks", "static-chunks"],
)
def test_sees_prefill_and_only_that(case_of, options):
    case = case_of("qwen3_vl")
    want = generate(case, **options)
    seen = []

    def watch(layer, q, k, v, layout, scale, module):
        assert module is case.model.get_decoder().layers[layer].self_attn
        assert k.shape[2] == v.shape[2] == layout.kv_len == layout.q_offset + q.shape[2]
        assert scale == pytest.approx(16**-0.5)
        seen.append((layer, q.shape[2], k.shape[2], layout.rows))

    with patched(case.model, dense_layers=[1]) as handle, handle.observe(watch):
        got = generate(case, **options)
    assert_same_generation(got, want)
    length = case.inputs["input_ids"].shape[1]
    passes = -(-length // options.get("prefill_chunk_size", length))
    assert [layer for layer, *_ in seen] == [0, 1] * passes
    assert sum(n for layer, n, *_ in seen if layer == 0) == length
    assert seen[-1][2:] == (length, case.rows)


@pytest.mark.parametrize("dense_layers", [[], [0, 1]], ids=["sparse", "dense"])
def test_answers_for_the_layer(case_of, dense_layers):
    """The answer goes on: the dense one changes nothing, zeros change everything."""
    case = case_of("qwen2_5_vl")
    want = logits(case)
    with patched(case.model, dense_layers=dense_layers) as handle:
        with handle.observe(lambda layer, q, k, v, layout, scale, m: attention(q, k, v, scale)):
            assert_same_logits(case, logits(case), want)
        assert handle.stats["dense_reasons"] == {"output of the observer": 2}
        with handle.observe(lambda layer, q, k, v, *rest: torch.zeros_like(q.transpose(1, 2))):
            assert (logits(case) - want).abs().max().item() > 100 * BOUND
        assert_same_logits(case, logits(case), want)
        assert handle.stats["dense_reasons"]["output of the observer"] == 4


def test_ends_with_its_block(case_of):
    case = case_of("qwen2_5_vl")
    seen = []
    with patched(case.model) as handle:
        with pytest.raises(ZeroDivisionError), handle.observe(lambda *call: seen.append(call)):
            raise ZeroDivisionError
        logits(case)
        assert seen == []
        with (
            handle.observe(lambda *call: seen.append(call)),
            pytest.raises(ValueError, match="observed already"),
            handle.observe(print),
        ):
            pass


def test_wrong_answer_is_refused(case_of):
    case = case_of("qwen2_5_vl")
    with (
        patched(case.model) as handle,
        handle.observe(lambda layer, q, *rest: q),
        pytest.raises(ValueError, match=r"observer: wants None or a tensor \[B, Sq, Hq, Dv\]"),
    ):
        logits(case)


def test_short_passes_are_seen_too(case_of):
    case = case_of("qwen2_5_vl")
    seen = []
    with patched(case.model, min_q_len=4096) as handle:
        with handle.observe(lambda *call: seen.append(call[0])):
            logits(case)
        assert handle.stats["dense_reasons"] == {"q_len below min_q_len": 2}
    assert seen == [0, 1]


def test_compiled_layers(own_case):
    case = own_case("qwen2_5_vl")
    want = logits(case)
    seen = []
    with patched(case.model) as handle:
        torch._dynamo.reset()
        for layer in case.model.get_decoder().layers:
            layer.compile(backend="eager")
        assert_same_logits(case, logits(case), want)
        with handle.observe(lambda *call: seen.append(call[0])):
            assert_same_logits(case, logits(case), want)
    assert seen == [0, 1]
