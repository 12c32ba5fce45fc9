"""Where a region looks: the routing of every stage, for pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


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
def routes_of(model: nn.Module, image: Tensor) -> list[StageRoutes]:
    """The routing of every routed stage of a network for one image.

    Args:
        model: a `permattn.models.vision` network, or any whose `stages` hold blocks with an `attn`
            that answers `attn(x, ret_attn_mask=True)` as the released module does.
        image: [3, H, W], normalised.
    """
    found: list[StageRoutes] = []
    hooks = []
    for number, stage in enumerate(model.stages, 1):  # type: ignore[arg-type]
        attention = list(stage)[-1].attn
        if hasattr(attention, "n_win"):
            hooks.append(attention.register_forward_pre_hook(_recorder(number, found)))
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
    def record(attention: Any, inputs: tuple[Tensor, ...]) -> None:
        # Not the module's call, which would come back here.
        _, weights, graph, _ = attention.forward(inputs[0], ret_attn_mask=True)
        n_win = attention.n_win
        counts = (n_win, n_win) if isinstance(n_win, int) else (n_win[0], n_win[1])
        found.append(StageRoutes(number, counts, graph[0].long().cpu(), weights[0].float().cpu()))

    return record
