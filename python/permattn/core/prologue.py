"""What happens to rows of q and k between projection and attention: norm, then rotary embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["none", "rms", "layer"]
_NORMS: tuple[Norm, ...] = ("none", "rms", "layer")
INTS_PER_TRANSFORM = 8


@dataclass(frozen=True, eq=False)
class RowTransform:
    """A norm over the head dim and a rotary embedding, which a backend fuses with permute and
    quantise: one pass over memory.

    Args:
        norm: "rms" (x / rms(x)), "layer" ((x - mean) / std), or "none".
        weight, bias: floating [D], or [H * D] where `across_heads`; None = 1 and 0.
        eps: added to the mean square (the variance).
        across_heads: the norm looks at all heads of a token together.
        cos, sin: float32 [R, W], 2 * W <= D: the rotation of tokens [rope_start, rope_start + R);
            other tokens, and columns past 2 * W, are not rotated. None = no rotation.
        rope_start: first rotated token.
        interleaved: pairs are columns (2i, 2i + 1); else (i, i + W).

    Raises:
        ValueError: sizes that do not fit; names the field.
    """

    norm: Norm = "none"
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-6
    across_heads: bool = False
    cos: Tensor | None = None
    sin: Tensor | None = None
    rope_start: int = 0
    interleaved: bool = True

    def __post_init__(self) -> None:
        if self.norm not in _NORMS:
            raise ValueError(f"RowTransform.norm: wants one of {_NORMS}, got {self.norm!r}")
        if self.norm == "none" and (self.weight is not None or self.bias is not None):
            raise ValueError("RowTransform.weight: wants a norm beside it, got norm = 'none'")
        if (self.cos is None) != (self.sin is None):
            raise ValueError("RowTransform.cos, sin: want both or none")
        for name in ("cos", "sin"):
            x = getattr(self, name)
            if x is not None and (x.dim() != 2 or x.dtype != torch.float32):
                raise ValueError(
                    f"RowTransform.{name}: wants float32 [R, W], got {x.dtype} {list(x.shape)}"
                )
        if self.cos is not None and self.sin is not None and self.cos.shape != self.sin.shape:
            raise ValueError(
                "RowTransform.cos, sin: want one shape, got "
                f"{list(self.cos.shape)} and {list(self.sin.shape)}"
            )
        if self.rope_start < 0:
            raise ValueError(f"RowTransform.rope_start: wants >= 0, got {self.rope_start}")

    def check(self, name: str, x: Tensor) -> None:
        """Raises ValueError unless it fits x [B, H, S, D]; `name` is x's in messages."""
        heads, tokens, dim = x.shape[1:]
        width = heads * dim if self.across_heads else dim
        for field in ("weight", "bias"):
            w = getattr(self, field)
            if w is not None and tuple(w.shape) != (width,):
                raise ValueError(
                    f"prologue.{name}.{field}: wants shape [{width}], got {list(w.shape)}"
                )
        if self.cos is not None:
            rows, columns = self.cos.shape
            if 2 * columns > dim or self.rope_start + rows > tokens:
                raise ValueError(
                    f"prologue.{name}.cos: {rows} rows from token {self.rope_start} and {columns} "
                    f"pairs do not fit {tokens} tokens of {dim} columns"
                )
        for field in ("weight", "bias", "cos", "sin"):
            w = getattr(self, field)
            if w is not None and w.device != x.device:
                raise ValueError(
                    f"prologue.{name}.{field}: lies on {w.device}, {name} on {x.device}"
                )

    def __call__(self, x: Tensor) -> Tensor:
        """The transformed x [B, H, S, D], in float32 (float64 for float64): the meaning."""
        y = x if x.dtype == torch.float64 else x.float()
        if self.norm != "none":
            y = self._normalised(y)
        if self.cos is not None and self.sin is not None:
            y = _rotated(y, self.cos, self.sin, self.rope_start, self.interleaved)
        return y

    def _normalised(self, x: Tensor) -> Tensor:
        heads, dim = x.shape[1], x.shape[3]
        axes = (1, 3) if self.across_heads else (3,)
        if self.norm == "layer":
            x = x - x.mean(axes, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(axes, keepdim=True) + self.eps)
        shape = (heads, 1, dim) if self.across_heads else (1, 1, dim)
        if self.weight is not None:
            x = x * self.weight.to(x.dtype).view(shape)
        if self.bias is not None:
            x = x + self.bias.to(x.dtype).view(shape)
        return x


@dataclass(frozen=True, eq=False)
class Prologue:
    """The transforms of q and of k; None = as they are."""

    q: RowTransform | None = None
    k: RowTransform | None = None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, start: int, interleaved: bool) -> Tensor:
    rows, width = cos.shape
    part = x[:, :, start : start + rows]
    if interleaved:
        even, odd = part[..., 0 : 2 * width : 2], part[..., 1 : 2 * width : 2]
    else:
        even, odd = part[..., :width], part[..., width : 2 * width]
    first, second = even * cos - odd * sin, even * sin + odd * cos
    if interleaved:
        turned = torch.stack((first, second), -1).flatten(-2)
    else:
        turned = torch.cat((first, second), -1)
    part = torch.cat((turned, part[..., 2 * width :]), -1)
    return torch.cat((x[:, :, :start], part, x[:, :, start + rows :]), 2)


def pack_prologue(prologue: Prologue | None) -> tuple[list[Tensor], list[int], list[float]]:
    """A prologue in flat form, for operators; nothing for None."""
    if prologue is None:
        return [], [], []
    tensors: list[Tensor] = []
    ints: list[int] = []
    floats: list[float] = []
    for t in (prologue.q, prologue.k):
        t = RowTransform() if t is None else t
        optional = (t.weight, t.bias, t.cos, t.sin)
        tensors += [x for x in optional if x is not None]
        ints += [_NORMS.index(t.norm), *(int(x is not None) for x in optional)]
        ints += [int(t.across_heads), t.rope_start, int(t.interleaved)]
        floats.append(t.eps)
    return tensors, ints, floats


def unpack_prologue(
    tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]
) -> Prologue | None:
    """The inverse of pack_prologue."""
    if not ints:
        return None
    left = list(tensors)
    made = []
    for i, eps in enumerate(floats):
        n = ints[INTS_PER_TRANSFORM * i : INTS_PER_TRANSFORM * (i + 1)]
        weight, bias, cos, sin = (left.pop(0) if there else None for there in n[1:5])
        norm = _NORMS[n[0]]
        made.append(RowTransform(norm, weight, bias, eps, bool(n[5]), cos, sin, n[6], bool(n[7])))
    return Prologue(*made)
