"""A shape of the GPU bench on the device: inputs, blocks, plans, and the check before the clock."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from permattn import plan_paro, testing
from permattn.core import AttnPart, AttnPlan, BlockIndex, Permutation, QuantSpec, TokenBand
from permattn.core import TokenGrid as Grid
from permattn.patterns.dense import plan_dense
from torch import Tensor

from bench import local_heads
from bench.gate import sample_rows, visible_rows
from bench.gpu_shapes import Shape
from bench.plans import head_orders

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


@dataclass(eq=False)
class Listed:
    """One set of blocks of a layer.

    Args:
        kept: listed key blocks of a row.
        mask: bool [H, n, n].
        plan: 16 bits.
    """

    layer: Layer
    block: int
    density: float
    kept: int
    scores: Tensor
    mask: Tensor
    plan: AttnPlan

    @classmethod
    def of(cls, layer: Layer, block: int, density: float) -> Listed:
        kept, scores = layer.kept(block, density), layer.scores(block, density)
        mask = layer.mask(scores, kept)
        plan = layer.plan(mask, block, kept, QuantSpec())
        return cls(layer, block, density, kept, scores, mask, plan)

    @property
    def facts(self) -> dict[str, Any]:
        """Of every row of results."""
        name = self.layer.shape.name
        return {"shape": name, "density": self.density, "block": self.block}

    @functools.cached_property
    def flops(self) -> float:
        shape = self.layer.shape
        pairs = float(self.plan.num_block_pairs().double().mean()) * shape.heads
        return 4 * pairs * shape.head_dim

    @functools.cached_property
    def sample(self) -> tuple[Tensor, Tensor]:
        """Some queries, and the keys that they see: int64 [n], bool [1, H, n, S]; on the CPU."""
        shape = self.layer.shape
        rows = sample_rows(shape.tokens, 6)
        return rows, visible_rows(self.plan.to("cpu"), rows, 1, shape.heads)

    def gate(self, out: Tensor, *, quantised: bool) -> tuple[float, float]:
        """(error, bound) of the sample in the first and the last head, against float64."""
        layer, shape = self.layer, self.layer.shape
        rows, seen = self.sample
        there = rows.to(layer.device)
        worst = (0.0, 0.0)
        group, scale = shape.heads // shape.kv_heads, shape.head_dim**-0.5
        for h in {0, shape.heads - 1}:
            some = layer.q[:, h, None, there]
            keys, values = layer.k[:, h // group, None], layer.v[:, h // group, None]
            shown = seen[:, h, None].to(layer.device)
            ours = out[:, h, None, there]
            wide = (some.double(), keys.double(), values.double())
            exact = testing.masked_attention(*wide, shown, scale)[0]
            if quantised:
                error, bound = float((ours - exact).norm() / exact.norm()), _QUANTISED_ERROR
            else:
                plain = testing.masked_attention(some, keys, values, shown, scale)[0]
                found = testing.float64_bound(ours, plain, exact)
                error, bound = found.ours, found.bound
            if not error - bound < worst[0] - worst[1]:
                worst = (error, bound)
        return worst
