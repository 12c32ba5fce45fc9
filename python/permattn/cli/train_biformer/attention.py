"""The rivals: routing by gather, as released, and dense attention; both in plain torch.

Modules have the parameters of `permattn.models.vision.BiLevelRoutingAttention`, name by name, so
one set of weights starts all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Packed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)


class _SharedWeights(nn.Module):
    """What both have in common: projections and the positional term."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        # Of the whole width, as in the released networks.
        self.scale = dim**-0.5
        self.qkv = _Packed(dim)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.wo = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        q, k, v = self.qkv.qkv(x).chunk(3, dim=-1)
        lepe = self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.wo(self.attend(q, k, v) + lepe)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError


class GatherRoutingAttention(_SharedWeights):
    """Bi-level routing attention by `torch.gather`: every region's routed keys are copied for it.

    Source: BiFormer (arXiv 2303.08810), section 3.2 and algorithm 1; hard routing that carries no
    gradient, one graph for all heads.

    Args:
        dim: channels.
        num_heads: of attention.
        n_win: regions per side; divides H and W.
        topk: regions that a region sees.
    """

    def __init__(self, dim: int, num_heads: int, n_win: int, topk: int) -> None:
        super().__init__(dim, num_heads)
        self.n_win = n_win
        self.topk = topk

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, height, width, channels = q.shape
        q, k, v = (self._to_regions(x) for x in (q, k, v))
        mean_q, mean_k = q.detach().mean(2), k.detach().mean(2)
        index = torch.topk((mean_q * self.scale) @ mean_k.mT, self.topk, dim=-1).indices
        q = q.unflatten(-1, (self.num_heads, -1)).transpose(2, 3)
        k, v = (
            self._gather(x, index).unflatten(-1, (self.num_heads, -1)).transpose(2, 3)
            for x in (k, v)
        )
        shares = torch.softmax((q * self.scale) @ k.mT, dim=-1)
        out = (shares @ v).transpose(2, 3).flatten(3)
        s = self.n_win
        out = out.view(batch, s, s, height // s, width // s, channels)
        return out.transpose(2, 3).reshape(batch, height, width, channels)

    def _to_regions(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, regions, tokens, C]."""
        s = self.n_win
        x = x.unflatten(2, (s, -1)).unflatten(1, (s, -1))
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def _gather(self, x: Tensor, index: Tensor) -> Tensor:
        """[B, regions, tokens, C], [B, regions, topk] -> [B, regions, topk * tokens, C]."""
        batch, regions, tokens, channels = x.shape
        every = x[:, None].expand(batch, regions, regions, tokens, channels)
        index = index[..., None, None].expand(-1, -1, -1, tokens, channels)
        return every.gather(2, index).flatten(2, 3)


class DenseAttention(_SharedWeights):
    """Every token sees every token, by torch's scaled_dot_product_attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = q.shape
        q, k, v = (
            x.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v)
        )
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return out.transpose(1, 2).reshape(shape)
