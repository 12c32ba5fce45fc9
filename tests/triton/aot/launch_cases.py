"""The launches that are compiled ahead of time: every shipped config, plain and at its heaviest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from permattn.core import AttnPart, AttnPlan, Permutation, TokenBand
from permattn.core.prologue import Prologue, RowTransform
from permattn.core.quant import QuantSpec
from permattn.patterns.dense import plan_dense
from permattn.testing import random_index, random_permutation, random_plan, split_plan

TOKENS = 256
HEADS, KV_HEADS = 4, 2
EVERY = (80, 86, 89, 90, 100, 120)
SAMPLE = (80, 90, 120)
WITH_FLOAT8 = (80, 89, 90, 100, 120)
BRAIN, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One call of the backend. No length enters the compiled code, so a short one will do.

    Args:
        direction: "fwd" or "bwd".
        plan: see `make_plan`.
        archs: the architectures that it is compiled for.
    """

    direction: str
    plan: str
    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    archs: tuple[int, ...]
    tokens: int = TOKENS

    @property
    def name(self) -> str:
        dims = f"d{self.head_dim}"
        if self.head_dim_v != self.head_dim:
            dims += f"v{self.head_dim_v}"
        return f"{self.direction}-{self.plan}-{str(self.dtype).removeprefix('torch.')}-{dims}"

    def launch(self) -> None:
        from permattn.backends.triton import backward_kernels, forward_kernels
        from permattn.core.problem import BwdArgs, FwdArgs

        def zeros(heads: int, *dims: int) -> torch.Tensor:
            return torch.zeros(2, heads, self.tokens, *dims, dtype=self.dtype)

        q, out = zeros(HEADS, self.head_dim), zeros(HEADS, self.head_dim_v)
        k, v = zeros(KV_HEADS, self.head_dim), zeros(KV_HEADS, self.head_dim_v)
        lse = torch.zeros(2, HEADS, self.tokens)
        plan = make_plan(self.plan, self.tokens)
        if self.direction == "fwd":
            forward_kernels(FwdArgs(q, k, v, plan, 0.125), out, lse)
        else:
            backward_kernels(BwdArgs(q, k, v, out, lse, out, lse, plan, 0.125))


@dataclass(frozen=True)
class ProbeCase:
    """One probe.

    Args:
        axis: "plain" = coordinates are positions, lse computed; "order" = keys of an order, some of
            them skipped, lse computed.
        rows: probe rows.
    """

    axis: str
    rows: int
    dtype: torch.dtype
    head_dim: int
    archs: tuple[int, ...]
    tokens: int = TOKENS

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"probe-{self.axis}-r{self.rows}-{dtype}-d{self.head_dim}"

    def launch(self) -> None:
        from permattn.backends.triton import probe_kernels
        from permattn.core.probe import ProbeArgs

        q = torch.zeros(2, HEADS, self.rows, self.head_dim, dtype=self.dtype)
        k = torch.zeros(2, KV_HEADS, self.tokens, self.head_dim, dtype=self.dtype)
        first = torch.zeros(2, dtype=torch.int32)
        order = skip = None
        if self.axis == "order":
            order = torch.arange(self.tokens, dtype=torch.int32).expand(2, -1)
            skip = torch.zeros(2, HEADS, self.tokens, dtype=torch.bool)
        key_range = torch.zeros(2, 2, dtype=torch.int32)
        args = ProbeArgs(q, k, first, key_range, order, first, None, skip)
        probe_kernels(args)


