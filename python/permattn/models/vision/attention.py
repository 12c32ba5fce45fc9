"""Bi-level routing attention as a module: the released class, name for name, and its video form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permattn.bilevel import PadMode, bilevel_routing_attention, cut_regions, route_regions
from permattn.core.plan import ceil_div
from permattn.core.regions import RegionGrid, region_means, top_regions
from permattn.models.vision.dense import check_heads
from permattn.models.vision.gathered import attend_gathered, route_gathered
from permattn.models.vision.layers import depthwise

# "legacy": x is padded with zeros before the projection, as released models were trained: padding
# tokens have q, k and v of the bias, count in the means and are attended to.
ModulePadMode = Literal["legacy", "zero", "mask"] | None
PAD_MODES = (None, "legacy", "zero", "mask")

_POOLS: dict[tuple[str, int], Callable[[Tensor, int], Tensor]] = {
    ("ada_avgpool", 2): F.adaptive_avg_pool2d,
    ("ada_avgpool", 3): F.adaptive_avg_pool3d,
    ("ada_maxpool", 2): F.adaptive_max_pool2d,
    ("ada_maxpool", 3): F.adaptive_max_pool3d,
    ("avgpool", 2): F.avg_pool2d,
    ("avgpool", 3): F.avg_pool3d,
    ("maxpool", 2): F.max_pool2d,
    ("maxpool", 3): F.max_pool3d,
}


class QKVLinear(nn.Module):
    """One projection for q, k and v: [..., dim] -> [..., qk_dim + qk_dim + dim]."""

    def __init__(self, dim: int, qk_dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 2 * qk_dim + dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv(x)


class TopkRouting(nn.Module):
    """Holds the router's projection, where it has one, under the released name."""

    def __init__(self, qk_dim: int, param_routing: bool) -> None:
        super().__init__()
        self.emb: nn.Module = nn.Linear(qk_dim, qk_dim) if param_routing else nn.Identity()


