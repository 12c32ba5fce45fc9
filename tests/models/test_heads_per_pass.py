"""Groups of heads after each other: the same numbers, for less memory at a time."""

from __future__ import annotations

import pytest
import torch
from permattn.models import patch

from .checks import Recorder, assert_same_generation, assert_same_logits, generate, logits, patched
from .exact import plan_everything

# Four query heads over two key heads.
HEADS = [
    {"pattern": "a_shape", "local": 9, "sink": 3},
    {"pattern": "vertical_slash", "local": 5, "vertical": 20, "slash": 2},
    {"pattern": "grid", "local": 7},
    {"pattern": "auto", "local": 8},
]
NARROW = {"min_q_len": 2, "layers": {str(layer): {"heads": HEADS} for layer in range(2)}}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("videos", ["ONE", "BATCH"])
def test_equal_bit_for_bit(case_of, videos, backend):
    case = case_of("qwen3_vl", videos)
    with patch(case.model, NARROW, backend=backend) as handle:
        want = logits(case)
        assert handle.stats["sparse"] == 2
    for heads_per_pass in (2, 3):
        config = {**NARROW, "heads_per_pass": heads_per_pass}
        with patch(case.model, config, backend=backend) as handle:
            assert torch.equal(logits(case), want)
            assert handle.stats["sparse"] == 2


@pytest.mark.parametrize(("heads_per_pass", "groups"), [(2, 2), (3, 2), (4, 1), (100, 1)])
def test_groups_in_order(case_of, heads_per_pass, groups):
    """Every group is planned by its own heads over its own keys; the counts are per call."""
    case = case_of("qwen2_5_vl")
    want = generate(case)
    calls = []

    def planner(q, k, rows, heads, **pads):
        calls.append((q.shape[1], k.shape[1], [head.sink for head in heads]))
        return plan_everything(q, k, rows, heads, **pads)

    heads = [{"pattern": "a_shape", "sink": n} for n in range(4)]
    layers = {str(layer): {"heads": heads} for layer in range(2)}
    seen = []
    config = {"min_q_len": 2, "layers": layers, "heads_per_pass": heads_per_pass}
    with patch(case.model, config, planner=planner) as handle:
        handle.on_plan = lambda layer, plan: seen.append(layer)
        got = generate(case)
        assert handle.stats["sparse"] == 2
    assert_same_generation(got, want)
    split = [(2, 1, [0, 1]), (2, 1, [2, 3])] if groups == 2 else [(4, 2, [0, 1, 2, 3])]
    assert calls == split * 2
    assert seen == [0] * groups + [1] * groups


def test_keys_are_not_copied(case_of):
    case = case_of("qwen2_5_vl")
    keys = []

    def planner(q, k, rows, heads, **pads):
        keys.append(k)
        return plan_everything(q, k, rows, heads, **pads)

    with patch(case.model, {"min_q_len": 2, "heads_per_pass": 2}, planner=planner):
        generate(case, cache_implementation="static", prefill_chunk_size=40)
    first, second = keys[-2:]
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert second.data_ptr() - first.data_ptr() == first.stride(1) * first.element_size()


def test_gradients(own_case):
    case = own_case("qwen2_5_vl")
    case.model.train()

    def gradients():
        case.model.zero_grad()
        case.model(**case.inputs, labels=case.inputs["input_ids"], use_cache=False).loss.backward()
        return {n: p.grad for n, p in case.model.named_parameters() if p.grad is not None}

    want = gradients()
    with patched(case.model, heads_per_pass=2, backend="reference") as handle:
        got = gradients()
        assert handle.stats["sparse"] == 2
    for name, gradient in want.items():
        assert torch.allclose(got[name], gradient, atol=1e-5), name


def test_chunks_and_turns(case_of):
    case = case_of("llava_onevision", "BATCH")
    want_logits, want = logits(case), generate(case, prefill_chunk_size=32)
    plans = Recorder()
    with patched(case.model, plans, heads_per_pass=2):
        assert_same_logits(case, logits(case), want_logits)
        assert_same_generation(generate(case, prefill_chunk_size=32), want)
    assert plans.calls[-1][0] == case.rows
