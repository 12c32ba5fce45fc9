"""Sections about numbers and promises: each writes its cases down, or raises with what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import permattn
import torch
from permattn import sparse_attention_with_lse, testing
from permattn.backends import BACKENDS
from permattn.core import AttnPlan
from permattn.core.problem import Problem
from torch import Tensor

from bench.gate import judge
from bench.gpu_cases import (
    DTYPES,
    attended,
    attention_cases,
    draw,
    longer_cases,
    played,
    playing,
    quantised_cases,
    quantised_error,
    tests_module,
)
from bench.gpu_record import ROOT
from bench.gpu_suite import Skip, Suite
from bench.plans import TwoParts

# Of a rehearsal, that is slow: every how manyth case.
_FEW = 9


def device_facts(suite: Suite) -> dict[str, Any]:
    """The native library is loaded, and what the CUDA backend says of itself and the device."""
    from permattn.backends import cuda
    from permattn.core import native

    problem = native.load()
    if problem is not None and (native.PACKAGE / "_native.so").exists():
        raise AssertionError(problem)
    facts = {**cuda.describe(), "package": str(permattn.__version__)}
    if not suite.rehearsal:
        x = torch.ones(1 << 20, device=suite.device)
        if float(x.sum()) != 1 << 20:
            raise AssertionError("a sum of ones on the device is wrong")
    return facts


def attention(suite: Suite, family: str = "") -> None:
    """Every case of the tests, and longer ones, forward, against float64."""
    capability = played(suite, family) if family else None
    cases: list[Any] = attention_cases(suite.backend, family)
    longer = longer_cases(suite.backend)
    if suite.rehearsal:
        cases, longer = cases[::_FEW], longer[2:3]

    def ours(q: Tensor, k: Tensor, v: Tensor, plan: AttnPlan, scale: float | None = None) -> Any:
        return sparse_attention_with_lse(q, k, v, plan, scale=scale, backend=suite.asked)

    with playing(capability):
        for case in cases:
            facts: list[float] = []

            def out(case: Any = case, facts: list[float] = facts) -> tuple[float, float]:
                facts += attended(case, ours, suite.device)
                return facts[0], facts[1]

            suite.check(f"{case} out", out)
            if facts:
                suite.case(f"{case} lse", facts[2], facts[3])
        for name, q, k, v, plan in longer:

            def long(
                q: Tensor = q, k: Tensor = k, v: Tensor = v, plan: AttnPlan = plan
            ) -> tuple[float, float]:
                a, b, c = (x.to(suite.device) for x in (q, k, v))
                verdict = judge(ours(a, b, c, plan.to(suite.device))[0].cpu(), q, k, v, plan)
                return verdict.error if verdict.finite else 1e30, verdict.bound

            suite.check(name, long)


def quantised(suite: Suite, family: str = "") -> None:
    """Every pair of formats of the backend, against the reference's meaning of the integers."""
    capability = played(suite, family) if family else None
    here = 0 if suite.rehearsal else 10 * torch.cuda.get_device_capability()[0]
    module = BACKENDS[suite.asked]
    cases = quantised_cases(suite.backend, family, here)
    for case in cases[::_FEW] if suite.rehearsal else cases:

        def one(case: Any = case) -> tuple[float, float]:
            args = case.arguments()
            there = tests_module("quantised_cases").moved(args, str(suite.device))
            out, lse = module.forward(there)
            return quantised_error(args, out.cpu(), lse.cpu())

        with playing(capability):
            args = case.arguments()
            problem = Problem.of(args.q, args.k, args.v, args.plan, needs_grad=False)
            if module.why_not(replace(problem, device_type=suite.device.type)) is None:
                suite.check(str(case), one)
    if not suite.num_cases:
        raise AssertionError("no case has a kernel")


def poison(suite: Suite, family: str = "") -> None:
    """NaN in keys and values that no query may see changes no bit."""
    capability = played(suite, family) if family else None
    for name, plan in tests_module("kernel_cases").POISONED.items():
        shape = (1, 2, plan.num_q_tokens, 64), (1, 1, plan.num_kv_tokens, 64)
        q, k, v = draw(torch.bfloat16, *shape)
        seen = (testing.visible_pairs(plan, 1, 2) > 0).any(2).any(1, keepdim=True)
        dirty = [testing.poison_unseen(x, seen) for x in (k, v)]

        def off(
            q: Tensor = q, plan: AttnPlan = plan, pairs: Any = ((k, v), dirty)
        ) -> tuple[float, float]:
            found = []
            for keys, values in pairs:
                a, b, c = (x.to(suite.device) for x in (q, keys, values))
                there = plan.to(suite.device)
                found.append(sparse_attention_with_lse(a, b, c, there, backend=suite.asked))
            return float(sum(int((x != y).sum()) for x, y in zip(*found, strict=True))), 0.0

        with playing(capability):
            suite.check(name, off)


def probe(suite: Suite) -> None:
    """Every case of the online probe, against float64."""
    cases = tests_module("probe_cases")
    found = [*cases.CASES, *cases.LONG]
    if suite.backend == "cuda":
        found = tests_module("test_cuda_probe").PROBED
    for case in found[::_FEW] if suite.rehearsal else found:

        def fine(case: Any = case) -> tuple[float, float]:
            cases.check_case(case, suite.asked, str(suite.device))
            return 0.0, 0.0

        suite.check(str(case), fine)


