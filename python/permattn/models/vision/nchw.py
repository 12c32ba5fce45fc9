"""The channels-first twin of bi-level routing attention, as its authors refactored it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from permattn.bilevel import PadMode, cut_regions, route_regions
from permattn.core.plan import ceil_div
from permattn.core.regions import RegionGrid
from permattn.models.vision.attention import (
    attend_routed,
    checked_topk,
    window_counts,
    with_frames,
)
from permattn.models.vision.dense import check_heads
from permattn.models.vision.gathered import attend_gathered, route_gathered
from permattn.models.vision.layers import depthwise


class NchwBiLevelRoutingAttention(nn.Module):
    """Bi-level routing attention over a [B, C, H, W] map; pads after the projection.

    Source: the released `ops/bra_nchw.py` (`nchwBRA`), whose state_dict keys these are. Equal to
    `BiLevelRoutingAttention` where n_win divides the map, and only there: regions are of H // n_win
    by W // n_win tokens (of which there may be more than n_win per axis), means are over tokens
    that exist, the convolution sees the map without padding. Deviations: the default of
    side_dwconv is that of the released models (the class had 3); attn_backend and the unused
    auto_pad are gone.

    Args:
        dim: channels.
        num_heads: heads; they share one routing.
        n_win: regions per axis, one number or (rows, columns).
        qk_scale: multiplies q . k; None = dim ** -0.5.
        topk: regions that a region sees, 1 to their number.
        side_dwconv: kernel of the depthwise convolution of v that is added; 0 = none.
        pad_mode: "zero" (as released), "mask" or None; see `BiLevelRoutingAttention`.
        backend: see `BiLevelRoutingAttention`.

    Raises:
        ValueError: channels that do not split into heads; an unknown pad_mode.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int | Sequence[int] = 7,
        qk_scale: float | None = None,
        topk: int = 4,
        side_dwconv: int = 5,
        *,
        pad_mode: PadMode = "zero",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_heads("dim", dim, num_heads)
        if pad_mode not in (None, "zero", "mask"):
            raise ValueError(f"pad_mode: wants None, 'zero' or 'mask', got {pad_mode!r}")
        self.dim, self.num_heads = dim, num_heads
        self.n_win = window_counts(n_win)
        if len(self.n_win) != 2:
            raise ValueError(f"n_win: wants one number or (rows, columns), got {n_win}")
        self.topk = checked_topk(topk)
        self.scale = qk_scale or dim**-0.5
        self.pad_mode, self.backend = pad_mode, backend
        self.lepe = depthwise(dim, side_dwconv)
        self.qkv_linear = nn.Conv2d(dim, 3 * dim, 1)
        self.output_linear = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, ret_attn_mask: bool = False) -> Any:
        """Attends inside the routed regions.

        Args:
            x: [B, dim, H, W], any memory format.
            ret_attn_mask: also return the probabilities, gathered and written out.

        Returns: a map like x; with ret_attn_mask (out, probabilities [B, heads, R, n, topk * n]).

        Raises:
            ValueError: a shape or a size that does not fit; topk above the number of regions.
        """
        if x.dim() != 4 or x.shape[1] != self.dim:
            raise ValueError(f"x: wants [B, {self.dim}, H, W], got shape {list(x.shape)}")
        grid = self._cut(x.shape[2:])
        topk = min(self.topk, grid.num_regions) if self.pad_mode == "mask" else self.topk
        if topk > grid.num_regions:
            raise ValueError(
                f"topk: wants 1 to {grid.num_regions}, the number of regions {grid.counts}, got "
                f"{topk}"
            )
        qkv = self.qkv_linear(x)
        q, k, v = (
            part.unflatten(1, (self.num_heads, -1)).permute(0, 3, 4, 1, 2)
            for part in qkv.chunk(3, 1)
        )
        box = grid.box[1:]
        if self.backend == "torch":
            # The order of affinities is the same without a scale, and the released code has none.
            graph, _ = route_gathered(with_frames(q), with_frames(k), grid, topk, 1.0)
        else:
            graph, _ = route_regions(
                *(q, k),
                region_size=box,
                topk=topk,
                pad_mode=self.pad_mode,
                backend=self.backend,
            )
        attn = None
        if ret_attn_mask or self.backend == "torch":
            rows, keys, values = (with_frames(part) for part in (q, k, v))
            out, attn = attend_gathered(
                *(rows, keys, values, graph, (grid, grid)),
                weights=None,
                count_padding=self.pad_mode == "zero",
                scale=self.scale,
            )
            out = out.squeeze(1)
        else:
            out = attend_routed(
                *(q, k, v, graph),
                region_size=box,
                pad_mode=self.pad_mode,
                scale=self.scale,
                backend=self.backend,
            )
        out = out.permute(0, 3, 4, 1, 2).flatten(1, 2)
        if self.lepe is not None:
            out = out + self.lepe(qkv[:, 2 * self.dim :])
        out = self.output_linear(out)
        return (out, attn.transpose(1, 2)) if ret_attn_mask and attn is not None else out

    def _cut(self, size: Sequence[int]) -> RegionGrid:
        if self.pad_mode == "mask":
            box = [ceil_div(n, s) for n, s in zip(size, self.n_win, strict=True)]
            return cut_regions(size, region_size=box, pad_mode="mask", name="n_win")
        return cut_regions(size, self.n_win, pad_mode=self.pad_mode, name="n_win")

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, n_win={self.n_win}, topk={self.topk}, "
            f"pad_mode={self.pad_mode!r}, backend={self.backend!r}"
        )
