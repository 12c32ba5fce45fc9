"""BiFormer, a vision transformer with bi-level routing attention: tiny, small and base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from permattn.models.vision.attention import BiLevelRoutingAttention, ModulePadMode
from permattn.models.vision.dense import Attention, AttentionLePE
from permattn.models.vision.features import FourStageNet, GlobalPool, check_four
from permattn.models.vision.layers import (
    DropPath,
    ToChannelsFirst,
    ToChannelsLast,
    depthwise,
    drop_path_rates,
    init_weights,
)


class Block(nn.Module):
    """Depthwise convolution, attention and MLP, each added to its input; maps [B, C, H, W].

    Source: BiFormer (arXiv 2303.08810), figure 4; the released `models/biformer.py`.

    Args:
        attn: attention over [B, H, W, dim].
        mlp: [..., dim] -> [..., dim].
        dwconv: kernel of the convolution before the attention; 0 = none.
        drop_path: probability of dropping a branch in training.
    """

    def __init__(
        self, dim: int, attn: nn.Module, mlp: nn.Module, *, dwconv: int = 3, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.pos_embed = depthwise(dim, dwconv)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class BiFormer(FourStageNet):
    """A network of four stages with bi-level routing attention.

    Source: BiFormer (arXiv 2303.08810); state_dict keys are those of the released models.

    Args:
        depths: blocks of each stage.
        dims: channels of each stage.
        head_dim: channels of a head of the routed stages; dense stages have 8 heads.
        mlp_ratios: hidden channels of the MLP of each stage, in units of dims.
        topks: for each stage the regions that a region sees; 0 = a convolution in place of
            attention, -1 = dense attention, -2 = dense attention with a convolution beside.
        n_win: regions per axis, one number or (rows, columns).
        side_dwconv: kernel of the convolution beside attention; 0 = none.
        before_attn_dwconv: kernel of the convolution before attention; 0 = none.
        drop_path_rate: of the last block; rates grow from 0.
        auto_pad, pad_mode, backend: see `BiLevelRoutingAttention`.
        attention: further keyword arguments of `BiLevelRoutingAttention`.
        in_chans, num_classes, global_pool, drop_rate, extra_norms: see `FourStageNet`.

    Raises:
        ValueError: options that do not fit; names them.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: GlobalPool = "avg",
        head_dim: int = 32,
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        topks: Sequence[int] = (1, 4, 16, -2),
        n_win: int | Sequence[int] = 7,
        side_dwconv: int = 5,
        before_attn_dwconv: int = 3,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        auto_pad: bool = False,
        pad_mode: ModulePadMode = None,
        backend: str = "auto",
        attention: Mapping[str, Any] | None = None,
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
        check_four(depths=depths, mlp_ratios=mlp_ratios, topks=topks)
        check_depths(depths)
        self.depths = tuple(depths)
        rates = drop_path_rates(drop_path_rate, self.depths)
        options = dict(attention or {}, n_win=n_win, auto_pad=auto_pad, pad_mode=pad_mode)
        options.update(side_dwconv=side_dwconv, backend=backend)
        for i, dim in enumerate(self.dims):
            before = in_chans if i == 0 else self.dims[i - 1]
            self.downsample_layers.append(_stem(before, dim) if i == 0 else _merge(before, dim))
            self.stages.append(
                nn.Sequential(
                    *(
                        Block(
                            dim,
                            make_attention(dim, topks[i], head_dim, options),
                            _mlp(dim, mlp_ratios[i]),
                            dwconv=before_attn_dwconv,
                            drop_path=rate,
                        )
                        for rate in rates[i]
                    )
                )
            )
        self.apply(init_weights)

    def blocks(self, stage: int) -> Iterator[nn.Module]:
        """The blocks of a stage, in order."""
        yield from self.stages[stage].children()


def make_attention(dim: int, topk: int, head_dim: int, options: Mapping[str, Any]) -> nn.Module:
    """What a stage's `topk` says: routed, dense, or a convolution; maps [B, H, W, dim].

    Args:
        options: keyword arguments of `BiLevelRoutingAttention`.
    """
    if topk > 0:
        if head_dim < 1 or dim % head_dim:
            raise ValueError(f"head_dim: {dim} channels do not split into heads of {head_dim}")
        return BiLevelRoutingAttention(dim, dim // head_dim, topk=topk, **options)
    if topk == -1:
        return Attention(dim)
    if topk == -2:
        return AttentionLePE(dim, side_dwconv=options["side_dwconv"])
    if topk == 0:
        return nn.Sequential(
            ToChannelsFirst(),
            nn.Conv2d(dim, dim, 1),
            nn.Conv2d(dim, dim, 5, padding=2, groups=dim),
            nn.Conv2d(dim, dim, 1),
            ToChannelsLast(),
        )
    raise ValueError(f"topks: wants numbers of regions, 0, -1 or -2, got {topk}")


def check_depths(depths: Sequence[int]) -> None:
    """Raises ValueError where a stage has no blocks."""
    if min(depths) < 1:
        raise ValueError(f"depths: wants at least one block per stage, got {tuple(depths)}")


def _stem(in_chans: int, dim: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1),
        nn.BatchNorm2d(dim // 2),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
        nn.BatchNorm2d(dim),
    )


def _merge(before: int, dim: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, dim, 3, stride=2, padding=1), nn.BatchNorm2d(dim))


def _mlp(dim: int, ratio: float) -> nn.Module:
    hidden = int(ratio * dim)
    # The second place held an optional convolution: it numbers the last layer in state dicts.
    return nn.Sequential(nn.Linear(dim, hidden), nn.Identity(), nn.GELU(), nn.Linear(hidden, dim))


def biformer_tiny(**options: Any) -> BiFormer:
    """BiFormer-T, 13 M parameters; `options` are keyword arguments of `BiFormer`."""
    return BiFormer(**{"depths": (2, 2, 8, 2), "dims": (64, 128, 256, 512), **options})


def biformer_small(**options: Any) -> BiFormer:
    """BiFormer-S, 26 M parameters; `options` are keyword arguments of `BiFormer`."""
    return BiFormer(**{"depths": (4, 4, 18, 4), "dims": (64, 128, 256, 512), **options})


def biformer_base(**options: Any) -> BiFormer:
    """BiFormer-B, 57 M parameters; `options` are keyword arguments of `BiFormer`."""
    return BiFormer(**{"depths": (4, 4, 18, 4), "dims": (96, 192, 384, 768), **options})
