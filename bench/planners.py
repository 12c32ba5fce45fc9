"""Planners of the cases: each looks at q and k and returns a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from permattn import (
    HeadPattern,
    plan_a_shape,
    plan_flexprefill,
    plan_prefill,
    plan_tri_shape,
    plan_xattention,
)
from permattn.core import AttnPlan, Segment
from torch import Tensor


@dataclass(frozen=True)
class Prefill:
    """MMInference: one pattern for all heads, or some patterns in turn (a layer's mix)."""

    heads: tuple[HeadPattern, ...]

    def __call__(self, q: Tensor, k: Tensor, segments: Sequence[Segment]) -> AttnPlan:
        heads = [self.heads[h % len(self.heads)] for h in range(q.shape[1])]
        return plan_prefill(q, k, [segments] * q.shape[0], heads)


@dataclass(frozen=True)
class FlexPrefill:
    gamma: float = 0.9
    tau: float = 0.1

    def __call__(self, q: Tensor, k: Tensor, segments: Sequence[Segment]) -> AttnPlan:
        return plan_flexprefill(q, k, gamma=self.gamma, tau=self.tau)


@dataclass(frozen=True)
class XAttention:
    stride: int = 8
    threshold: float = 0.9

    def __call__(self, q: Tensor, k: Tensor, segments: Sequence[Segment]) -> AttnPlan:
        return plan_xattention(q, k, stride=self.stride, threshold=self.threshold)


@dataclass(frozen=True)
class Static:
    """A-shape, and with `last` dense rows at the end the tri-shape."""

    sink: int = 128
    local: int = 1024
    last: int = 0

    def __call__(self, q: Tensor, k: Tensor, segments: Sequence[Segment]) -> AttnPlan:
        sizes = {"sink": self.sink, "local": self.local, "num_kv_tokens": k.shape[2]}
        if self.last:
            return plan_tri_shape(q.shape[2], last=self.last, **sizes, device=q.device)
        return plan_a_shape(q.shape[2], **sizes, device=q.device)


Planner = Prefill | FlexPrefill | XAttention | Static

# The grid of earlier results: every default.
GRID = Prefill((HeadPattern("grid"),))
# The sizes of MMInference's Table 4 (arXiv 2504.16083): a local window of 1024, a sink of 128.
GRID_TABLE_4 = Prefill((HeadPattern("grid", sink=128, local=1024),))
# About 5 % of the causal pairs at 32k tokens.
GRID_5 = Prefill((HeadPattern("grid", local=256),))
# About 8 % of them.
LINES_8 = Prefill(
    (HeadPattern("vertical_slash", vertical=1000, slash=13, local=256, sink=30, last=0),)
)
AUTO = Prefill((HeadPattern("auto", local=256, vertical=256),))
# Of every seven heads: four grids, two of lines, one of window and sink; the measured whole layer.
LAYER = Prefill(
    (
        *3 * (HeadPattern("grid", local=256),),
        HeadPattern("vertical_slash", vertical=1000, slash=15, local=256),
        HeadPattern("grid", local=256),
        HeadPattern("vertical_slash", vertical=1000, slash=15, local=256),
        HeadPattern("tri_shape", sink=128, local=1024, last=128),
    )
)
