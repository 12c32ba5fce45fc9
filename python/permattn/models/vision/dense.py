"""Attention of every token to every token, as the last stages of the released models have it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from permattn.models.vision.layers import depthwise


class Attention(nn.Module):
    """Multi-head attention over all tokens of a channels-last map.

    Source: the released code of BiFormer, `models/_common.py` (`topk=-1`).

    Args:
        dim: channels.
        num_heads: of dim / num_heads channels each.
        qkv_bias: whether the projection of q, k and v has a bias.
        qk_scale: multiplies q . k; None = head_dim ** -0.5.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = False, qk_scale: float | None = None
    ) -> None:
        super().__init__()
        check_heads("dim", dim, num_heads)
        self.dim, self.num_heads = dim, num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, dim] -> [B, H, W, dim]."""
        return self.proj(self._attend(x))

    def _attend(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return out.transpose(1, 2).flatten(2).view(x.shape)


class AttentionLePE(Attention):
    """`Attention` beside a depthwise convolution of the module's own input.

    Source: the released code of BiFormer, `models/_common.py` (`topk=-2`): the positional term is
    made from x, not from v, and there are eight heads whatever the width.

    Args:
        side_dwconv: kernel size of the convolution; 0 = none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        side_dwconv: int = 5,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, qk_scale)
        self.lepe = depthwise(dim, side_dwconv)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, dim] -> [B, H, W, dim]."""
        out = self._attend(x)
        if self.lepe is not None:
            out = out + self.lepe(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj(out)


class NchwAttentionLePE(nn.Module):
    """Multi-head attention over all tokens of a channels-first map, beside a convolution of v.

    Source: the released code of BiFormer, `models/_common.py` (`nchwAttentionLePE`). Not
    interchangeable with `AttentionLePE`, whose positional term is made from x.

    Args: as of `AttentionLePE`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        side_dwconv: int = 5,
    ) -> None:
        super().__init__()
        check_heads("dim", dim, num_heads)
        self.dim, self.num_heads = dim, num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=qkv_bias)
        self.proj = nn.Conv2d(dim, dim, 1)
        self.lepe = depthwise(dim, side_dwconv)

    def forward(self, x: Tensor) -> Tensor:
        """[B, dim, H, W] -> [B, dim, H, W]."""
        qkv = self.qkv(x)
        q, k, v = qkv.flatten(2).unflatten(1, (3, self.num_heads, -1)).permute(1, 0, 2, 4, 3)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        out = out.transpose(1, 2).flatten(2).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        if self.lepe is not None:
            out = out + self.lepe(qkv[:, 2 * self.dim :])
        return self.proj(out)


def check_heads(name: str, dim: int, num_heads: int) -> None:
    """Raises ValueError where `dim` channels do not split into `num_heads` heads."""
    if dim < 1 or num_heads < 1 or dim % num_heads:
        raise ValueError(f"{name}: {dim} channels do not split into num_heads = {num_heads} heads")
