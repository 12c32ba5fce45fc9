"""Every kernel that the tile choice can pick runs once: full and partial blocks, holes, a causal
band, widths that are padded.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from kernel_cases import BRAIN, HALF, Case, expected
from launches import Call, attend, shape_of
from permattn.core import AttnPlan, QuantSpec, TokenBand
from permattn.testing import assert_within, random_plan
from quantised_cases import QuantCase, check, in_float64
from simulated import Simulator, sources, why_not

DIMS = (64, 96, 128, 256)
PAIRS = (
    *(("none", "none"), ("int8", "none"), ("int4", "none")),
    *(("int8", pv) for pv in ("int8", "int4", "fp8")),
    ("int4", "int4"),
)
# Blocks of queries and of keys, each of which gets tiles of its own.
BLOCKS = ((64, 64), (128, 64), (64, 128))


@dataclass(frozen=True)
class Kernel:
    """What a call of one kernel looks like; `name` is what the kernel is called in its family."""

    name: str
    dtype: torch.dtype
    qk: str
    pv: str
    dim: int
    blocks: tuple[int, int]

    def __str__(self) -> str:
        return self.name

    def plan(self) -> AttnPlan:
        block_q, block_kv = self.blocks
        return random_plan(
            150,
            200,
            density=0.8,
            permuted=self.dim % 128 != 0,
            holes=4,
            band=TokenBand(-60),
            block_q=block_q,
            block_kv=block_kv,
            seed=1,
        )

    def facts(self) -> dict:
        """Widths a step below that of the kernel, which pads them."""
        step = 32 if self.qk == "int4" else 16
        return {"dim": self.dim - step, "dim_v": self.dim - 8, "dtype": self.dtype}

    def call(self, capability: int, **options) -> tuple[Case, Call]:
        shape = {"name": self.name, "plan": self.plan, "heads": 1, **self.facts()}
        if self.qk == "none":
            case = Case(**shape)
            plan = case.plan()
        else:
            case = QuantCase(**shape, spec=QuantSpec(self.qk, self.pv, 32, 64))
            plan = case.arguments().plan
        q, k, v, *_ = case.inputs(plan)
        return case, Call(q, k, v, plan, case.scale, capability, **options)

    def check(self, case: Case, call: Call, found) -> None:
        if self.qk == "none":
            plain, exact = expected(call.plan, case.inputs(call.plan), case.scale)
            for name, value in zip(("out", "lse"), found, strict=True):
                assert_within(value, plain[name], exact[name], f"{self} {name}")
            return
        args = case.arguments()
        if self.pv != "none":
            check(found, args, self.name)
            return
        # P is rounded to 16 bits, and the sum of a row adds what it was rounded to.
        want, want_lse = in_float64(args)
        seen = torch.isfinite(want_lse)
        assert torch.equal(seen, torch.isfinite(found[1]))
        eps = torch.finfo(args.v.dtype).eps
        high = float(args.v.float().abs().max())
        assert float((found[0].double() - want).abs().max()) <= 2 * eps * high
        assert float(torch.where(seen, found[1].double() - want_lse, 0.0).abs().max()) <= eps


def shapes() -> list[tuple]:
    return [
        (dtype, qk, pv, dim, blocks)
        for (qk, pv), dim, blocks in itertools.product(PAIRS, DIMS, BLOCKS)
        for dtype in ((BRAIN, HALF) if pv == "none" else (BRAIN,))
    ]


def for_mma() -> list[Kernel]:
    """One call of every kernel for mma.sync: tiles follow blocks of queries alone."""
    made = []
    for dtype, qk, pv, dim, (block_q, block_kv) in shapes():
        has_wide = pv == "none" and dim != 256 and (qk, dim) != ("int4", 128)
        if block_kv != 64 or (block_q == 128 and not has_wide) or (pv != "none" and dim == 256):
            continue
        word = str(dtype).removeprefix("torch.")
        name = f"{word}-{qk}-{pv}-{dim}-{block_q}"
        made.append(Kernel(name, dtype, qk, pv, dim, (block_q, block_kv)))
    return made


def for_wgmma() -> list[Kernel]:
    """One call of every kernel for wgmma, by the name of its source."""
    made: dict[str, Kernel] = {}
    words = {"kBFloat16": BRAIN, "kFloat16": HALF, "kFloat32": BRAIN}
    for name in sources():
        dtype, qk, pv, dim, block_n = name.split("_")
        formats = (x.removeprefix("k").lower() for x in (qk, pv))
        # Wide tiles of keys belong to wide blocks, of queries for one kernel, of keys for the next.
        wide = (128, 64) if len(made) % 2 else (64, 128)
        blocks = (64, 64) if block_n == "64" else wide
        made[name] = Kernel(name, words[dtype], *formats, int(dim), blocks)
    return list(made.values())


@pytest.mark.parametrize("kernel", for_mma(), ids=str)
def test_for_mma(shim, kernel):
    case, call = kernel.call(89)
    assert not shim.select_config(shape_of(shim, call, call.plan.parts)).is_sm90
    kernel.check(case, call, attend(shim, call))


def test_no_kernel_for_mma_is_left_out(shim):
    """Every shape that a kernel takes gets one of those above."""
    kinds = {(k.dtype, k.qk, k.pv, k.dim, k.blocks[0]) for k in for_mma()}
    found = set()
    for dtype, qk, pv, dim, blocks in shapes():
        kernel = Kernel("any", dtype, qk, pv, dim, blocks)
        if pv != "none" and dim == 256:
            continue
        _, call = kernel.call(89)
        config = shim.select_config(shape_of(shim, call, call.plan.parts))
        found.add((dtype, qk, pv, config.dim, config.block_m))
    assert found == kinds


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("kernel", for_wgmma(), ids=str)
def test_for_wgmma(shim, kernel):
    simulator = Simulator()
    # Rows that lie in slot order come by TMA, all others by cp.async.
    case, call = kernel.call(90, run=simulator, in_slots=kernel.dim != 96)
    found = attend(shim, call)
    assert simulator.kernels == [kernel.name]
    kernel.check(case, call, found)
