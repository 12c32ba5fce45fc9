"""What bi-level routing attention is measured against: the released gather, and what torch offers.

All take one packed projection, as the released modules do, and a graph: they route nothing. Every
function is plain torch, so that each can be compiled, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from permattn import bilevel_routing_attention
from torch import Tensor

# (qkv [B, H, W, 3 * C], graph int64 [B, R, k]) -> [B, H, W, C]
Attend = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Stage:
    """The attention of one stage of a BiFormer.

    Args:
        name: of the results.
        batch, height, heads: B, H, and heads of `head_dim`.
        regions: S per side.
        topk: k.
        columns: W; None = H.
    """

    name: str
    batch: int
    height: int
    heads: int
    regions: int
    topk: int
    head_dim: int = 32
    columns: int | None = None

    @property
    def width(self) -> int:
        return self.columns or self.height

    @property
    def box(self) -> tuple[int, int]:
        return self.height // self.regions, self.width // self.regions

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    @property
    def scale(self) -> float:
        """Of the released models: the whole width, not a head's."""
        return self.channels**-0.5

    @property
    def num_regions(self) -> int:
        return self.regions**2

    def __str__(self) -> str:
        cells = self.box[0] * self.box[1]
        return (
            f"{self.height}x{self.width}, B={self.batch}, {self.heads} heads of {self.head_dim}, "
            f"{self.num_regions} regions of {cells}, k={self.topk}"
        )

    def draw(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """qkv [B, H, W, 3 * C], graph int64 [B, R, k] and the gradient of the result."""
        g = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.height, self.width)
        qkv = torch.randn(*shape, 3 * self.channels, generator=g).to(dtype)
        grad = torch.randn(*shape, self.channels, generator=g).to(dtype)
        score = torch.rand(self.batch, self.num_regions, self.num_regions, generator=g)
        return qkv, score.topk(self.topk, -1).indices, grad


STAGES = (
    Stage("224-stage1", 16, 56, 2, 7, 1),
    Stage("224-stage2", 16, 28, 4, 7, 4),
    Stage("224-stage3", 16, 14, 8, 7, 16),
    Stage("512-stage1", 2, 128, 2, 8, 1),
    Stage("512-stage2", 2, 64, 4, 8, 4),
    Stage("512-stage3", 2, 32, 8, 8, 16),
)


def attends(stage: Stage) -> dict[str, Attend]:
    """Every contender of a stage; `gather` is what the released code does."""
    return {
        "ours": lambda qkv, graph: ours(qkv, graph, stage),
        "gather": lambda qkv, graph: gather(qkv, graph, stage),
        "index_select": lambda qkv, graph: index_select(qkv, graph, stage),
        "mask": lambda qkv, graph: mask(qkv, graph, stage),
    }


def ours(qkv: Tensor, graph: Tensor, stage: Stage, backend: str = "auto") -> Tensor:
    q, k, v = qkv.unflatten(-1, (3, stage.heads, -1)).unbind(3)
    sides = (stage.regions, stage.regions)
    out = bilevel_routing_attention(
        q, k, v, graph, sides, scale=stage.scale, check_graph=False, backend=backend
    )
    assert isinstance(out, Tensor)
    return out.flatten(-2)


def gather(qkv: Tensor, graph: Tensor, stage: Stage) -> Tensor:
    """Keys and values gathered out of an expanded tensor: its gradient is R times the map."""
    q, kv = _by_regions(qkv, stage).split((stage.channels, 2 * stage.channels), -1)
    regions, cells, width = kv.shape[1:]
    wide = kv[:, None].expand(-1, regions, -1, -1, -1)
    index = graph[..., None, None].expand(-1, -1, -1, cells, width)
    k, v = wide.gather(2, index).flatten(2, 3).chunk(2, -1)
    q, k, v = (x.unflatten(-1, (stage.heads, -1)).transpose(2, 3) for x in (q, k, v))
    p = torch.softmax((q * stage.scale) @ k.transpose(-1, -2), -1)
    return _to_map((p @ v).transpose(2, 3).flatten(3), stage)


def index_select(qkv: Tensor, graph: Tensor, stage: Stage) -> Tensor:
    """Rows of regions picked by number, then torch's own attention."""
    q, kv = _by_regions(qkv, stage).split((stage.channels, 2 * stage.channels), -1)
    batch, regions, cells, width = kv.shape
    first = torch.arange(batch, device=graph.device)[:, None, None] * regions
    picked = kv.reshape(batch * regions, cells * width).index_select(0, (graph + first).flatten())
    k, v = picked.view(batch * regions, stage.topk * cells, width).chunk(2, -1)
    q = q.flatten(0, 1)
    q, k, v = (x.unflatten(-1, (stage.heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=stage.scale)
    return _to_map(out.transpose(1, 2).flatten(2).unflatten(0, (batch, regions)), stage)


def mask(qkv: Tensor, graph: Tensor, stage: Stage) -> Tensor:
    """torch's own attention over all tokens, region-major, under a boolean mask."""
    rows = _by_regions(qkv, stage).flatten(1, 2)
    q, k, v = rows.unflatten(-1, (3, stage.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    regions, cells = stage.num_regions, rows.shape[1] // stage.num_regions
    seen = torch.zeros(len(graph), regions, regions, dtype=torch.bool, device=graph.device)
    seen = seen.scatter(2, graph, True)[:, None, :, None, :, None]
    seen = seen.expand(-1, 1, -1, cells, -1, cells).reshape(len(graph), 1, *(2 * rows.shape[1:2]))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=stage.scale)
    return _to_map(out.transpose(1, 2).flatten(2).unflatten(1, (regions, cells)), stage)


def _by_regions(x: Tensor, stage: Stage) -> Tensor:
    """[B, H, W, C] -> [B, R, n, C]."""
    s = stage.regions
    x = x.unflatten(2, (s, -1)).unflatten(1, (s, -1))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _to_map(rows: Tensor, stage: Stage) -> Tensor:
    x = rows.unflatten(2, stage.box).unflatten(1, (stage.regions, stage.regions))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
