"""The sections of the CUDA suite: each returns data, or raises with what is wrong."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import permattn
import torch
from permattn import testing
from permattn.core import AttnPlan
from torch import Tensor

from bench import baselines
from bench.contenders import video_segments
from bench.gate import judge
from bench.plans import Dense, PlanBuilder, RandomBlocks, TwoParts, num_pairs

DEVICE = torch.device("cuda")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PLANS: dict[str, PlanBuilder] = {
    "dense": Dense(),
    "causal": Dense(causal=True),
    "random-25%": RandomBlocks(0.25),
    "causal-25%": RandomBlocks(0.25, causal=True),
    "block-64": RandomBlocks(0.25, causal=True, block_q=64, block_kv=64),
    "kv-16": RandomBlocks(0.25, causal=True, block_kv=16),
    "two-parts": TwoParts(0.5, window=256),
}


def correctness(backend: str) -> list[dict[str, Any]]:
    """Every kind of plan, dtype and head size against float64."""
    data, wrong = [], []
    for name, q, k, v, plan in _cases():
        a, b, c = (x.to(DEVICE) for x in (q, k, v))
        out = permattn.sparse_attention(a, b, c, plan.to(DEVICE), backend=backend)
        verdict = judge(out.cpu(), q, k, v, plan)
        data.append({"case": name, "error": verdict.error, "bound": verdict.bound})
        if not verdict.ok:
            wrong.append(f"{name} (error {verdict.error:.2e}, allowed {verdict.bound:.2e})")
    if wrong:
        raise AssertionError(f"{len(wrong)} of {len(data)} wrong: " + "; ".join(wrong))
    return data


def gradients(backend: str) -> list[dict[str, Any]]:
    """dq, dk, dv against float64 autograd of masked attention, bound by plain torch's error."""
    data = []
    for dtype in ("bf16", "fp32"):
        plan = testing.split_plan(300, 333, heads=4, batch=2, seed=5)
        seen = testing.visible_pairs(plan, 2, 4) > 0
        q, k, v = _draw(DTYPES[dtype], (2, 4, 300, 64), (2, 2, 333, 64))
        dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(9)).to(q.dtype)

        def grads(attend: Callable[..., Tensor], to: Any, *inputs: Tensor) -> list[Tensor]:
            leaves = [x.to(to).detach().requires_grad_() for x in inputs[:3]]
            got = torch.autograd.grad(attend(*leaves), leaves, inputs[3].to(to))
            return [x.cpu() for x in got]

        def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor = seen) -> Tensor:
            return testing.masked_attention(q, k, v, seen, q.shape[-1] ** -0.5)[0]

        def ours(q: Tensor, k: Tensor, v: Tensor, plan: AttnPlan = plan) -> Tensor:
            return permattn.sparse_attention(q, k, v, plan.to(DEVICE), backend=backend)

        exact = grads(plain, torch.float64, q, k, v, dout)
        same = grads(plain, "cpu", q, k, v, dout)
        mine = grads(ours, DEVICE, q, k, v, dout)
        for name, a, b, c in zip(("dq", "dk", "dv"), mine, same, exact, strict=True):
            error = testing.float64_bound(a, b, c)
            data.append({"case": f"{dtype}-{name}", "error": error.ours, "bound": error.bound})
            testing.assert_within(a, b, c, f"{dtype} {name}")
    return data


def determinism(backend: str) -> int:
    """Ten runs, forward and backward, are equal to the last bit."""
    plan = TwoParts(0.5, window=256)(2048, 8).to(DEVICE)
    q, k, v = (x.to(DEVICE).requires_grad_() for x in _draw(torch.bfloat16, (1, 8, 2048, 64)))
    dout = torch.randn_like(q)

    def once() -> tuple[Tensor, ...]:
        out = permattn.sparse_attention(q, k, v, plan, backend=backend)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)

    first = once()
    for _ in range(9):
        for name, a, b in zip(("out", "dq", "dk", "dv"), first, once(), strict=True):
            if not torch.equal(a, b):
                raise AssertionError(f"{name} differs between two runs")
    return 10


def cuda_graph(backend: str) -> str:
    """Capture and replay with new inputs gives what an eager call gives."""
    plan = TwoParts(0.5, window=256)(2048, 8).to(DEVICE)
    q, k, v = (x.to(DEVICE) for x in _draw(torch.bfloat16, (1, 8, 2048, 64)))

    def call() -> Tensor:
        return permattn.sparse_attention(q, k, v, plan, backend=backend)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for x in (q, k, v):
        x.copy_(torch.randn_like(x))
    graph.replay()
    if not torch.equal(out, call()):
        raise AssertionError("a replayed graph differs from an eager call")
    return "replayed with new inputs"


