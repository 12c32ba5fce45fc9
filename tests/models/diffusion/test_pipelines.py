"""Steps, noise levels and bins over real pipelines."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from permattn.models.diffusion import apply_paro, describe, observe
from permattn.models.diffusion.call import _StepHook, _Times

from .pipelines import cogvideox_pipeline, run, wan_pipeline
from .tiny import build, plan_for

PIPES = {"wan": wan_pipeline, "cogvideox": cogvideox_pipeline}


def test_wan_steps_over_two_runs(case_of):
    pipe = wan_pipeline(case_of("wan"))
    want = run(pipe)
    seen = []
    with observe(pipe, lambda x: seen.append((x.layer, x.step, x.num_steps, x.context))):
        got = run(pipe)
        run(pipe)
    assert torch.equal(got, want)
    once = [(n, step, 4, who) for step in range(4) for who in ("cond", "uncond") for n in (0, 1)]
    assert seen == once * 2


def test_cogvideox_counts_steps_itself(case_of):
    pipe = cogvideox_pipeline(case_of("cogvideox"))
    seen = []
    with observe(pipe, lambda x: seen.append((x.step, x.num_steps, x.sigma, x.q.shape[0]))):
        run(pipe)
        run(pipe, steps=3)
    sigmas = [0.75, 0.5, 0.25, 0.0]
    first = [(n, 4, pytest.approx(s, abs=2e-3), 2) for n, s in enumerate(sigmas) for _ in (0, 1)]
    assert seen[:8] == first
    assert [x[:2] for x in seen[8:]] == [(n, 3) for n in range(3) for _ in (0, 1)]


@pytest.mark.parametrize("name", list(PIPES))
def test_every_step_and_layer_is_sparse(name: str, case_of):
    case = case_of(name)
    pipe = PIPES[name](case)
    dense = run(pipe)
    with apply_paro(pipe, plan_for(case, density=1.0)):
        whole = run(pipe)
    with apply_paro(pipe, plan_for(case)) as handle:
        first, second = run(pipe), run(pipe)
    assert (whole - dense).abs().max() <= 1e-4 * dense.abs().max()
    assert torch.equal(first, second)
    assert (first - dense).abs().max() > 1e-3
    calls = 2 * 2 * 4 * (2 if name == "wan" else 1)
    assert handle.stats == {"sparse": calls, "dense": {}}
    assert torch.equal(run(pipe), dense)


def test_bins_follow_the_noise_level(case_of):
    case = case_of("wan")
    pipe = wan_pipeline(case)
    plan = plan_for(case, bins=3)
    bins = []
    with apply_paro(pipe, plan) as handle:
        handle.on_attention = lambda x: bins.append(plan.bin_of(x.sigma))
        run(pipe)
        built = {key.bin for key, _ in handle._applied["transformer"]._store._kept}
    # Flow shift 3: sigma is about 1, .9, .75 and .5; edges are 2/3 and 1/3.
    assert bins == [0] * 12 + [1] * 4
    assert built == {0, 1}


def test_first_steps_and_layers_can_stay_dense(case_of):
    case = case_of("wan")
    pipe = wan_pipeline(case)
    with apply_paro(pipe, plan_for(case), dense_first_steps=1, dense_layers=[1]) as handle:
        run(pipe)
    assert handle.stats == {"sparse": 6, "dense": {"dense_first_steps": 2, "dense_layers": 8}}


def test_all_dense_is_bit_identical(case_of):
    case = case_of("wan")
    pipe = wan_pipeline(case)
    want = run(pipe)
    with apply_paro(pipe, plan_for(case), dense_first_steps=4):
        assert torch.equal(run(pipe), want)


def test_two_experts_have_plans_of_their_own(case_of):
    high, low = case_of("wan"), build("wan")
    pipe = wan_pipeline(high, second=low.model, boundary_ratio=0.8)
    plans = {"transformer": plan_for(high), "transformer_2": plan_for(low, seed=4)}
    with pytest.raises(ValueError, match="2 transformers; say which plan serves which"):
        apply_paro(pipe, plans["transformer"])
    with apply_paro(pipe, plans) as handle:
        run(pipe)
        assert handle.plans == plans
        # Steps 0 and 1 are above the boundary, 2 and 3 below.
        assert [each.sparse for each in handle._applied.values()] == [8, 8]
    with apply_paro(pipe, {"transformer_2": plans["transformer_2"]}) as handle:
        run(pipe)
        assert handle.stats == {"sparse": 8, "dense": {}}
    seen = []
    with observe(pipe, seen.append, component="transformer_2"):
        run(pipe)
    assert [x.step for x in seen] == [2] * 4 + [3] * 4
    assert describe(pipe, component="transformer_2").scheduler == "UniPCMultistepScheduler"


def test_a_plan_may_serve_both_experts_when_asked(case_of):
    high, low = case_of("wan"), build("wan")
    pipe = wan_pipeline(high, second=low.model, boundary_ratio=0.8)
    plan = plan_for(high)
    with apply_paro(pipe, {"transformer": plan, "transformer_2": plan}) as handle:
        run(pipe)
    assert handle.stats["sparse"] == 16


def test_timesteps_per_token_count_by_the_noisiest(case_of):
    case, seen = case_of("wan"), []
    timestep = torch.full((2, 96), 600)
    timestep[:, :24] = 0
    with observe(case.model, seen.append):
        case.run(timestep=timestep)
    assert seen[0].sigma == pytest.approx(0.6)


def test_steps_are_counted_from_noise():
    hook = _StepHook()
    assert [hook.count(s) for s in (0.9, 0.9, 0.5, 0.5, 0.1)] == [0, 0, 1, 1, 2]
    assert [hook.count(s) for s in (0.9, 0.5)] == [0, 1]


def test_a_scheduler_tells_steps_that_16_bits_cannot():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=8.0)
    scheduler.set_timesteps(50)
    times, found = _Times(), []
    sample = torch.zeros(1)
    for t in scheduler.timesteps:
        sigma = float(t.bfloat16()) / 1000
        found.append(times.find(scheduler, sigma))
        scheduler.step(sample, t, sample)
    assert [step for step, _ in found] == list(range(50))
    assert [s for _, s in found] == [float(t) / 1000 for t in scheduler.timesteps]
    assert len({float(t.bfloat16()) for t in scheduler.timesteps}) < 50


def test_a_run_that_begins_in_the_middle_starts_at_step_0():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(5)
    times, sample = _Times(), torch.zeros(1)
    for step, t in enumerate(scheduler.timesteps[5:]):
        assert times.find(scheduler, float(t) / 1000) == (step, float(t) / 1000)
        scheduler.step(sample, t, sample)


def test_a_scheduler_that_stands_elsewhere_tells_nothing():
    scheduler = SimpleNamespace(timesteps=torch.tensor([1000.0, 500.0]), step_index=0)
    assert _Times().find(scheduler, 0.5) is None
    assert _Times().find(None, 0.5) is None
