"""Beside what else diffusers does to a transformer."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import AutoModel, FirstBlockCacheConfig
from diffusers.hooks import HookRegistry, ModelHook, apply_group_offloading, group_offloading
from diffusers.models.attention_dispatch import attention_backend
from permattn.models.diffusion import apply_paro, observe
from torch._dynamo.testing import CompileCounter

from .pipelines import run, wan_pipeline
from .tiny import Case, fill, plan_for, wan


@pytest.fixture
def _active_backend_restored():
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    before = registry._active_backend
    yield
    registry._active_backend = before


@pytest.mark.parametrize("cache_first", [True, False], ids=["cache-first", "paro-first"])
def test_first_block_cache(cache_first: bool, own_case):
    case = own_case("wan")
    pipe = wan_pipeline(case)
    plan = plan_for(case)
    with apply_paro(pipe, plan) as handle:
        want = run(pipe)
        every = handle.stats["sparse"]
    config = FirstBlockCacheConfig(threshold=10.0)
    if cache_first:
        pipe.transformer.enable_cache(config)
    seen = []
    with apply_paro(pipe, plan) as handle:
        handle.on_attention = lambda x: seen.append((x.step, x.layer))
        if not cache_first:
            pipe.transformer.enable_cache(config)
        cached = run(pipe)
    pipe.transformer.disable_cache()
    # The first step runs whole, later ones their first block; steps are not miscounted.
    assert seen == [(0, 0), (0, 1)] * 2 + [(step, 0) for step in (1, 2, 3) for _ in range(2)]
    assert handle.stats["sparse"] == len(seen) < every
    assert not torch.equal(cached, want)
    with apply_paro(pipe, plan):
        assert torch.equal(run(pipe), want)


@pytest.mark.parametrize("offload_first", [True, False], ids=["offload-first", "paro-first"])
def test_group_offload(offload_first: bool, own_case, monkeypatch):
    # diffusers takes it from accelerate; everything is on one device here.
    monkeypatch.setattr(group_offloading, "send_to_device", lambda x, *_, **__: x, raising=False)
    case = own_case("wan")
    plan = plan_for(case)
    with apply_paro(case.model, plan):
        want = case.run()

    def offload():
        apply_group_offloading(
            case.model,
            onload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
        )

    if offload_first:
        offload()
    with apply_paro(case.model, plan) as handle:
        if not offload_first:
            offload()
        assert torch.equal(case.run(), want)
    assert handle.stats["sparse"] == 2


def test_norms_that_a_hook_brings_in_are_called(own_case, monkeypatch):
    """Leaf-level offload moves the weights of a norm when the norm is called."""
    monkeypatch.setattr(group_offloading, "send_to_device", lambda x, *_, **__: x, raising=False)
    case = own_case("wan")
    plan = plan_for(case)
    with apply_paro(case.model, plan):
        want = case.run()
    apply_group_offloading(case.model, onload_device=torch.device("cpu"), offload_type="leaf_level")
    calls = []
    for block in case.model.blocks:
        block.attn1.norm_q.register_forward_hook(lambda *_: calls.append(1))
    with apply_paro(case.model, plan) as handle:
        assert (case.run() - want).abs().max() <= 1e-5
    assert len(calls) == handle.stats["sparse"] == 2


@pytest.mark.parametrize("offload_first", [True, False], ids=["offload-first", "paro-first"])
def test_model_offload_swaps_forward(offload_first: bool, own_case):
    """As accelerate does: it wraps `forward`, and puts the one it found back between runs."""
    case = own_case("wan")
    pipe = wan_pipeline(case)
    plan, dense = plan_for(case), run(pipe)
    model = case.model
    with apply_paro(pipe, plan):
        want = run(pipe)

    def offload():
        found = model.forward
        model.forward = lambda *args, **kwargs: found(*args, **kwargs)
        return found

    if offload_first:
        found = offload()
    with apply_paro(pipe, plan) as handle:
        if not offload_first:
            found = offload()
        assert torch.equal(run(pipe), want)
        model.forward = found
        offload()
        assert torch.equal(run(pipe), want)
        assert handle.stats["sparse"] == 32
    assert torch.equal(run(pipe), dense)


def test_hooks_around_ours_survive(own_case):
    """Model offload is a hook on the transformer: it may come and go at any time."""
    calls = []

    class Counting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(1)
            return args, kwargs

    case = own_case("wan")
    dense = case.run()
    registry = HookRegistry.check_if_exists_or_initialize(case.model)
    registry.register_hook(Counting(), "before")
    handle = apply_paro(case.model, plan_for(case, density=1.0))
    registry.register_hook(Counting(), "after")
    assert (case.run() - dense).abs().max() <= 1e-5
    handle.remove()
    assert torch.equal(case.run(), dense)
    assert len(calls) == 4


@pytest.mark.parametrize("name", ["wan", "cogvideox", "flux"])
def test_fused_projections(name: str, own_case):
    case = own_case(name)
    plan = plan_for(case)
    with apply_paro(case.model, plan):
        want = case.run()
    before = dict(case.model.attn_processors)
    with apply_paro(case.model, plan) as handle:
        case.model.fuse_qkv_projections()
        assert (case.run() - want).abs().max() <= 1e-5
        case.model.unfuse_qkv_projections()
        assert (case.run() - want).abs().max() <= 1e-5
        case.model.fuse_qkv_projections()
        case.run()
    assert handle.stats == {"sparse": 6, "dense": {}}
    case.model.unfuse_qkv_projections()
    after = case.model.attn_processors
    assert {type(after[k]) for k in before} == {type(p) for p in before.values()}
    case.model.fuse_qkv_projections()
    with apply_paro(case.model, plan):
        assert (case.run() - want).abs().max() <= 1e-5


@pytest.mark.usefixtures("_active_backend_restored")
@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_a_backend_chosen_after_us_runs(name: str, own_case):
    case = own_case(name)
    dense = case.run()
    handle = apply_paro(case.model, plan_for(case))
    case.run()
    case.model.set_attention_backend("_native_math")
    with pytest.warns(UserWarning, match="runs that backend, dense"):
        got = case.run()
    assert (got - dense).abs().max() <= 1e-5
    case.run()
    assert handle.stats == {"sparse": 2, "dense": {"set_attention_backend": 4}}
    handle.remove()
    if name == "wan":
        assert case.model.blocks[0].attn1.processor._attention_backend == "_native_math"


def test_dense_layers_run_the_active_backend(case_of):
    case = case_of("wan")
    with attention_backend("_native_math"):
        want = case.run()
        with apply_paro(case.model, plan_for(case), dense_layers=[0, 1]):
            assert torch.equal(case.run(), want)


def test_a_forgotten_handle_keeps_no_model_alive(own_case):
    case = own_case("wan")
    handle = apply_paro(case.model, plan_for(case))
    case.run()
    model = weakref.ref(case.model)
    del case, handle
    gc.collect()
    assert model() is None


def test_two_models_run_in_two_threads(own_case):
    """The layer that runs is known per thread."""
    cases = [own_case("flux"), own_case("qwen_image")]
    handles = [apply_paro(case.model, plan_for(case)) for case in cases]
    want = [case.run() for case in cases]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            got = list(pool.map(lambda case: case.run(), cases))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert [handle.stats["sparse"] for handle in handles] == [12, 12]


def test_saved_while_applied_is_the_plain_model(own_case, tmp_path):
    case = own_case("flux")
    dense = case.run()
    with apply_paro(case.model, plan_for(case)):
        case.model.save_pretrained(tmp_path)
        case.run()
    loaded = AutoModel.from_pretrained(str(tmp_path)).eval()
    assert torch.equal(Case(loaded, case.inputs, case.grid, case.num_text).run(), dense)


def compiled(case: Case, plan) -> tuple[list, int]:
    """Outputs of four steps with compiled blocks, and how many graphs there were."""
    torch._dynamo.reset()
    counter = CompileCounter()
    case.model.compile_repeated_blocks(backend=counter, fullgraph=True)
    try:
        with apply_paro(case.model, plan, dense_first_steps=1) as handle:
            outs = [case.run(timestep=torch.tensor([t, t])) for t in (900, 700, 300, 100)]
        assert handle.stats["sparse"] == 3 * plan.num_layers
        return outs, counter.frame_count
    finally:
        for block in case.model.blocks:
            block._compiled_call_impl = None
        torch._dynamo.reset()


def test_compiled_blocks_share_one_graph():
    torch.manual_seed(0)
    case = wan(layers=4)
    fill(case.model)
    plan = plan_for(case)
    with apply_paro(case.model, plan, dense_first_steps=1):
        want = [case.run(timestep=torch.tensor([t, t])) for t in (900, 700, 300, 100)]
    outs, graphs = compiled(case, plan)
    assert graphs == 1
    for got, one in zip(outs, want, strict=True):
        assert (got - one).abs().max() <= 1e-5


def test_compiled_blocks_are_observed(own_case):
    case = own_case("wan")
    torch._dynamo.reset()
    case.model.compile_repeated_blocks(backend="eager")
    seen = []
    with observe(case.model, seen.append):
        case.run()
    assert [x.layer for x in seen] == [0, 1]
    torch._dynamo.reset()


@pytest.mark.parametrize("order", ["apply-then-compile", "compile-then-apply"])
def test_the_whole_model_compiled(order: str, own_case):
    case = own_case("wan")
    dense = case.run()
    plan = plan_for(case)
    with apply_paro(case.model, plan):
        sparse = case.run()
    torch._dynamo.reset()
    whole = Case(torch.compile(case.model, backend="eager"), case.inputs, case.grid, 0)
    if order == "compile-then-apply":
        whole.run()
    with apply_paro(whole.model, plan) as handle:
        got = whole.run()
        stats = handle.stats
    torch._dynamo.reset()
    if stats["dense"]:
        assert "torch.compile ran before" in next(iter(stats["dense"]))
        assert (got - dense).abs().max() <= 1e-5
    else:
        assert stats["sparse"] == 2
        assert (got - sparse).abs().max() <= 1e-5
