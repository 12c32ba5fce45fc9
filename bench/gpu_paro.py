"""PAROAttention on a GPU: every format over ragged video with text, against the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import permattn
import torch
from permattn.backends import BACKENDS
from permattn.core import AttnPlan, Problem, QuantSpec, TokenGrid
from permattn.core.quant import PRECISIONS
from torch import Tensor

from bench import local_heads
from bench.gpu_suite import Suite
from bench.plans import head_orders

FORMATS = ("none", *PRECISIONS)
# A few steps of the rounding of a result, relative to its norm.
BOUND = 0.01


@dataclass(frozen=True)
class Layer:
    """The self-attention of one layer of a video model."""

    grid: tuple[int, int, int]
    heads: int
    head_dim: int
    text: int = 0

    @property
    def num_tokens(self) -> int:
        frames, height, width = self.grid
        return self.text + frames * height * width


def correctness(suite: Suite) -> list[str]:
    """Every format on ragged video with text before it, against the reference on the same numbers.

    Returns: what the backend has no kernel for, and why.
    """
    refused = []
    for head_dim in (64,) if suite.rehearsal else (64, 128):
        layer = Layer((5, 9, 10), 6, head_dim, text=30)
        inputs = local_heads.inputs(
            *(layer.grid, head_orders(6), head_dim),
            text=layer.text,
            outliers=True,
            dtype=torch.bfloat16,
        )
        there = [x.to(suite.device) for x in inputs]
        for name in FORMATS:
            plan = plan_of(layer, 0.4, QuantSpec.named(name))
            a, b, c = there
            problem = Problem.of(a, b, c, plan, needs_grad=False)
            if why := BACKENDS[suite.asked].why_not(problem):
                refused.append(f"{name}: {why}")
                continue
            call = partial(_error, suite, inputs, there, plan)
            suite.check(f"{name}-d{head_dim}", call)
    return refused


def _error(
    suite: Suite, inputs: Sequence[Tensor], there: Sequence[Tensor], plan: AttnPlan
) -> tuple[float, float]:
    """Relative, of the whole result."""
    q, k, v = inputs
    want = permattn.sparse_attention(q, k, v, plan, backend="reference").float()
    a, b, c = there
    got = permattn.sparse_attention(a, b, c, plan.to(suite.device), backend=suite.asked)
    return float((got.cpu().float() - want).norm() / want.norm()), BOUND


def plan_of(layer: Layer, density: float, quant: QuantSpec) -> AttnPlan:
    """The nearest blocks of every head, on the CPU."""
    orders = head_orders(layer.heads)
    masks = {o: local_heads.block_mask(layer.grid, o, density, (64, 64)) for o in set(orders)}
    return permattn.plan_paro(
        TokenGrid(layer.text, *layer.grid),
        torch.tensor(orders),
        torch.stack([masks[o] for o in orders]),
        num_tokens=layer.num_tokens,
        quant=quant,
    )
