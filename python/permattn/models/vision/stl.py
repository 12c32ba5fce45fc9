"""BiFormer in Swin-Tiny's layout, the network of the paper's ablations; both memory orders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from permattn.models.vision.attention import ModulePadMode
from permattn.models.vision.biformer import check_depths, make_attention
from permattn.models.vision.dense import NchwAttentionLePE
from permattn.models.vision.features import FourStageNet, GlobalPool, check_four
from permattn.models.vision.layers import DropPath, LayerNorm2d, drop_path_rates, init_weights
from permattn.models.vision.nchw import NchwBiLevelRoutingAttention


class STLBlock(nn.Module):
    """Attention and MLP, each added to its input; maps [B, C, H, W], channels last inside."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        hidden = int(mlp_ratio * dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class NchwSTLBlock(nn.Module):
    """Attention and MLP, each added to its input; maps [B, C, H, W], convolutions for layers."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        hidden = int(mlp_ratio * dim)
        self.norm1 = LayerNorm2d(dim)
        self.attn = attn
        self.norm2 = LayerNorm2d(dim)
        self.mlp = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.GELU(), nn.Conv2d(hidden, dim, 1))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class STLStage(nn.Module):
    """The blocks of a stage, under the released name."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class BiFormerSTL(FourStageNet):
    """BiFormer-STL: 4 x 4 patches, 2 x 2 merging, no convolution before attention.

    Source: BiFormer (arXiv 2303.08810), section 4.4; the released `models/biformer_stl.py` and
    `models/biformer_stl_nchw.py`, whose state_dict keys these are.

    Args:
        depths, dims, head_dim, mlp_ratios, topks, side_dwconv, drop_path_rate: see `BiFormer`.
            topks of the "nchw" layout: numbers of regions, or -1 = dense with a convolution of v.
            None: (1, 4, 16, -2), and -1 in the last place for "nchw".
        n_win: regions per axis of every stage, or four values.
        layout: "nhwc", or "nchw" for the refactored attention and convolutions in place of linear
            layers.
        auto_pad, pad_mode, backend: see `BiLevelRoutingAttention`. The "nchw" layout pads with
            keys of zeros where pad_mode is None, as released, and has no "legacy".
        in_chans, num_classes, global_pool, drop_rate, extra_norms: see `FourStageNet`.

    Raises:
        ValueError: options that do not fit; names them.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: GlobalPool = "avg",
        head_dim: int = 32,
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        topks: Sequence[int] | None = None,
        n_win: int | Sequence[int] = 7,
        side_dwconv: int = 5,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        layout: str = "nhwc",
        auto_pad: bool = False,
        pad_mode: ModulePadMode = None,
        backend: str = "auto",
        extra_norms: bool = False,
    ) -> None:
        super().__init__(
            dims,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            extra_norms=extra_norms,
        )
        if layout not in ("nhwc", "nchw"):
            raise ValueError(f"layout: wants 'nhwc' or 'nchw', got {layout!r}")
        topks = (1, 4, 16, -2 if layout == "nhwc" else -1) if topks is None else topks
        windows = (n_win,) * 4 if isinstance(n_win, int) else n_win
        check_four(depths=depths, mlp_ratios=mlp_ratios, topks=topks, n_win=windows)
        check_depths(depths)
        self.depths, self.layout = tuple(depths), layout
        if layout == "nchw":
            if pad_mode == "legacy" or auto_pad:
                raise ValueError("pad_mode: layout 'nchw' has 'zero', 'mask' or None, not 'legacy'")
            pad_mode = pad_mode or "zero"
        rates = drop_path_rates(drop_path_rate, self.depths)
        options: dict[str, Any] = {"side_dwconv": side_dwconv, "backend": backend}
        options["pad_mode"] = pad_mode
        if layout == "nhwc":
            options["auto_pad"] = auto_pad
        make: Callable[..., nn.Module] = make_attention if layout == "nhwc" else _nchw_attention
        block: Callable[..., nn.Module] = STLBlock if layout == "nhwc" else NchwSTLBlock
        for i, dim in enumerate(self.dims):
            before = in_chans if i == 0 else self.dims[i - 1]
            self.downsample_layers.append(_patches(before, dim) if i == 0 else _merge(before, dim))
            stage = {**options, "n_win": windows[i]}
            self.stages.append(
                STLStage(
                    [
                        block(dim, make(dim, topks[i], head_dim, stage), mlp_ratios[i], rate)
                        for rate in rates[i]
                    ]
                )
            )
        self.apply(init_weights)

    def blocks(self, stage: int) -> Iterator[nn.Module]:
        """The blocks of a stage, in order."""
        yield from self.stages[stage].blocks.children()  # type: ignore[union-attr]


def _nchw_attention(dim: int, topk: int, head_dim: int, options: dict[str, Any]) -> nn.Module:
    if topk > 0:
        if head_dim < 1 or dim % head_dim:
            raise ValueError(f"head_dim: {dim} channels do not split into heads of {head_dim}")
        return NchwBiLevelRoutingAttention(dim, dim // head_dim, topk=topk, **options)
    if topk == -1:
        return NchwAttentionLePE(dim)
    raise ValueError(f"topks: layout 'nchw' wants numbers of regions or -1, got {topk}")


def _patches(in_chans: int, dim: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(in_chans, dim, 4, stride=4), nn.BatchNorm2d(dim))


def _merge(before: int, dim: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(before), nn.Conv2d(before, dim, 2, stride=2))


def biformer_stl(**options: Any) -> BiFormerSTL:
    """BiFormer-STL, 28 M parameters; `options` are keyword arguments of `BiFormerSTL`."""
    return BiFormerSTL(**options)


def biformer_stl_nchw(**options: Any) -> BiFormerSTL:
    """BiFormer-STL in the channels-first layout."""
    return BiFormerSTL(**{"layout": "nchw", **options})
