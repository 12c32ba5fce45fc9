"""Host side of attention from region to region: tensors in, launches out. No sync."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from permattn.triton_kernels import launch
from permattn.triton_kernels.config import Kernel, padded_head_dim
from permattn.triton_kernels.launch import LOG2E
from permattn.triton_kernels.regions_bwd import region_dkdv_kernel, region_dq_kernel
from permattn.triton_kernels.regions_config import RegionTiles, select_region_tiles
from permattn.triton_kernels.regions_fwd import region_fwd_kernel
from permattn.triton_kernels.regions_reverse import launch_reverse_graph
from torch import Tensor

Sizes = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Regions:
    """What every launch of a call shares; see `core.regions.RegionArgs`.

    Args:
        q, k, v: [B, M, T, H, W, D or Dv], any strides.
        graph: int32 [B or 1, M or 1, Rq, k], contiguous; weights: the same in float32, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    graph: Tensor
    weights: Tensor | None
    q_box: Sizes
    kv_box: Sizes
    count_padding: bool
    scale: float

    @property
    def num_q_regions(self) -> int:
        return num_regions(self.q, self.q_box)

    @property
    def num_kv_regions(self) -> int:
        return num_regions(self.k, self.kv_box)

    @property
    def topk(self) -> int:
        return self.graph.shape[3]

    def tiles(self, kernel: Kernel) -> RegionTiles:
        cells, streamed = num_cells(self.q_box), num_cells(self.kv_box)
        if kernel == "dkdv":
            cells, streamed = streamed, cells
        return select_region_tiles(
            kernel,
            element_size=self.q.element_size(),
            head_dim=self.q.shape[5],
            head_dim_v=self.v.shape[5],
            cells=cells,
            streamed_cells=streamed,
            # The gradient of a weight is a sum over one region.
            aligned=kernel == "dq" and self.weights is not None,
        )

    def counts(self) -> tuple[int, ...]:
        """The sizes that every kernel takes, in its order; none of them enters the code."""
        sizes = (*self.q.shape[2:5], *self.k.shape[2:5])
        return self.q.shape[1], self.num_q_regions, self.num_kv_regions, self.topk, *sizes

    def constants(self, tiles: RegionTiles) -> dict[str, Any]:
        """The facts that enter the code of every kernel, and Triton's own keywords."""
        config = tiles.config
        return {
            "Q_BOX": self.q_box,
            "KV_BOX": self.kv_box,
            "IMAGE": self.q.shape[2] == 1 and self.k.shape[2] == 1,
            "D": self.q.shape[5],
            "DV": self.v.shape[5],
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_D": padded_head_dim(self.q.shape[5]),
            "BLOCK_DV": padded_head_dim(self.v.shape[5]),
            **launch.launch_options(config),
        }


def num_cells(box: Sizes) -> int:
    return box[0] * box[1] * box[2]


def num_regions(x: Tensor, box: Sizes) -> int:
    """Regions of a map [B, M, T, H, W, D]."""
    t, h, w = (launch.ceil_div(n, b) for n, b in zip(x.shape[2:5], box, strict=True))
    return t * h * w


def table_rows(x: Tensor | None) -> tuple[int, int]:
    """`launch.plan_rows` of a [Bx, Hx, regions, topk]."""
    return (0, 0) if x is None else launch.plan_rows(x[..., 0])


def launch_region_forward(r: Regions, out: Tensor, lse: Tensor) -> None:
    """Fills out [B, M, T, H, W, Dv], any strides, and lse float32 [B, M, T, H, W], contiguous."""
    tiles = r.tiles("fwd")
    if out.numel() == 0:
        return
    num_tiles = launch.ceil_div(num_cells(r.q_box), tiles.config.block_m)
    region_fwd_kernel[(num_tiles * r.q.shape[1] * r.num_q_regions * r.q.shape[0],)](
        *(r.q, r.k, r.v, out, lse, r.graph, r.weights),
        *(r.q.stride(), r.k.stride(), r.v.stride(), out.stride()),
        *(table_rows(r.graph), table_rows(r.weights)),
        *r.counts(),
        r.scale * LOG2E,
        SPAN=tiles.span,
        COUNT_PADDING=r.count_padding,
        **r.constants(tiles),
    )


@dataclass(frozen=True, eq=False)
class RegionGradient:
    """What a backward reads and fills beside the call.

    Args:
        out, dout: [B, M, T, H, W, Dv], any strides.
        lse, dlse: float32 [B, M, T, H, W], contiguous.
        dq, dk, dv: filled; as q, k and v, any strides.
    """

    out: Tensor
    dout: Tensor
    lse: Tensor
    dlse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def launch_region_backward(
    r: Regions, g: RegionGradient, reverse: tuple[Tensor, Tensor] | None = None
) -> Tensor | None:
    """Fills dq, dk and dv; deterministic, without atomics.

    Args:
        reverse: (offsets, entries) of `core.regions.reverse_graph`; None = found by a kernel, whose
            work grows with key regions times places of the graph.

    Returns: the gradient of the weights, float32 [B, M, Rq, tiles of a region, k], one sum per
    query tile; None without weights.
    """
    delta = torch.empty_like(g.lse)
    dweights = _launch_dq(r, g, delta)
    _launch_dkdv(r, g, delta, reverse or launch_reverse_graph(r.graph, r.num_kv_regions))
    return dweights


def _launch_dq(r: Regions, g: RegionGradient, delta: Tensor) -> Tensor | None:
    tiles = r.tiles("dq")
    batch, heads = r.q.shape[:2]
    num_tiles = launch.ceil_div(num_cells(r.q_box), tiles.config.block_m)
    dweights = None
    if r.weights is not None:
        shape = (batch, heads, r.num_q_regions, num_tiles, r.topk)
        dweights = r.weights.new_empty(shape)
    if g.dq.numel() == 0:
        return dweights
    region_dq_kernel[(num_tiles * heads * r.num_q_regions * batch,)](
        *(r.q, r.k, r.v, g.out, g.dout, g.lse, g.dlse, delta, g.dq, dweights, r.graph, r.weights),
        *(r.q.stride(), r.k.stride(), r.v.stride()),
        *(g.out.stride(), g.dout.stride(), g.dq.stride()),
        *(table_rows(r.graph), table_rows(r.weights)),
        *r.counts(),
        *(r.scale, r.scale * LOG2E),
        SPAN=tiles.span,
        **r.constants(tiles),
    )
    return dweights


def _launch_dkdv(
    r: Regions, g: RegionGradient, delta: Tensor, reverse: tuple[Tensor, Tensor]
) -> None:
    tiles = r.tiles("dkdv")
    num_tiles = launch.ceil_div(num_cells(r.kv_box), tiles.config.block_m)
    if g.dk.numel() == 0:
        return
    region_dkdv_kernel[(num_tiles * r.k.shape[1] * r.num_kv_regions * r.k.shape[0],)](
        *(r.q, r.k, r.v, g.dout, g.lse, delta, g.dk, g.dv, *reverse, r.weights),
        *(r.q.stride(), r.k.stride(), r.v.stride()),
        *(g.dout.stride(), g.dk.stride(), g.dv.stride()),
        *(table_rows(r.graph), table_rows(r.weights)),
        *r.counts(),
        *(r.scale, r.scale * LOG2E),
        SPAN=tiles.span,
        **r.constants(tiles),
    )
