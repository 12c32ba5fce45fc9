"""A feature pyramid on BiFormer, from timm and from transformers, over images of any size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from permattn.models.vision import register_timm, register_transformers
from torch import Tensor, nn

from .torchvision_stand_in import import_timm

timm = import_timm()
register_timm()
register_transformers()

from permattn.models.vision.transformers_models import (  # noqa: E402
    BiFormerBackbone,
    BiFormerConfig,
)

DIMS = (16, 24, 32, 48)
SMALL: dict[str, Any] = {
    "depths": (1, 1, 1, 1),
    "dims": DIMS,
    "head_dim": 8,
    "n_win": 4,
    "topks": (1, 2, 4, -2),
}


class Pyramid(nn.Module):
    """A small feature pyramid network: every map in the same channels, the coarse added to the
    fine; beside every cell, where its objects are and whether there are any."""

    def __init__(self, channels: Sequence[int], width: int = 8) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.head = nn.Conv2d(width, 5, 3, padding=1)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        levels = [layer(m) for layer, m in zip(self.lateral, maps, strict=True)]
        for i in range(len(levels) - 2, -1, -1):
            coarse = F.interpolate(levels[i + 1], size=levels[i].shape[-2:], mode="nearest")
            levels[i] = levels[i] + coarse
        return [self.head(x) for x in levels]


def by_timm(**options: Any) -> tuple[nn.Module, list[int]]:
    wrapped = timm.create_model("permattn_biformer_tiny", features_only=True, **SMALL, **options)
    return wrapped, wrapped.feature_info.channels()


def by_transformers(**options: Any) -> tuple[nn.Module, list[int]]:
    backbone = BiFormerBackbone(BiFormerConfig(out_indices=[1, 2, 3, 4], **SMALL, **options))
    return backbone, backbone.channels


@pytest.mark.parametrize("pad_mode", ["legacy", "mask", "zero"])
@pytest.mark.parametrize("size", [(128, 128), (100, 168), (133, 75)], ids=str)
@pytest.mark.parametrize("make", [by_timm, by_transformers])
def test_pyramid(
    make: Callable[..., tuple[nn.Module, list[int]]], size: tuple[int, int], pad_mode: str
):
    torch.manual_seed(0)
    network, channels = make(pad_mode=pad_mode)
    pyramid = Pyramid(channels)
    output = network(torch.randn(2, 3, *size))
    maps = output if isinstance(output, list) else output.feature_maps
    found = pyramid(maps)
    for m, level, dim, stride in zip(maps, found, DIMS, (4, 8, 16, 32), strict=True):
        cells = tuple(-(-n // stride) for n in size)
        assert m.shape == (2, dim, *cells)
        assert level.shape == (2, 5, *cells)
    sum(level.square().mean() for level in found).backward()
    grads = [p.grad for p in network.parameters()]
    assert all(g is not None and bool(g.isfinite().all()) for g in grads)
    stem = next(network.parameters()).grad
    assert stem is not None and bool(stem.any())


def test_modes_agree_where_regions_fit():
    maps = []
    for pad_mode in (None, "legacy", "mask", "zero"):
        torch.manual_seed(0)
        network, _ = by_timm(pad_mode=pad_mode)
        with torch.no_grad():
            torch.manual_seed(1)
            maps.append(network.eval()(torch.randn(1, 3, 256, 256)))
    for other in maps[1:]:
        for got, want in zip(other, maps[0], strict=True):
            assert torch.allclose(got, want, atol=1e-5)