class BiLevelRoutingAttention(nn.Module):
    """Attention of every token to the tokens of the regions its own region is routed to.

    Source: BiFormer (arXiv 2303.08810), section 3.2; the released `ops/bra_legacy.py`, whose
    arguments and state_dict keys these are. Deviations: the default of side_dwconv is that of the
    released models (the class had 3); `pad_mode` and `backend` are new; nothing is gathered; among
    regions of equal affinity the lower number wins.

    Args:
        dim: channels, the last axis.
        num_heads: heads; they share one routing.
        n_win: regions per axis: one number, (rows, columns), or (frames, rows, columns) for video.
        qk_dim: channels of q and of k; None = dim.
        qk_scale: multiplies q . k and the routing's affinities; None = qk_dim ** -0.5 (the whole
            width, not that of a head).
        kv_per_win: "ada_*" poolings: keys of a region per axis.
        kv_downsample_ratio: "avgpool" and "maxpool": kernel and stride inside a region; what is
            left over at its end is dropped.
        kv_downsample_kernel: of "fracpool", which nobody has written; None.
        kv_downsample_mode: "identity", "ada_avgpool", "ada_maxpool", "avgpool" or "maxpool". The
            regions' means are of the keys before pooling.
        topk: regions that a region sees, 1 to their number.
        param_attention: "qkvo", or "qkv" for no projection of the output.
        param_routing: a learned projection of the regions' means; wants diff_routing.
        diff_routing: gradients reach the router; wants soft_routing.
        soft_routing: keys and values of a routed region times its weight, the softmax over the
            topk affinities.
        side_dwconv: kernel of the depthwise convolution of v that is added; 0 = none.
        auto_pad: True means pad_mode "legacy" where pad_mode is None.
        pad_mode: what happens where n_win does not divide the map. None: an error. "legacy": x is
            padded before the projection, as released models were trained. "zero": regions of
            size // n_win, of which there may be more, padded with keys of zeros. "mask": regions
            of ceil(size / n_win), cells outside hidden; there may be fewer regions than n_win
            says, and topk is clamped to their number.
        backend: "auto" or the name of a backend of `bilevel_routing_attention`; "torch": plain
            torch operators that gather, for exporters.

    Raises:
        ValueError: channels that do not split, unknown modes, modes that exclude each other.
        NotImplementedError: kv_downsample_mode "fracpool" or "conv".
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int | Sequence[int] = 7,
        qk_dim: int | None = None,
        qk_scale: float | None = None,
        kv_per_win: int = 4,
        kv_downsample_ratio: int = 4,
        kv_downsample_kernel: int | None = None,
        kv_downsample_mode: str = "identity",
        topk: int = 4,
        param_attention: str = "qkvo",
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
        side_dwconv: int = 5,
        auto_pad: bool = False,
        *,
        pad_mode: ModulePadMode = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.qk_dim = dim, num_heads, qk_dim or dim
        check_heads("dim", dim, num_heads)
        check_heads("qk_dim", self.qk_dim, num_heads)
        self.n_win = window_counts(n_win)
        self.topk = checked_topk(topk)
        self.scale = qk_scale or self.qk_dim**-0.5
        self.pad_mode: ModulePadMode = "legacy" if auto_pad and pad_mode is None else pad_mode
        self.backend = backend
        self.kv_downsample_mode = kv_downsample_mode
        self.kv_per_win, self.kv_downsample_ratio = kv_per_win, kv_downsample_ratio
        self.param_routing = param_routing
        self.diff_routing, self.soft_routing = diff_routing, soft_routing
        self._check_modes(param_attention, kv_downsample_kernel)
        self.lepe = depthwise(dim, side_dwconv, len(self.n_win))
        self.router = TopkRouting(self.qk_dim, param_routing)
        self.qkv = QKVLinear(dim, self.qk_dim)
        self.wo: nn.Module = nn.Linear(dim, dim) if param_attention == "qkvo" else nn.Identity()

    def _check_modes(self, param_attention: str, kv_downsample_kernel: int | None) -> None:
        if param_attention not in ("qkvo", "qkv"):
            raise ValueError(f"param_attention: wants 'qkvo' or 'qkv', got {param_attention!r}")
        if self.pad_mode not in PAD_MODES:
            raise ValueError(f"pad_mode: wants one of {PAD_MODES}, got {self.pad_mode!r}")
        if self.param_routing and not self.diff_routing:
            raise ValueError(
                "param_routing: wants diff_routing=True, without which it is not trained"
            )
        if self.diff_routing and not self.soft_routing:
            raise ValueError(
                "diff_routing: wants soft_routing=True, by whose weights gradients reach the "
                "router; hard differentiable routing does not exist"
            )
        mode = self.kv_downsample_mode
        if mode in ("fracpool", "conv"):
            raise NotImplementedError(f"kv_downsample_mode: {mode!r} was never written")
        if mode != "identity" and (mode, 2) not in _POOLS:
            raise ValueError(
                "kv_downsample_mode: wants 'identity', 'ada_avgpool', 'ada_maxpool', 'avgpool' or "
                f"'maxpool', got {mode!r}"
            )
        if kv_downsample_kernel is not None:
            raise ValueError(
                "kv_downsample_kernel: wants None, only 'fracpool' would use it, got "
                f"{kv_downsample_kernel}"
            )
        if mode != "identity" and self.pad_mode in ("zero", "mask"):
            raise ValueError(
                f"kv_downsample_mode: wants 'identity' beside pad_mode {self.pad_mode!r}, whose "
                f"regions may be cut off, got {mode!r}"
            )
        name = "kv_per_win" if mode.startswith("ada_") else "kv_downsample_ratio"
        if mode != "identity" and getattr(self, name) < 1:
            raise ValueError(f"{name}: wants at least 1, got {getattr(self, name)}")

    def forward(self, x: Tensor, ret_attn_mask: bool = False) -> Any:
        """Attends inside the routed regions.

        Args:
            x: [B, H, W, dim], or [B, T, H, W, dim] where n_win has three numbers.
            ret_attn_mask: also return the routing and the probabilities, gathered and written out:
                for pictures, at the size of pictures.

        Returns: a map like x; with ret_attn_mask (out, routing weights [B, R, topk], regions int64
        [B, R, topk], probabilities [B * R, heads, n, topk * nk]), as the released class.

        Raises:
            ValueError: a shape or a size that does not fit; topk above the number of regions.
        """
        ndim = len(self.n_win)
        if x.dim() != ndim + 2 or x.shape[-1] != self.dim:
            axes = "T, H, W" if ndim == 3 else "H, W"
            raise ValueError(f"x: wants [B, {axes}, {self.dim}], got shape {list(x.shape)}")
        size = x.shape[1:-1]
        if self.pad_mode == "legacy":
            x = _pad_to_multiple(x, self.n_win)
        grid = self._cut(x.shape[1:-1])
        pad_mode: PadMode = None if self.pad_mode == "legacy" else self.pad_mode
        topk = self.topk
        if pad_mode == "mask":
            topk = min(topk, grid.num_regions)
        if topk > grid.num_regions:
            raise ValueError(
                f"topk: wants 1 to {grid.num_regions}, the number of regions {grid.counts}, got "
                f"{topk}"
            )

        qkv = self.qkv(x)
        q, kv = qkv.split([self.qk_dim, self.qk_dim + self.dim], -1)
        k, v = kv.split([self.qk_dim, self.dim], -1)
        lepe = None if self.lepe is None else self.lepe(v.movedim(-1, 1)).movedim(1, -1)
        q, k = self._heads(q), self._heads(k)
        graph, affinity = self._route(q, k, grid, topk, pad_mode)
        weights = affinity.softmax(-1) if self.soft_routing or ret_attn_mask else None
        kv_grid = grid
        if self.kv_downsample_mode != "identity":
            pooled, kv_grid = self._pool(kv, grid)
            k, v = pooled.split([self.qk_dim, self.dim], -1)
            k = self._heads(k)
        v = self._heads(v)
        soft = weights if self.soft_routing else None
        attn = None
        if ret_attn_mask or self.backend == "torch":
            rows, keys, values = (with_frames(x) for x in (q, k, v))
            out, attn = attend_gathered(
                *(rows, keys, values, graph, (grid, kv_grid)),
                weights=soft,
                count_padding=pad_mode == "zero",
                scale=self.scale,
            )
            out = out if ndim == 3 else out.squeeze(1)
        else:
            out = attend_routed(
                *(q, k, v, graph),
                region_size=grid.box[-ndim:],
                kv_region_size=kv_grid.box[-ndim:],
                pad_mode=pad_mode,
                weights=soft,
                scale=self.scale,
                backend=self.backend,
            )
        out = out.flatten(-2)
        if lepe is not None:
            out = out + lepe
        out = _crop(self.wo(out), size)
        if attn is not None and ret_attn_mask:
            return out, weights, graph.long(), attn.flatten(0, 1)
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def _cut(self, size: Sequence[int]) -> RegionGrid:
        if self.pad_mode == "mask":
            box = [ceil_div(n, s) for n, s in zip(size, self.n_win, strict=True)]
            return cut_regions(size, region_size=box, pad_mode="mask", name="n_win")
        pad_mode: PadMode = "zero" if self.pad_mode == "zero" else None
        return cut_regions(size, self.n_win, pad_mode=pad_mode, name="n_win")

    def _route(
        self, q: Tensor, k: Tensor, grid: RegionGrid, topk: int, pad_mode: PadMode
    ) -> tuple[Tensor, Tensor]:
        if self.param_routing:
            maps = (with_frames(x).permute(0, 4, 1, 2, 3, 5) for x in (q, k))
            means = (region_means(x, grid).to(q.dtype) for x in maps)
            hat_q, hat_k = (self.router.emb(x) for x in means)
            return top_regions(hat_q * self.scale @ hat_k.mT, topk)
        if self.backend == "torch" and not self.diff_routing:
            return route_gathered(with_frames(q), with_frames(k), grid, topk, self.scale)
        return route_regions(
            *(q, k),
            region_size=grid.box[-len(self.n_win) :],
            topk=topk,
            pad_mode=pad_mode,
            scale=self.scale,
            differentiable=self.diff_routing,
            backend="auto" if self.backend == "torch" else self.backend,
        )

    def _pool(self, kv: Tensor, grid: RegionGrid) -> tuple[Tensor, RegionGrid]:
        """Pools keys and values inside every region: a smaller map with boxes of its own."""
        ndim, mode = len(self.n_win), self.kv_downsample_mode
        counts, box = grid.counts[-ndim:], grid.box[-ndim:]
        if not mode.startswith("ada_") and min(box) < self.kv_downsample_ratio:
            raise ValueError(
                f"kv_downsample_ratio: wants at most the region's {box} tokens per axis, got "
                f"{self.kv_downsample_ratio}"
            )
        # [B, nh, h, nw, w, C] -> [B, nh, nw, C, h, w], and the same with frames.
        split = [n for pair in zip(counts, box, strict=True) for n in pair]
        x = kv.reshape(kv.shape[0], *split, kv.shape[-1])
        outer, inner = range(1, 2 * ndim, 2), range(2, 2 * ndim + 1, 2)
        x = x.permute(0, *outer, 2 * ndim + 1, *inner).flatten(0, ndim)
        arg = self.kv_per_win if mode.startswith("ada_") else self.kv_downsample_ratio
        x = _POOLS[mode, ndim](x, arg)
        small = x.shape[2:]
        x = x.unflatten(0, (kv.shape[0], *counts))
        order = [axis for i in range(ndim) for axis in (1 + i, ndim + 2 + i)]
        size = [c * b for c, b in zip(counts, small, strict=True)]
        x = x.permute(0, *order, ndim + 1).reshape(kv.shape[0], *size, kv.shape[-1])
        return x, cut_regions(size, region_size=small)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, n_win={self.n_win}, topk={self.topk}, "
            f"pad_mode={self.pad_mode!r}, backend={self.backend!r}"
        )


class VideoBiLevelRoutingAttention(BiLevelRoutingAttention):
    """`BiLevelRoutingAttention` over frames: x [B, T, H, W, dim], regions of frames too.

    Source: as `BiLevelRoutingAttention`; the convolution of v has three axes.

    Args:
        n_win: regions per axis, (frames, rows, columns).
        options: further keyword arguments of `BiLevelRoutingAttention`.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, n_win: Sequence[int] = (2, 7, 7), **options: Any
    ) -> None:
        if isinstance(n_win, int) or len(n_win) != 3:
            raise ValueError(f"n_win: wants (frames, rows, columns), got {n_win}")
        super().__init__(dim, num_heads, n_win, **options)