def gradients(suite: Suite) -> None:
    """dq, dk, dv against float64 autograd of masked attention, bound by plain torch's error."""
    for dtype in ("bf16", "fp32"):
        plan = testing.split_plan(300, 333, heads=4, batch=2, seed=5)
        seen = testing.visible_pairs(plan, 2, 4) > 0
        q, k, v = draw(DTYPES[dtype], (2, 4, 300, 64), (2, 2, 333, 64))
        dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(9)).to(q.dtype)

        def grads(attend: Callable[..., Tensor], to: Any, *inputs: Tensor) -> list[Tensor]:
            leaves = [x.to(to).detach().requires_grad_() for x in inputs[:3]]
            got = torch.autograd.grad(attend(*leaves), leaves, inputs[3].to(to))
            return [x.cpu() for x in got]

        def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor = seen) -> Tensor:
            return testing.masked_attention(q, k, v, seen, q.shape[-1] ** -0.5)[0]

        def ours(q: Tensor, k: Tensor, v: Tensor, plan: AttnPlan = plan) -> Tensor:
            return permattn.sparse_attention(q, k, v, plan.to(suite.device), backend=suite.asked)

        exact = grads(plain, torch.float64, q, k, v, dout)
        same = grads(plain, "cpu", q, k, v, dout)
        mine = grads(ours, suite.device, q, k, v, dout)
        for name, a, b, c in zip(("dq", "dk", "dv"), mine, same, exact, strict=True):
            error = testing.float64_bound(a, b, c)
            suite.case(f"{dtype} {name}", error.ours, error.bound)


def _promised(suite: Suite, seed: int = 0) -> tuple[AttnPlan, list[Tensor]]:
    """A plan of two launches that share a softmax, and its inputs on the device."""
    tokens = 300 if suite.rehearsal else 2048
    plan = TwoParts(0.5, window=256)(tokens, 8).to(suite.device)
    inputs = draw(torch.bfloat16, (1, 8, tokens, 64))
    turned = [x.roll(seed, 2).to(suite.device) for x in inputs]
    return plan, turned


def determinism(suite: Suite) -> int:
    """Ten runs, forward and, where there are gradients, backward, are equal to the last bit."""
    plan, inputs = _promised(suite)
    names = ("out", "dq", "dk", "dv") if suite.has_gradients else ("out",)
    q, k, v = (x.requires_grad_(suite.has_gradients) for x in inputs)
    dout = torch.randn_like(q)

    def once() -> tuple[Tensor, ...]:
        out = permattn.sparse_attention(q, k, v, plan, backend=suite.asked)
        if not suite.has_gradients:
            return (out,)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)

    first = once()
    runs = 3 if suite.rehearsal else 10
    for _ in range(runs - 1):
        for name, a, b in zip(names, first, once(), strict=True):
            if not torch.equal(a, b):
                raise AssertionError(f"{name} differs between two runs")
    return runs


def cuda_graph(suite: Suite) -> str:
    """Capture and replay with new inputs gives what an eager call gives."""
    plan, (q, k, v) = _promised(suite)

    def call() -> Tensor:
        return permattn.sparse_attention(q, k, v, plan, backend=suite.asked)

    if suite.rehearsal:
        call()
        raise Skip("a CPU has no graphs; the call ran")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for seed in range(3):
        generator = torch.Generator(suite.device).manual_seed(seed)
        for x in (q, k, v):
            x.copy_(torch.randn(x.shape, generator=generator, device=suite.device))
        graph.replay()
        if not torch.equal(out, call()):
            raise AssertionError("a replayed graph differs from an eager call")
    return "replayed with three sets of inputs"


def two_streams(suite: Suite) -> str:
    """Two streams that attend to different inputs at once give what one after the other gives."""
    calls = [_promised(suite, seed) for seed in (0, 1)]

    def attend(i: int) -> Tensor:
        plan, (q, k, v) = calls[i]
        return permattn.sparse_attention(q, k, v, plan, backend=suite.asked)

    want = [attend(i) for i in (0, 1)]
    if suite.rehearsal:
        raise Skip("a CPU has no streams; the calls ran")
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    for _ in range(20):
        found = []
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found.append(attend(i))
        torch.cuda.synchronize()
        for i, out in enumerate(found):
            if not torch.equal(out, want[i]):
                raise AssertionError(f"stream {i} differs from a call on its own")
    return "20 rounds on two streams"


def no_host_sync(suite: Suite) -> str:
    """From the plan down, nothing waits for the device."""
    plan, (q, k, v) = _promised(suite)
    permattn.sparse_attention(q, k, v, plan, backend=suite.asked)
    if suite.rehearsal:
        raise Skip("a CPU has nothing to wait for; the call ran")
    torch.cuda.set_sync_debug_mode("error")
    try:
        permattn.sparse_attention(q, k, v, plan, backend=suite.asked)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no synchronising call"


def test_suite(suite: Suite) -> str:
    """The repository's own GPU tests, where pytest is installed."""
    path = ROOT / "tests" / "backends" / "test_triton_gpu.py"
    try:
        import pytest
    except ImportError:
        raise Skip("pytest is not installed") from None
    if not path.exists():
        raise Skip("the tree has no tests")
    code = pytest.main(["-q", "-p", "no:cacheprovider", "-m", "gpu", str(path)])
    if code != 0:
        raise AssertionError(f"pytest returned {int(code)}")
    if suite.rehearsal:
        raise Skip("without a device every test of it skips")
    return "passed"