def no_host_sync(backend: str) -> str:
    """From the plan down, nothing waits for the device."""
    plan = TwoParts(0.5, window=256)(2048, 8).to(DEVICE)
    q, k, v = (x.to(DEVICE) for x in _draw(torch.bfloat16, (1, 8, 2048, 64)))
    permattn.sparse_attention(q, k, v, plan, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        permattn.sparse_attention(q, k, v, plan, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no synchronising call"


def planning(num_tokens: int) -> dict[str, float]:
    """Time of the online grid planner beside dense attention's."""
    from permattn.patterns.mminference import plan_grid_prefill

    q, k, v = (x.to(DEVICE) for x in _draw(torch.bfloat16, (1, 8, num_tokens, 128)))
    segments = video_segments(num_tokens)
    plan_ms = _milliseconds(lambda: plan_grid_prefill(q, k, segments))
    dense_ms = _milliseconds(baselines.sdpa(q, k, v, causal=True))
    return {"plan_ms": plan_ms, "sdpa_causal_ms": dense_ms, "share": plan_ms / dense_ms}


def timing(backend: str, num_tokens: int, with_flex: bool) -> list[dict[str, Any]]:
    """Milliseconds and rates beside SDPA and FlexAttention, the same card, one process."""
    data = []
    for head_dim in (64, 128):
        q, k, v = (x.to(DEVICE) for x in _draw(torch.bfloat16, (1, 8, num_tokens, head_dim)))
        for causal in (False, True):
            case = f"bf16-d{head_dim}{'-causal' if causal else ''}"
            torchs = baselines.sdpa(q, k, v, causal=causal)
            calls: dict[str, tuple[Callable[[], object], float]] = {}
            pairs = 8 * num_tokens * (num_tokens + 1) / 2 if causal else 8 * num_tokens**2
            calls["sdpa"] = (torchs, pairs)
            for density in (1.0, 0.5, 0.25, 0.1):
                if density == 1.0:
                    builder: PlanBuilder = Dense(causal)
                else:
                    builder = RandomBlocks(density, causal)
                host = builder(num_tokens, 8)
                plan, pairs = host.to(DEVICE), num_pairs(host, 1, 8)
                calls[f"{density:.0%}"] = (_attend(q, k, v, plan, backend), pairs)
                if with_flex and density == 0.25:
                    calls["flex-25%"] = (baselines.flex(q, k, v, plan), pairs)
            times = {name: _milliseconds(call) for name, (call, _) in calls.items()}
            for name, (_, pairs) in calls.items():
                data.append(
                    {
                        "case": case,
                        "run": name,
                        "ms": times[name],
                        "tflops": 4 * pairs * head_dim / times[name] / 1e9,
                        "over_sdpa": times["sdpa"] / times[name],
                    }
                )
    return data


def test_suite(root: Path) -> str:
    """The repository's own GPU tests, where pytest is installed."""
    path = root / "tests" / "backends" / "test_triton_gpu.py"
    try:
        import pytest
    except ImportError:
        return "pytest is not installed: not run"
    if not path.exists():
        return "no such tests: not run"
    code = pytest.main(["-q", "-p", "no:cacheprovider", "-m", "gpu", str(path)])
    if code != 0:
        raise AssertionError(f"pytest returned {int(code)}")
    return "passed"


def _attend(q: Tensor, k: Tensor, v: Tensor, plan: AttnPlan, backend: str) -> Callable[[], Tensor]:
    return lambda: permattn.sparse_attention(q, k, v, plan, backend=backend)


def _cases() -> list[tuple[str, Tensor, Tensor, Tensor, AttnPlan]]:
    cases = []
    for dtype in DTYPES:
        for head_dim in (64, 128):
            for name, builder in PLANS.items():
                q, k, v = _draw(DTYPES[dtype], (1, 4, 1000, head_dim), (1, 2, 1000, head_dim))
                cases.append((f"{name}-{dtype}-d{head_dim}", q, k, v, builder(1000, 4)))
        for head_dim in (16, 40, 96, 256):
            q, k, v = _draw(DTYPES[dtype], (2, 4, 300, head_dim), (2, 2, 333, head_dim))
            plan = testing.split_plan(300, 333, heads=4, batch=2, seed=head_dim)
            cases.append((f"split-{dtype}-d{head_dim}", q, k, v, plan))
    return cases


def _draw(
    dtype: torch.dtype, q_shape: tuple[int, ...], kv_shape: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (q_shape, kv_shape or q_shape, kv_shape or q_shape)
    q, k, v = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return q, k, v


def _milliseconds(call: Callable[[], object], rounds: int = 15) -> float:
    """Median of CUDA events; the L2 cache is flushed before every round."""
    for _ in range(3):
        call()
    flush = torch.empty(64 * 1024 * 1024, dtype=torch.int32, device=DEVICE)
    times = []
    for _ in range(rounds):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)
