"""Where a region looks: the routing of every stage, for pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from permattn.models.vision import BiFormer, BiFormerSTL, BiLevelRoutingAttention


@dataclass(frozen=True, eq=False)
class StageRoutes:
    """The routing of the last block of a stage, for one image.

    Args:
        stage: from 1.
        counts: regions per axis (rows, columns).
        graph: int64 [regions, topk], raster order, most alike first.
        weights: float [regions, topk]: softmax of the kept affinities.
    """

    stage: int
    counts: tuple[int, int]
    graph: Tensor
    weights: Tensor

    @property
    def topk(self) -> int:
        return self.graph.shape[1]

    @property
    def num_regions(self) -> int:
        return self.counts[0] * self.counts[1]

    def region_at(self, x: float, y: float) -> int:
        """The region that holds a place, in shares of width and height."""
        rows, columns = self.counts
        return min(int(y * rows), rows - 1) * columns + min(int(x * columns), columns - 1)


@torch.no_grad()
def routes_of(model: BiFormer | BiFormerSTL, image: Tensor) -> list[StageRoutes]:
    """The routing of every routed stage of a network for one image.

    Args:
        model: its `BiLevelRoutingAttention` are looked at; dense stages have no routes.
        image: [3, H, W], normalised.
    """
    found: list[StageRoutes] = []
    hooks = []
    for i in range(len(model.stages)):
        attention = list(model.blocks(i))[-1].attn
        if isinstance(attention, BiLevelRoutingAttention):
            hooks.append(attention.register_forward_pre_hook(_recorder(i + 1, found)))
    was_training = model.training
    model.eval()
    try:
        model(image[None])
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return found


def _recorder(number: int, found: list[StageRoutes]) -> Any:
    def record(attention: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(attention, BiLevelRoutingAttention)
        # Not the module's call, which would come back here.
        _, weights, graph, _ = attention.forward(inputs[0], ret_attn_mask=True)
        counts = (attention.n_win[0], attention.n_win[1])
        found.append(StageRoutes(number, counts, graph[0].cpu(), weights[0].float().cpu()))

    return record