def attend_routed(q: Tensor, k: Tensor, v: Tensor, graph: Tensor, **options: Any) -> Tensor:
    """`bilevel_routing_attention` over a graph of our own routing, which needs no check."""
    out = bilevel_routing_attention(q, k, v, graph, check_graph=False, **options)
    assert isinstance(out, Tensor)
    return out


def with_frames(x: Tensor) -> Tensor:
    """[B, H, W, heads, D] -> one frame, [B, 1, H, W, heads, D]; of six axes x itself."""
    return x.unsqueeze(1) if x.dim() == 5 else x


def window_counts(n_win: int | Sequence[int]) -> tuple[int, ...]:
    """Regions per axis as a tuple of two or three numbers."""
    counts = (n_win, n_win) if isinstance(n_win, int) else tuple(int(n) for n in n_win)
    if len(counts) not in (2, 3) or min(counts) < 1:
        raise ValueError(f"n_win: wants one, two or three numbers >= 1, got {n_win}")
    return counts


def checked_topk(topk: int) -> int:
    """topk, or ValueError."""
    if isinstance(topk, bool) or not isinstance(topk, int) or topk < 1:
        raise ValueError(f"topk: wants a number of regions >= 1, got {topk!r}")
    return topk


def _pad_to_multiple(x: Tensor, counts: Sequence[int]) -> Tensor:
    """Zeros behind the last row and column until counts divide the map."""
    pad = [-n % s for n, s in zip(x.shape[1:-1], counts, strict=True)]
    if not any(pad):
        return x
    return F.pad(x, (0, 0, *(p for back in reversed(pad) for p in (0, back))))


def _crop(x: Tensor, size: torch.Size) -> Tensor:
    for axis, n in enumerate(size, 1):
        if x.shape[axis] != n:
            x = x.narrow(axis, 0, n)
    return x.contiguous()
