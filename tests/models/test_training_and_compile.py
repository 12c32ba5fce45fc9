"""Gradients with checkpointing, and torch.compile in every place where people put it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig

from .checks import (
    BOUND,
    Recorder,
    assert_same_generation,
    assert_same_logits,
    generate,
    logits,
    patched,
)
from .tiny_models import text_case


def gradients(case):
    model = case.model
    model.zero_grad()
    model(**case.inputs, labels=case.inputs["input_ids"], use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name] - want[name]).abs().max().item() <= BOUND, name


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("checkpointing", ["none", "non-reentrant", "reentrant"])
def test_gradients(own_case, checkpointing):
    case = own_case("qwen3_vl")
    case.model.train()
    want = gradients(case)
    if checkpointing != "none":
        options = {"use_reentrant": checkpointing == "reentrant"}
        case.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    with patched(case.model, backend="reference") as handle:
        got = gradients(case)
        # Replayed passes are sparse too: a dense replay would be a different function.
        assert handle.stats["sparse"] == (2 if checkpointing == "none" else 4)
        assert handle.stats["dense"] == 0
    assert_same_gradients(got, want)


def test_decoder_without_keywords_trains_dense(own_case):
    """Nothing could carry the layout to a replayed layer."""
    case = own_case("qwen3_vl")
    case.model.train()
    text = case.model.get_decoder()
    forward = text.forward

    def narrow(
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        cache=None,
        inputs_embeds=None,
        use_cache=None,
        visual_pos_masks=None,
        deepstack_visual_embeds=None,
        output_hidden_states=None,
        return_dict=None,
        output_attentions=None,
    ):
        return forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            # transformers 5.24 calls it `cache`.
            **({"past_key_values": past_key_values} if cache is None else {"cache": cache}),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            visual_pos_masks=visual_pos_masks,
            deepstack_visual_embeds=deepstack_visual_embeds,
        )

    want = gradients(case)
    text.forward = narrow
    with patched(case.model, backend="reference") as handle:
        got = gradients(case)
        assert list(handle.stats["dense_reasons"]) == [
            "training, and the decoder takes no extra keywords"
        ]
    assert_same_gradients(got, want)


def compile_layers(model, counter):
    torch._dynamo.reset()
    for layer in model.get_decoder().layers:
        layer.compile(backend=counter, fullgraph=True, dynamic=True)


def test_compiled_layers_stay_sparse(own_case, case_of):
    case, other = own_case("qwen2_5_vl"), case_of("qwen2_5_vl", "TWO")
    other.model = case.model
    want = [logits(case), logits(other)]
    counter = CompileCounter()
    plans = Recorder()
    with patched(case.model, plans) as handle:
        compile_layers(case.model, counter)
        assert_same_logits(case, logits(case), want[0])
        graphs = counter.frame_count
        # Another length, another layout: the layers are not compiled again.
        assert_same_logits(other, logits(other), want[1])
        assert counter.frame_count == graphs
        assert handle.stats["sparse"] == 4
        assert handle.stats["dense"] == 0
    assert {rows for rows, _, _ in plans.calls} == {case.rows, other.rows}


def test_compiled_layers_generate(own_case):
    case = own_case("qwen2_5_vl", "BATCH")
    want = generate(case)
    with patched(case.model) as handle:
        torch._dynamo.reset()
        for layer in case.model.get_decoder().layers:
            layer.compile(backend="eager")
        got = generate(case)
        assert handle.stats["sparse"] == 2
    assert_same_generation(got, want)


def test_compiled_layers_train(own_case):
    case = own_case("qwen2_5_vl")
    case.model.train()
    want = gradients(case)
    with patched(case.model, backend="reference") as handle:
        torch._dynamo.reset()
        for layer in case.model.get_decoder().layers:
            layer.compile(backend="eager")
        got = gradients(case)
        assert handle.stats["sparse"] == 2
    assert_same_gradients(got, want)


def test_compiled_model_is_dense_and_says_so():
    case = text_case()
    want = logits(case)
    with patched(case.model) as handle:
        torch._dynamo.reset()
        compiled = torch.compile(case.model, backend="eager")
        with torch.no_grad():
            got = compiled(**case.inputs).logits
        with pytest.warns(UserWarning, match=r"layer.compile\(\)"):
            assert handle.stats["sparse"] == 0
    assert_same_logits(case, got, want)


def test_compiled_model_trains():
    case = text_case()
    case.model.train()
    want = gradients(case)
    with patched(case.model):
        torch._dynamo.reset()
        case.model.compile(backend="eager")
        got = gradients(case)
    assert_same_gradients(got, want)


@pytest.mark.parametrize("chunk", [None, 20], ids=["whole", "chunks"])
def test_generate_that_compiles_by_itself(chunk):
    """Static caches: masks are built outside the compiled pass, where no hook runs."""
    case = text_case()
    options = {"cache_implementation": "static", "prefill_chunk_size": chunk}
    want = generate(case, **options)
    counter = CompileCounter()
    config = CompileConfig(backend=lambda graph, inputs, **_: counter(graph, inputs))
    config._compile_all_devices = True
    with patched(case.model) as handle:
        torch._dynamo.reset()
        got = generate(case, **options, compile_config=config)
        assert counter.frame_count > 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert handle.stats["sparse"] == (2 if chunk is None else 0)
    assert_same_generation(got, want)
