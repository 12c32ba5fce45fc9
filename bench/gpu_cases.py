"""The cases of the CPU tests, for a device: the same plans, the same seeds, the same bounds.

They live in tests/, which a copy of the tree has and an installed package has not.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from permattn import testing
from permattn.core import AttnPlan
from permattn.core.problem import FwdArgs
from permattn.core.quant import FORMATS
from torch import Tensor

from bench.gpu_record import ROOT
from bench.gpu_suite import Skip, Suite
from bench.plans import Dense, PlanBuilder, RandomBlocks, TwoParts

_FOLDERS = ("triton", "cuda", "backends", "cuda_shim", "ptxsim")
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
# Rows of a quantised result in which one P was next to a tie and fell the other way.
_TIES = 0.01


def tests_module(name: str) -> ModuleType:
    """A module of tests/, by its name.

    Raises:
        Skip: the tree has no tests, or what they import is not installed.
    """
    for folder in _FOLDERS:
        path = str(ROOT / "tests" / folder)
        if path not in sys.path:
            sys.path.append(path)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        raise Skip(f"the cases of the tests are not here: {missing}") from missing


@contextmanager
def playing(capability: int | None) -> Iterator[None]:
    """The CUDA backend chooses kernels as for another device; None = as for this one.

    The kernels of `sm80` are compiled for compute capability 9.0, too, where no config names them.
    """
    if capability is None:
        yield
        return
    attention = importlib.import_module("permattn.backends.cuda.attention")
    device = importlib.import_module("permattn.backends.cuda.device")
    with (
        mock.patch.object(attention, "_capability_of", lambda x: capability),
        mock.patch.object(device, "capability", lambda: capability),
    ):
        yield


def played(suite: Suite, family: str) -> int | None:
    """The capability by which this device runs the kernels of a family; None = its own.

    Raises:
        Skip: it cannot.
    """
    if suite.rehearsal:
        if family == "sm90":
            raise Skip("kernels for compute capability 9.0 do not run on a CPU")
        return None
    major, minor = torch.cuda.get_device_capability()
    if family == "sm90":
        if (major, minor) != (9, 0):
            raise Skip(f"needs compute capability 9.0, got {major}.{minor}")
        return None
    if (major, minor) != (9, 0):
        return None
    from permattn.backends.cuda import device

    if why := device.why_no_code(80, device.holds()):
        raise Skip(why)
    return 80


def attention_cases(backend: str, family: str = "") -> list[Any]:
    """Plans and tensors of the kernels' tests, and a call of every kernel of a family."""
    if backend == "triton":
        return list(tests_module("kernel_cases").CASES)
    made = tests_module("test_sm80")
    return [*made.ATTENDED, *made.MORE, *_of_every_kernel(family, quantised=False)]


def quantised_cases(backend: str, family: str = "", capability: int = 0) -> list[Any]:
    """The same of formats; where the kernels have four bits only before 9.0, without those."""
    if backend == "triton":
        return list(tests_module("quantised_cases").CASES)
    found = [*tests_module("test_sm80_backend").SMALL, *tests_module("test_sm80_quantised").CASES]
    found += _of_every_kernel(family, quantised=True)
    unlike = {"int4"} if capability >= 90 else set()
    return [c for c in found if not unlike & {c.spec.qk, c.spec.pv}]


def _of_every_kernel(family: str, *, quantised: bool) -> list[Any]:
    made = tests_module("test_every_kernel")
    kernels = made.for_wgmma() if family == "sm90" else made.for_mma()
    # Nothing is launched here: the capability is that of the call which is left aside.
    return [k.call(89)[0] for k in kernels if (k.qk != "none") == quantised]


def longer_cases(backend: str) -> list[tuple[str, Tensor, Tensor, Tensor, AttnPlan]]:
    """Every kind of plan, dtype and head dim over some hundred tokens."""
    cases = []
    for dtype in DTYPES:
        if backend == "cuda" and dtype == "fp32":
            continue
        for head_dim in (64, 128):
            for name, builder in PLANS.items():
                q, k, v = draw(DTYPES[dtype], (1, 4, 1000, head_dim), (1, 2, 1000, head_dim))
                cases.append((f"{name}-{dtype}-d{head_dim}", q, k, v, builder(1000, 4)))
        for head_dim in (16, 40, 96, 256):
            q, k, v = draw(DTYPES[dtype], (2, 4, 300, head_dim), (2, 2, 333, head_dim))
            plan = testing.split_plan(300, 333, heads=4, batch=2, seed=head_dim)
            cases.append((f"split-{dtype}-d{head_dim}", q, k, v, plan))
    return cases


def draw(
    dtype: torch.dtype, q_shape: tuple[int, ...], kv_shape: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of seed 0 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    shapes = (q_shape, kv_shape or q_shape, kv_shape or q_shape)
    q, k, v = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return q, k, v


def attended(case: Any, attend: Callable[..., tuple[Tensor, Tensor]], to: Any) -> tuple[float, ...]:
    """(error, bound) of out and of lse of a case, against float64."""
    plan = case.plan()
    inputs = case.inputs(plan)
    moved = case.inputs(plan, str(to))
    found = attend(*moved[:3], plan.to(to), scale=case.scale)
    q, k, v = inputs[:3]
    seen = testing.visible_pairs(plan, q.shape[0], q.shape[1]) > 0
    plain = testing.masked_attention(q, k, v, seen, case.scale)
    exact = testing.masked_attention(q.double(), k.double(), v.double(), seen, case.scale)
    facts: list[float] = []
    for ours, same, true in zip(found, plain, exact, strict=True):
        error = testing.float64_bound(ours.cpu(), same, true)
        facts += [error.ours, error.bound]
    return tuple(facts)


def quantised_error(args: FwdArgs, out: Tensor, lse: Tensor) -> tuple[float, float]:
    """(largest error of out, what is allowed) against the reference's meaning of the integers.

    Raises:
        AssertionError: rows that see nothing, lse, or too many rows, are off.
    """
    want, want_lse = tests_module("quantised_cases").in_float64(args)
    seen = torch.isfinite(want_lse)
    if not torch.equal(seen, torch.isfinite(lse)):
        raise AssertionError("rows that see nothing differ")
    eps = torch.finfo(args.v.dtype).eps
    pv = args.plan.quant.pv
    # P is rounded to 16 bits, or to a step of its format; a norm may move a number by a step.
    step = eps if pv == "none" else 1 / FORMATS[pv].p_high
    step = max(step, 0.01) if args.prologue is not None else step
    high = float(args.v.float().abs().max())
    off_lse = float(torch.where(seen, lse.double() - want_lse, 0.0).abs().max())
    if off_lse > 2e-5 + step:
        raise AssertionError(f"lse is off by {off_lse:.2e}")
    error = (out.double() - want).abs().amax(-1)
    share = float((error > 2 * eps * high).double().mean())
    if share > _TIES:
        raise AssertionError(f"{share:.1%} of the rows are off")
    return float(error.max()), (eps + step) * high
