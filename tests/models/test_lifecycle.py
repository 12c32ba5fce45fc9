"""Patching, unpatching, refusing, sharing: what happens around a call."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from permattn.models import context, patch, unpatch
from permattn.models.attention import NAME
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.models.llama.modeling_llama import LlamaAttention

from .checks import (
    GREEDY,
    Recorder,
    assert_same_generation,
    assert_same_logits,
    generate,
    logits,
    patched,
)
from .exact import plan_everything
from .tiny import Case
from .tiny_models import llama, text_case


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_unpatch_leaves_no_trace(case_of):
    case = case_of("qwen3_vl")
    model = case.model
    want, keys = logits(case), [set(m.__dict__) for m in model.modules()]
    handle = patch(model)
    assert model.config.text_config._attn_implementation == NAME
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert hooks(model) == 4
    unpatch(model)
    handle.unpatch()
    assert model.config.text_config._attn_implementation == "sdpa"
    assert hooks(model) == 0
    assert [set(m.__dict__) for m in model.modules()] == keys
    assert torch.equal(logits(case), want)


def test_context_manager_unpatches_on_errors(case_of):
    model = case_of("qwen3_vl").model
    with pytest.raises(ZeroDivisionError), patch(model):
        raise ZeroDivisionError
    assert hooks(model) == 0


def test_state_is_reset_after_ctrl_c(case_of):
    """torch calls no forward hook then: the next pass, or unpatching, cleans up."""
    case = case_of("qwen3_vl")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    want = logits(case)
    with patch(case.model, {"min_q_len": 2}) as handle:
        with handle.observe(interrupted), pytest.raises(KeyboardInterrupt):
            logits(case)
        logits(case)
        assert not context.in_prefill()
        with handle.observe(interrupted), pytest.raises(KeyboardInterrupt):
            logits(case)
    assert not context.in_prefill()
    assert torch.equal(logits(case), want)


def test_state_is_reset_after_an_exception(case_of):
    case = case_of("qwen3_vl")

    def broken(*args, **kwargs):
        raise ZeroDivisionError

    with patch(case.model, {"min_q_len": 2}, planner=broken):
        with pytest.raises(ZeroDivisionError):
            logits(case)
        assert not context.in_prefill()
        assert context.observed() is None


def test_patched_twice(case_of):
    model = case_of("qwen3_vl").model
    with patch(model):
        with pytest.raises(ValueError, match=r"patched already; call permattn.unpatch"):
            patch(model)
        with pytest.raises(ValueError, match="patched already"):
            patch(model.model)
    with pytest.raises(ValueError, match="not patched"):
        unpatch(model)


def test_wrappers_are_looked_through(case_of):
    model = case_of("qwen3_vl").model

    class Adapted(nn.Module):
        def get_base_model(self):
            return model

    compiled = torch.compile(model, backend="eager")
    for wrapper in (Adapted(), compiled):
        patch(wrapper)
        assert hooks(model) == 4
        unpatch(wrapper)
        assert hooks(model) == 0


def test_multimodal_model_without_head(case_of):
    case = case_of("qwen3_vl")
    with torch.no_grad():
        want = case.model.model(**case.inputs).last_hidden_state
        with patched(case.model.model) as handle:
            got = case.model.model(**case.inputs).last_hidden_state
            assert handle.last_layout.rows == case.rows
    assert torch.allclose(got, want, atol=1e-5)


def test_plans_can_be_watched(case_of):
    case = case_of("qwen3_vl")
    seen = []
    with patched(case.model) as handle:
        logits(case)
        handle.on_plan = lambda layer, plan: seen.append((layer, plan.num_q_tokens))
        logits(case)
        handle.on_plan = None
        logits(case)
    length = case.inputs["input_ids"].shape[1]
    assert seen == [(0, length), (1, length)]


def test_copies_and_pickles_are_refused(case_of):
    model = case_of("qwen3_vl").model
    with patch(model):
        for attempt in (copy.deepcopy, lambda m: torch.save(m, io.BytesIO())):
            for part in (model, model.model, model.model.language_model.layers[0]):
                with pytest.raises(TypeError, match=r"call permattn.unpatch\(model\) first"):
                    attempt(part)
    torch.save(copy.deepcopy(model), io.BytesIO())


def test_saved_while_patched(case_of, tmp_path: Path):
    case = case_of("qwen3_vl")
    want = logits(case)
    with patch(case.model):
        case.model.save_pretrained(tmp_path)
        assert set(case.model.state_dict()) == set(copy.copy(case.model).state_dict())
    text = (tmp_path / "config.json").read_text()
    assert NAME not in text
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(Case(loaded, case.inputs, case.rows)), want)


OPTIONS = [
    {},
    {"prefill_chunk_size": 32},
    {"cache_implementation": "static"},
    {"cache_implementation": "static", "prefill_chunk_size": 32},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "chunks", "static", "static-chunks"])
def test_twin_of_one_config_object_is_untouched(own_case, options):
    case = own_case("qwen3_vl", "BATCH")
    torch.manual_seed(1)
    twin = Case(type(case.model)(case.model.config).eval(), case.inputs, case.rows)
    want = generate(twin, **options)
    with patched(case.model) as handle:
        assert twin.model.config.text_config._attn_implementation == NAME
        got = generate(twin, **options)
        assert handle.stats["sparse"] == 0
    assert_same_generation(got, want)


@pytest.mark.parametrize("first", [0, 1])
def test_twins_both_patched(own_case, first):
    case = own_case("qwen3_vl")
    twin = Case(type(case.model)(case.model.config).eval(), case.inputs, case.rows)
    handles = [patched(case.model), patched(twin.model)]
    handles[first].unpatch()
    last = (case, twin)[1 - first]
    logits(last)
    assert handles[1 - first].stats["sparse"] == 2
    handles[1 - first].unpatch()
    assert case.model.config.text_config._attn_implementation == "sdpa"


def test_two_threads_one_model(case_of):
    cases = [case_of("qwen3_vl", "ONE"), case_of("qwen3_vl", "TWO")]
    cases[1].model = cases[0].model
    want = [generate(case) for case in cases]
    results: list = [[], []]

    def run(i):
        for _ in range(3):
            results[i].append(generate(cases[i]))

    plans = Recorder()
    with patched(cases[0].model, plans) as handle:
        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert handle.stats["sparse"] == 2 * 3 * 2
    for got, one in zip(results, want, strict=True):
        assert len(got) == 3
        for each in got:
            assert_same_generation(each, one)
    assert {rows for rows, _, _ in plans.calls} == {case.rows for case in cases}


def test_implementation_switched_back_by_the_user(case_of):
    case = case_of("qwen3_vl")
    want = logits(case)
    with patched(case.model) as handle:
        case.model.set_attn_implementation("sdpa")
        with pytest.warns(UserWarning, match="set_attn_implementation"):
            got = logits(case)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            logits(case)
        assert handle.stats["sparse"] == 0
    assert torch.equal(got, want)
    assert case.model.config.text_config._attn_implementation == "sdpa"


class OldAttention(LlamaAttention):
    """A copy of old hub code: attention written out in forward."""

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states, None


def with_old_attention():
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.__class__ = OldAttention
    return model


def without_sdpa():
    model = llama()
    model.model.__class__ = type("EagerOnly", (type(model.model),), {"_supports_sdpa": False})
    return model


def vision_only():
    tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 24}
    return transformers.ViTModel(transformers.ViTConfig(**tower, patch_size=4))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), TypeError, "wants a transformers PreTrainedModel, got Linear"),
        (with_old_attention, ValueError, "OldAttention does not call .* attention interface"),
        (without_sdpa, ValueError, "EagerOnly does not support SDPA"),
        (vision_only, ValueError, "ViTModel has no"),
    ],
    ids=["not-a-model", "old-attention", "no-sdpa", "vision-only"],
)
def test_refused_models(build, error, message):
    model = build()
    with pytest.raises(error, match=message):
        patch(model)
    assert hooks(model) == 0


def test_unknown_family_runs_as_text():
    case = text_case()
    want_logits, want_tokens = logits(case), generate(case)
    with patched(case.model) as handle:
        assert_same_logits(case, logits(case), want_logits)
        assert_same_generation(generate(case), want_tokens)
        assert handle.stats["sparse"] == 4
        assert handle.last_layout.rows == ((), ())


def test_unsupported_keyword_is_dense(case_of):
    """A meaning that plans do not carry is never swallowed."""
    case = case_of("qwen3_vl")
    want = logits(case)
    with patched(case.model) as handle:
        got = logits(case, head_mask=torch.ones(1))
        assert handle.stats["dense_reasons"] == {"head_mask is set": 2}
    assert_same_logits(case, got, want)


def test_forward_of_the_head_called_directly(case_of):
    case = case_of("qwen2_5_vl")
    want = logits(case)
    with patched(case.model) as handle, torch.no_grad():
        got = case.model.forward(**case.inputs).logits
        assert handle.last_layout.rows == case.rows
    assert_same_logits(case, got, want)


def test_positional_arguments(case_of):
    case = case_of("qwen2_5_vl")
    want = logits(case)
    inputs = dict(case.inputs)
    ids = inputs.pop("input_ids")
    with patched(case.model) as handle, torch.no_grad():
        got = case.model(ids, **inputs).logits
        assert handle.last_layout.rows == case.rows
    assert_same_logits(case, got, want)


def test_backend_is_passed_on(case_of):
    case = case_of("qwen2_5_vl")
    with (
        patch(case.model, {"min_q_len": 2}, backend="nonesuch", planner=plan_everything),
        pytest.raises(ValueError, match="backend: wants one of"),
    ):
        case.model.generate(**case.inputs, **GREEDY)


COLD = """
import sys
sys.modules["transformers"] = None
import permattn, permattn.models
try:
    permattn.patch
except ImportError as e:
    print(e)
"""


def test_without_transformers():
    """Nothing is imported before it is used, and what is missing is named."""
    done = subprocess.run([sys.executable, "-c", COLD], capture_output=True, text=True, check=True)
    assert "permattn.patch needs transformers" in done.stdout
    assert "pip install 'permattn[transformers]'" in done.stdout
