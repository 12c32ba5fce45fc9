"""The GPU bench: a shape, itemised, for every backend, beside what others take for the same.

A result is checked before it is timed: a sample of queries against float64. What another package
cannot do here is recorded, not fatal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import permattn
import torch
from permattn.backends import BACKENDS
from permattn.core import AttnPlan, Permutation, QuantSpec
from permattn.core.prepare import PrepareArgs, smoothing_from_columns, smoothing_of
from permattn.core.problem import FwdArgs, Problem
from torch import Tensor

from bench import gpu_peers
from bench.gpu_clock import BUDGET_S, Clock
from bench.gpu_layers import Layer, Listed
from bench.gpu_shapes import BF16, PEAKS, Shape
from bench.gpu_suite import Skip, Suite, is_lost

# Seconds of a section's budget under which no further call is begun.
_SPARE_S = 8.0


def ceilings(suite: Suite) -> dict[str, Any]:
    """What the device reaches: a bf16 matrix product on random numbers, and a copy."""
    clock = Clock(suite.device, budget_s=0.0 if suite.rehearsal else BUDGET_S)
    size, count = (128, 1 << 16) if suite.rehearsal else (8192, 1 << 31)
    a, b = (torch.randn(size, size, device=suite.device).bfloat16() for _ in range(2))
    product = clock(lambda: a @ b)
    source = torch.zeros(count, dtype=torch.uint8, device=suite.device)
    target = torch.empty_like(source)
    copy = clock(lambda: target.copy_(source))
    name = "" if suite.rehearsal else torch.cuda.get_device_name()
    peak = PEAKS.get(name)
    nominal = None
    if peak is not None:
        nominal = f"bf16 {peak.bf16:g}, INT8 and FP8 {peak.eight_bits:g} TFLOP/s, "
        nominal += f"{peak.memory:g} TB/s"
    return {
        "matmul_tflops": 2 * size**3 / product.ms / 1e9,
        "copy_tb_s": 2 * count / copy.ms / 1e9,
        "nominal": nominal,
    }


def bench(suite: Suite, shape: Shape) -> str:
    """One shape: dense kernels of others, then every density and format of ours, itemised.

    Raises:
        Skip: no backend of ours can run.
        AssertionError: the section's time was over before the last density.
    """
    if all(suite.why_not(backend) for backend in suite.backends):
        raise Skip("none of our kernels can run here")
    small = shape.tiny() if suite.rehearsal else shape
    clock = Clock(suite.device, budget_s=0.0 if suite.rehearsal else BUDGET_S)
    layer = Layer(small, suite.device)
    inputs = gpu_peers.Inputs(layer.q, layer.k, layer.v)
    for name, (make, fmt) in gpu_peers.DENSE.items():
        row = {"shape": small.name, "contender": name, "format": fmt}
        _peer(suite, clock, make, inputs, small.dense_flops, row)
    for block in small.blocks:
        for density in small.densities:
            if suite.left() < _SPARE_S:
                raise AssertionError(f"no time was left for block {block}, density {density:g}")
            _blocks(suite, clock, layer, block, density)
            _free(suite)
    return str(small)


def _blocks(suite: Suite, clock: Clock, layer: Layer, block: int, density: float) -> None:
    """Ours on one set of blocks, and others on the same."""
    listed = Listed.of(layer, block, density)
    for backend in suite.backends:
        if why := suite.why_not(backend):
            suite.run(**listed.facts, contender=backend, why_not=why)
            continue
        items: dict[str, Callable[[], object]] = {
            "mask": lambda: layer.mask(listed.scores, listed.kept),
            "plan": lambda: layer.plan(listed.mask, block, listed.kept, QuantSpec()),
        }
        for what, call in items.items():
            found = clock(call)
            suite.run(**listed.facts, contender=backend, what=what, **vars(found))
        for fmt in layer.shape.formats:
            _ours(suite, clock, listed, backend, fmt)
    if layer.shape.peer_density == density:
        inputs = gpu_peers.Inputs(layer.q, layer.k, layer.v, listed.mask, block, listed.plan)
        for name, (make, fmt) in gpu_peers.SAME_BLOCKS.items():
            row = {**listed.facts, "contender": name, "format": fmt}
            _peer(suite, clock, make, inputs, listed.flops, row)


def _ours(suite: Suite, clock: Clock, listed: Listed, backend: str, fmt: str) -> None:
    """One format: checked, timed, itemised."""
    asked = suite.stand_ins.get(backend, backend)
    layer, flops = listed.layer, listed.flops
    quant = QuantSpec.named("none" if fmt == BF16 else fmt)
    plan = AttnPlan(listed.plan.parts, quant, validate=False)
    row = {**listed.facts, "contender": backend, "format": fmt}
    q, k, v = layer.q, layer.k, layer.v
    if why := BACKENDS[asked].why_not(Problem.of(q, k, v, plan, needs_grad=False)):
        suite.run(**row, why_not=why)
        return

    def attend() -> Tensor:
        return permattn.sparse_attention(q, k, v, plan, backend=asked)

    error, bound = listed.gate(attend(), quantised=quant.is_quantised)
    name = f"{layer.shape.name} {backend} {fmt} {listed.density:.3g} block {listed.block}"
    suite.case(name, error, bound)
    if not error <= bound:
        suite.run(**row, why_not="the result is wrong")
        return
    total = clock(attend)
    suite.run(**row, **vars(total), tflops=flops / total.ms / 1e9)
    spent = 0.0
    for what, call in _items(asked, layer, plan).items():
        if call is None:
            suite.run(**row, what=what, why_not="in the kernel")
            continue
        found = clock(call)
        suite.run(**row, what=what, **vars(found))
        spent += found.ms
    if 0 < spent < total.ms:
        # What is left of the whole when the items before it are taken off.
        rest = total.ms - spent
        suite.run(**row, what="kernel", ms=rest, reps=total.reps, tflops=flops / rest / 1e9)


def _items(asked: str, layer: Layer, plan: AttnPlan) -> dict[str, Callable[[], object] | None]:
    """What stands around the kernel, each alone; None = the kernel does it."""
    quant = plan.quant
    args = FwdArgs(layer.q, layer.k, layer.v, plan, layer.shape.head_dim**-0.5)
    make = _maker(asked)
    found: dict[str, Callable[[], object] | None] = {}
    permuted = any(not p.kv_perm.is_identity for p in plan.parts)
    if quant.is_quantised:
        jobs = list(_jobs(args))
        found["prepare"] = lambda: [make(job) for job in jobs]
        if quant.smooth_k or quant.balance:
            found["statistics"] = lambda: _statistics(asked, args)
    elif permuted:
        moves = asked == "cuda" and _is_hopper(layer.device)
        rows = [
            PrepareArgs(x, p.kv_perm.token_of_slot) for p in plan.parts for x in (args.k, args.v)
        ]
        found["permute"] = (lambda: [make(job) for job in rows]) if moves else None
    if permuted:
        found["inverse permute"] = None
    return found


def _maker(asked: str) -> Callable[[PrepareArgs], object]:
    """How a backend makes rows ready for its attention; values of CUDA C++ lie as fragments."""
    if asked != "cuda":
        return BACKENDS[asked].prepare
    from permattn.backends.cuda.rows import make_rows

    return lambda job: make_rows(job, "fragments" if job.per_column else "rows")


def _statistics(asked: str, args: FwdArgs) -> object:
    if asked != "cuda":
        return smoothing_of(args)
    from permattn.backends.cuda.rows import column_statistics

    return smoothing_from_columns(args, column_statistics)


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def _jobs(args: FwdArgs) -> Iterator[PrepareArgs]:
    """Passes over q, k and v that quantise, in the order of their slots."""
    quant, parts = args.plan.quant, args.plan.parts

    def of(x: Tensor, perm: Permutation, fmt: str, rows: int, columns: bool) -> PrepareArgs:
        token = None if perm.is_identity else perm.token_of_slot
        return PrepareArgs(x, token, fmt=fmt, rows_per_scale=rows, per_column=columns)

    yield of(args.q, parts[0].q_perm, quant.qk, quant.q_rows_per_scale, False)
    for part in parts:
        yield of(args.k, part.kv_perm, quant.qk, quant.kv_rows_per_scale, False)
        if quant.pv != "none":
            yield of(args.v, part.kv_perm, quant.pv, quant.kv_rows_per_scale, True)


def _peer(
    suite: Suite,
    clock: Clock,
    make: Callable[[gpu_peers.Inputs], gpu_peers.Call],
    inputs: gpu_peers.Inputs,
    flops: float,
    row: dict[str, Any],
) -> None:
    """Another package, or why it cannot."""
    try:
        found = clock(make(inputs))
    except Exception as error:
        if is_lost(error):
            raise
        suite.run(**row, why_not=gpu_peers.why_not(error))
        _free(suite)
        return
    suite.run(**row, **vars(found), tflops=flops / found.ms / 1e9)
    _free(suite)


def _free(suite: Suite) -> None:
    if suite.device.type == "cuda":
        torch.cuda.empty_cache()
