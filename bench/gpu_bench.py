"""The GPU bench: a shape, itemised, for every backend, beside what others take for the same.

A result is checked before it is timed: a sample of queries against float64. What another package
cannot do here is recorded, not fatal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import permattn
import torch
from permattn import plan_paro, testing
from permattn.backends import BACKENDS
from permattn.core import AttnPart, AttnPlan, BlockIndex, Permutation, QuantSpec, TokenBand
from permattn.core import TokenGrid as Grid
from permattn.core.prepare import PrepareArgs, smoothing_of
from permattn.core.problem import FwdArgs, Problem
from permattn.patterns.dense import plan_dense
from torch import Tensor

from bench import gpu_peers, local_heads
from bench.gate import sample_rows, visible_rows
from bench.gpu_clock import Clock
from bench.gpu_shapes import BF16, PEAKS, Shape
from bench.gpu_suite import Skip, Suite, is_lost
from bench.plans import head_orders

# Seconds of a section's budget under which no further call is begun.
_SPARE_S = 8.0
# Rounding P and V to e4m3 moves a flat head's result by some 5 %: what is wrong moves it by more.
_QUANTISED_ERROR = 0.1


@dataclass(eq=False)
class Layer:
    """The inputs of a shape on the device, and its plans.

    Args:
        scores: of blocks, by their size: what a mask is chosen from.
    """

    shape: Shape
    device: torch.device
    q: Tensor = field(init=False)
    k: Tensor = field(init=False)
    v: Tensor = field(init=False)

    def __post_init__(self) -> None:
        shape = self.shape
        generator = torch.Generator(self.device).manual_seed(0)

        def tensor(heads: int) -> Tensor:
            size = (1, heads, shape.tokens, shape.head_dim)
            return torch.empty(size, dtype=torch.bfloat16, device=self.device).normal_(
                generator=generator
            )

        self.q, self.k, self.v = (tensor(h) for h in (shape.heads, shape.kv_heads, shape.kv_heads))

    @property
    def vision(self) -> int:
        """Tokens whose blocks are chosen."""
        return self.shape.tokens - self.shape.text

    def scores(self, block: int, density: float) -> Tensor:
        """float32 [H, n, n] on the device: random, or high where a video's head looks."""
        count = -(-self.vision // block)
        generator = torch.Generator(self.device).manual_seed(1)
        size = (self.shape.heads, count, count)
        noise = torch.rand(size, generator=generator, device=self.device)
        if self.shape.grid is None:
            return noise
        orders = head_orders(self.shape.heads)
        masks = {
            o: local_heads.block_mask(self.shape.grid, o, density, (block, block))
            for o in set(orders)
        }
        near = torch.stack([masks[o] for o in orders]).to(self.device)
        return noise + near

    def kept(self, block: int, density: float) -> int:
        """Listed key blocks of a row."""
        count = -(-self.vision // block)
        return min(count, self.shape.top or max(1, round(density * count)))

    def mask(self, scores: Tensor, kept: int) -> Tensor:
        """bool [H, n, n]: the highest of every row."""
        chosen = scores.topk(kept, -1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)

    def plan(self, mask: Tensor, block: int, kept: int, quant: QuantSpec) -> AttnPlan:
        shape = self.shape
        if shape.grid is None:
            capacity = kept * mask.shape[1]
            index = BlockIndex.from_block_mask(mask, block, block, full=True, capacity=capacity)
            perm = self.tokens
            return AttnPlan((AttnPart(perm, perm, index, TokenBand()),), quant, validate=False)
        return plan_paro(
            Grid(shape.text, *shape.grid),
            torch.tensor(head_orders(shape.heads), device=self.device),
            mask,
            num_tokens=shape.tokens,
            block=(block, block),
            quant=quant,
        )

    @functools.cached_property
    def tokens(self) -> Permutation:
        """Token order, on the device."""
        n, size = self.shape.tokens, 4096
        plan = plan_dense(n, n, causal=False, block_q=size, block_kv=size, device=self.device)
        return plan.parts[0].q_perm


def ceilings(suite: Suite) -> dict[str, Any]:
    """What the device reaches: a bf16 matrix product on random numbers, and a copy."""
    clock = Clock(suite.device, wanted=3 if suite.rehearsal else 30)
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
    clock = Clock(suite.device, wanted=2 if suite.rehearsal else 30)
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
    shape = layer.shape
    kept = layer.kept(block, density)
    scores = layer.scores(block, density)
    mask = layer.mask(scores, kept)
    plan = layer.plan(mask, block, kept, QuantSpec())
    pairs = float(plan.num_block_pairs().double().mean()) * shape.heads
    flops = 4 * pairs * shape.head_dim
    facts = {"shape": shape.name, "density": density, "block": block}
    for backend in suite.backends:
        asked = suite.stand_ins.get(backend, backend)
        if why := suite.why_not(backend):
            suite.run(**facts, contender=backend, why_not=why)
            continue
        items = {
            "mask": lambda: layer.mask(scores, kept),
            "plan": lambda: layer.plan(mask, block, kept, QuantSpec()),
        }
        for what, call in items.items():
            found = clock(call)
            suite.run(**facts, contender=backend, what=what, **vars(found))
        for fmt in shape.formats:
            quant = QuantSpec.named("none" if fmt == BF16 else fmt)
            made = AttnPlan(plan.parts, quant, validate=False)
            _ours(suite, clock, layer, made, (backend, asked, fmt), {**facts, "flops": flops})
    if shape.peer_density == density:
        inputs = gpu_peers.Inputs(layer.q, layer.k, layer.v, mask, block, plan)
        for name, (make, fmt) in gpu_peers.SAME_BLOCKS.items():
            _peer(suite, clock, make, inputs, flops, {**facts, "contender": name, "format": fmt})


def _ours(
    suite: Suite,
    clock: Clock,
    layer: Layer,
    plan: AttnPlan,
    names: tuple[str, str, str],
    facts: dict[str, Any],
) -> None:
    """One format: checked, timed, itemised."""
    backend, asked, fmt = names
    flops = facts.pop("flops")
    row = {**facts, "contender": backend, "format": fmt}
    q, k, v = layer.q, layer.k, layer.v
    problem = Problem.of(q, k, v, plan, needs_grad=False)
    if why := BACKENDS[asked].why_not(problem):
        suite.run(**row, why_not=why)
        return

    def attend() -> Tensor:
        return permattn.sparse_attention(q, k, v, plan, backend=asked)

    name = f"{layer.shape.name} {backend} {fmt} {facts['density']:.3g} block {facts['block']}"
    error, bound = _gate(attend(), layer, plan)
    suite.case(name, error, bound)
    if error > bound:
        suite.run(**row, why_not="the result is wrong")
        return
    total = clock(attend)
    suite.run(**row, **vars(total), tflops=flops / total.ms / 1e9)
    around = _items(asked, layer, plan)
    spent = 0.0
    for what, call in around.items():
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
    quant, module = plan.quant, BACKENDS[asked]
    args = FwdArgs(layer.q, layer.k, layer.v, plan, layer.shape.head_dim**-0.5)
    found: dict[str, Callable[[], object] | None] = {}
    permuted = any(not p.kv_perm.is_identity for p in plan.parts)
    if quant.is_quantised:
        jobs = list(_jobs(args))
        found["prepare"] = lambda: [module.prepare(job) for job in jobs]
        if quant.smooth_k or quant.balance:
            found["statistics"] = lambda: smoothing_of(args)
    elif permuted:
        moves = asked == "cuda" and _is_hopper(layer.device)
        rows = [
            PrepareArgs(x, p.kv_perm.token_of_slot) for p in plan.parts for x in (args.k, args.v)
        ]
        found["permute"] = (lambda: [module.prepare(job) for job in rows]) if moves else None
    if permuted:
        found["inverse permute"] = None
    return found


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


def _gate(out: Tensor, layer: Layer, plan: AttnPlan) -> tuple[float, float]:
    """(error, bound) of a few queries of the first and the last head, against float64."""
    shape = layer.shape
    rows = sample_rows(shape.tokens, 6)
    seen = visible_rows(plan.to("cpu"), rows, 1, shape.heads)
    there = rows.to(layer.device)
    worst = (0.0, 0.0)
    group = shape.heads // shape.kv_heads
    for h in {0, shape.heads - 1}:
        some = layer.q[:, h, None, there]
        keys, values = layer.k[:, h // group, None], layer.v[:, h // group, None]
        shown = seen[:, h, None].to(layer.device)
        scale = shape.head_dim**-0.5
        ours = out[:, h, None, there]
        exact = testing.masked_attention(
            some.double(), keys.double(), values.double(), shown, scale
        )[0]
        if plan.quant.is_quantised:
            error, bound = float((ours - exact).norm() / exact.norm()), _QUANTISED_ERROR
        else:
            plain = testing.masked_attention(some, keys, values, shown, scale)[0]
            found = testing.float64_bound(ours, plain, exact)
            error, bound = found.ours, found.bound
        if error - bound >= worst[0] - worst[1]:
            worst = (error, bound)
    return worst


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