@dataclass(frozen=True)
class QuantCase:
    """One quantised forward, with the preparation of its q, k and v.

    Args:
        spec: what is quantised.
        transform: "none"; "pairs" = norm per head and interleaved rotation of q and k; "across" =
            layer norm across heads and rotation of halves.
    """

    plan: str
    spec: QuantSpec
    transform: str
    dtype: torch.dtype
    head_dim: int
    archs: tuple[int, ...]
    tokens: int = TOKENS

    @property
    def name(self) -> str:
        spec, dtype = self.spec, str(self.dtype).removeprefix("torch.")
        rows = f"{spec.qk}-{spec.pv}-r{spec.kv_rows_per_scale}"
        return f"quant-{self.plan}-{rows}-{self.transform}-{dtype}-d{self.head_dim}"

    def launch(self) -> None:
        from permattn.backends.triton import forward_kernels
        from permattn.core.problem import FwdArgs

        q = torch.zeros(2, HEADS, self.tokens, self.head_dim, dtype=self.dtype)
        k, v = (q[:, :KV_HEADS].clone() for _ in range(2))
        plan = AttnPlan(make_plan(self.plan, self.tokens).parts, self.spec)
        prologue = None
        if self.transform != "none":
            prologue = Prologue(*(self._transform(x) for x in (q, k)))
        args = FwdArgs(q, k, v, plan, 0.125, prologue)
        forward_kernels(args, torch.zeros_like(q), torch.zeros(q.shape[:3]))

    def _transform(self, x: torch.Tensor) -> RowTransform:
        across = self.transform == "across"
        dim = self.head_dim
        weight = torch.ones(x.shape[1] * dim if across else dim, dtype=self.dtype)
        cos = torch.zeros(self.tokens, dim // 2)
        return RowTransform(
            norm="layer" if across else "rms",
            weight=weight,
            bias=weight if across else None,
            across_heads=across,
            cos=cos,
            sin=cos,
            interleaved=not across,
        )


@dataclass(frozen=True)
class MassCase:
    """One measurement of block masses: sums, maxima and small entries."""

    block: int
    dtype: torch.dtype
    head_dim: int
    archs: tuple[int, ...]
    tokens: int = TOKENS

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"mass-b{self.block}-{dtype}-d{self.head_dim}"

    def launch(self) -> None:
        from permattn.backends.triton import block_mass_kernels
        from permattn.core.block_mass import BlockMassArgs

        q = torch.zeros(2, HEADS, self.tokens, self.head_dim, dtype=self.dtype)
        slots = torch.arange(self.tokens, dtype=torch.int32).expand(1, HEADS, -1)
        blocks, lse = torch.zeros(1, dtype=torch.int32), torch.zeros(q.shape[:3])
        facts = (slots, slots, blocks, self.block, self.block, lse, 0.125, 1e-3)
        block_mass_kernels(BlockMassArgs(q, q[:, :KV_HEADS], *facts))


@dataclass(frozen=True)
class RegionCase:
    """Attention from region to region of one stage, or the routing before it.

    Args:
        direction: "fwd", "bwd" or "route".
        box: rows and columns of a region; the map has 7 x 7 regions.
        variant: "plain"; "soft" = weights, and boxes that hang over a map whose padding counts;
            "nchw" = channels first; "video" = several frames.
        regions: regions per axis.
    """

    direction: str
    box: tuple[int, int]
    variant: str
    dtype: torch.dtype
    head_dim: int
    archs: tuple[int, ...]
    regions: int = 7

    @property
    def name(self) -> str:
        cells, dtype = self.box[0] * self.box[1], str(self.dtype).removeprefix("torch.")
        return f"region-{self.direction}-n{cells}-{self.variant}-{dtype}-d{self.head_dim}"

    def launch(self) -> None:
        from permattn.backends import triton
        from permattn.core.regions import RegionArgs, RegionBwdArgs, RouteArgs

        soft, frames = self.variant == "soft", 2 if self.variant == "video" else 1
        height, width = (self.regions * x - (soft and x > 1) for x in self.box)
        shape = (2, HEADS, frames, height, width)
        x = torch.zeros(2, frames, height, width, 3, HEADS, self.head_dim, dtype=self.dtype)
        q, k, v = x.unbind(4)
        if self.variant == "nchw":
            q, k, v = (y.flatten(4).permute(0, 4, 1, 2, 3).contiguous() for y in (q, k, v))
            q, k, v = (y.unflatten(1, (HEADS, -1)).permute(0, 1, 3, 4, 5, 2) for y in (q, k, v))
        else:
            q, k, v = (y.permute(0, 4, 1, 2, 3, 5) for y in (q, k, v))
        box = (frames, *self.box)
        if self.direction == "route":
            triton.route_kernels(RouteArgs(q, k, box, box, 4, 1.0))
            return
        graph = torch.zeros(2, 1, self.regions**2, 4, dtype=torch.int32)
        weights = graph.float() if soft else None
        args = RegionArgs(q, k, v, graph, weights, box, box, soft, 0.125)
        lse = torch.zeros(shape)
        if self.direction == "fwd":
            triton.region_forward_kernels(args, v, lse)
        else:
            triton.region_backward_kernels(RegionBwdArgs(args, v, lse, v, lse))


AnyCase = Case | ProbeCase | QuantCase | MassCase | RegionCase


def make_plan(kind: str, tokens: int) -> AttnPlan:
    """A plan of one kind.

    Args:
        kind: "dense" = causal, token order; "gather" = permuted, a band of two ends; "small" =
            permuted blocks of 16; "parts" = three parts in two query orders, so that state and
            gradients go through memory; "orders" = see `axis_orders`.
    """
    if kind == "dense":
        return plan_dense(tokens, tokens, causal=True)
    if kind == "orders":
        return axis_orders(tokens)
    if kind == "parts":
        return split_plan(tokens, tokens, heads=HEADS)
    block = 128 if kind == "gather" else 16
    band = TokenBand(0, 100) if kind == "gather" else TokenBand(0)
    return random_plan(tokens, tokens, block_q=block, block_kv=block, band=band, permuted=True)


def axis_orders(tokens: int) -> AttnPlan:
    """Heads with orders of their own and two parts of keys under one query order, no band."""
    g = torch.Generator().manual_seed(0)
    q_perm, order = (random_permutation(tokens, heads=HEADS, generator=g) for _ in "qk")
    text = torch.arange(tokens - 64, tokens)
    vision = order.token_of_slot[order.token_of_slot < tokens - 64].view(HEADS, -1)
    parts = []
    for kv_order in (vision, text):
        kv_perm = Permutation.from_token_of_slot(kv_order, tokens)
        facts = {"block_q": 64, "block_kv": 64, "density": 0.9, "heads": HEADS, "generator": g}
        index = random_index(q_perm, kv_perm, TokenBand(), **facts)
        parts.append(AttnPart(q_perm, kv_perm, index, TokenBand()))
    return AttnPlan(tuple(parts))


def _cases() -> tuple[AnyCase, ...]:
    cases: list[AnyCase] = []
    for way in ("fwd", "bwd"):
        for dim in (64, 128):
            cases += [
                Case(way, plan, BRAIN, dim, dim, EVERY) for plan in ("dense", "gather", "small")
            ]
        sampled = [("parts", BRAIN, 128, 128), ("dense", HALF, 128, 128)]
        sampled += [("gather", SINGLE, dim, dim) for dim in (64, 128, 256)]
        sampled += [("gather", BRAIN, *dims) for dims in ((16, 16), (80, 80), (128, 64))]
        sampled += [(plan, BRAIN, 256, 256) for plan in ("gather", "small")]
        cases += [Case(way, *facts, SAMPLE) for facts in sampled]
    for axis in ("plain", "order"):
        cases += [ProbeCase(axis, 64, BRAIN, dim, EVERY) for dim in (64, 128)]
    shapes = [(64, HALF, 128), (64, SINGLE, 64), (64, SINGLE, 128), (64, SINGLE, 256)]
    shapes += [(64, BRAIN, 16), (64, BRAIN, 80), (64, BRAIN, 256)]
    shapes += [(16, BRAIN, 128), (32, BRAIN, 128), (16, SINGLE, 128)]
    cases += [ProbeCase("order", *facts, SAMPLE) for facts in shapes]
    masses = [MassCase(64, BRAIN, dim, WITH_FLOAT8) for dim in (64, 128)]
    masses += [MassCase(128, BRAIN, 128, SAMPLE), MassCase(64, SINGLE, 64, SAMPLE)]
    return (*cases, *_quantised_cases(), *masses, *_region_cases())


def _quantised_cases() -> list[QuantCase]:
    """Every format at both head dims; other groups of keys, plans and dtypes by sample."""
    cases = []
    for dim in (64, 128):
        for pv in ("none", "int8", "fp8"):
            transform = "pairs" if pv == "int8" else "none"
            spec = QuantSpec("int8", pv, 64, 64, smooth_k=True)
            cases.append(QuantCase("orders", spec, transform, BRAIN, dim, WITH_FLOAT8))
    for pv, rows in (("int8", 32), ("int8", 128), ("fp8", 128), ("none", 128)):
        spec = QuantSpec("int8", pv, 64, rows)
        cases.append(QuantCase("gather", spec, "none", BRAIN, 128, SAMPLE))
    cases.append(QuantCase("gather", QuantSpec("int8", "int8", 64, 128), "none", BRAIN, 64, SAMPLE))
    for dim in (64, 128):
        cases.append(QuantCase("orders", QuantSpec.named("int4"), "none", BRAIN, dim, SAMPLE))
    spec = QuantSpec("int4", "int4", 16, 64, balance=True)
    cases.append(QuantCase("orders", spec, "across", HALF, 128, SAMPLE))
    cases.append(QuantCase("orders", QuantSpec("int8"), "none", SINGLE, 64, SAMPLE))
    return cases


def _region_cases() -> list[RegionCase]:
    """The stages at 224 and 512, forward, backward and routing; other shapes by sample."""
    cases = []
    sides = (2, 4, 8, 16)
    for way in ("fwd", "bwd"):
        cases += [RegionCase(way, (s, s), "plain", BRAIN, 32, EVERY) for s in sides]
        sampled = [((2, 2), "nchw", BRAIN, 32), ((8, 8), "nchw", BRAIN, 32)]
        sampled += [((4, 4), "soft", BRAIN, 32), ((8, 8), "soft", BRAIN, 128)]
        sampled += [
            ((2, 2), "soft", BRAIN, 128),
            ((7, 11), "plain", HALF, 64),
            ((8, 8), "video", BRAIN, 32),
        ]
        sampled += [((8, 8), "plain", BRAIN, dim) for dim in (96, 256)]
        sampled += [((8, 8), "plain", SINGLE, dim) for dim in (32, 128)]
        cases += [RegionCase(way, *facts, SAMPLE) for facts in sampled]
    cases += [RegionCase("route", (s, s), "plain", BRAIN, 32, EVERY) for s in (2, 8)]
    cases.append(RegionCase("route", (2, 2), "plain", SINGLE, 32, SAMPLE, 16))
    cases.append(RegionCase("route", (1, 1), "nchw", BRAIN, 32, SAMPLE, 32))
    return cases


CASES = _cases()
