"""Small layers of the vision models that torch does not have, and how weights start."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Drops the whole residual branch of a sample, in training, with probability `rate`.

    Source: Deep Networks with Stochastic Depth (arXiv 1603.09382); what is kept is scaled up.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"drop_path_rate: wants 0 <= rate < 1, got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep)
        return x * (mask / keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a [B, C, H, W] map."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ToChannelsFirst(nn.Module):
    """[B, H, W, C] -> the view [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


class ToChannelsLast(nn.Module):
    """[B, C, H, W] -> the view [B, H, W, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


def init_weights(module: nn.Module) -> None:
    """Linear layers as the released models start them; everything else as torch does."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def depthwise(channels: int, kernel: int, ndim: int = 2) -> nn.Module | None:
    """A depthwise convolution that keeps the map's size; None for kernel 0.

    Raises:
        ValueError: an even kernel, which would not keep the size.
    """
    if kernel == 0:
        return None
    if kernel < 0 or kernel % 2 == 0:
        raise ValueError(f"side_dwconv: wants 0 or an odd kernel size, got {kernel}")
    conv = nn.Conv2d if ndim == 2 else nn.Conv3d
    return conv(channels, channels, kernel, padding=kernel // 2, groups=channels)


def drop_path_rates(rate: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Rates of every block of every stage, from 0 to `rate` in equal steps."""
    rates = torch.linspace(0.0, rate, sum(depths), device="cpu").tolist()
    return [rates[sum(depths[:i]) : sum(depths[: i + 1])] for i in range(len(depths))]
