"""The released modules and networks as functions of a state dict: written from their account.

Independent of the package: regions are cut out one by one, keys are gathered, scores written out.
All functions are differentiable in the tensors of the state dict and in x, and compute in their
dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Legacy:
    """Options of the legacy module, under its names."""

    dim: int
    num_heads: int
    n_win: int
    topk: int
    qk_dim: int | None = None
    qk_scale: float | None = None
    kv_per_win: int = 4
    kv_downsample_ratio: int = 4
    kv_downsample_mode: str = "identity"
    param_attention: str = "qkvo"
    param_routing: bool = False
    diff_routing: bool = False
    soft_routing: bool = False
    side_dwconv: int = 5
    auto_pad: bool = False


def sub(state: State, prefix: str) -> dict[str, Tensor]:
    """The entries below a prefix, without it."""
    return {k.removeprefix(prefix): x for k, x in state.items() if k.startswith(prefix)}


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def conv(state: State, name: str, x: Tensor, **options: Any) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)


def depthwise(state: State, name: str, x: Tensor) -> Tensor:
    weight = state[f"{name}.weight"]
    return conv(state, name, x, padding=weight.shape[-1] // 2, groups=weight.shape[0])


def cut(x: Tensor, counts: tuple[int, int], box: tuple[int, int]) -> list[Tensor]:
    """Regions [B, <= h, <= w, C] of a [B, H, W, C] map in raster order."""
    h, w = box
    return [
        x[:, i * h : (i + 1) * h, j * w : (j + 1) * w]
        for i in range(counts[0])
        for j in range(counts[1])
    ]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, n, Cq], k [B, m, Cq], v [B, m, C] -> out [B, n, C], probabilities [B, heads, n, m]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    p = torch.softmax((q * scale) @ k.mT, -1)
    return (p @ v).transpose(1, 2).flatten(2), p


def legacy_bra(state: State, x: Tensor, o: Legacy) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ops/bra_legacy.py`: x [B, H, W, C] -> (out, r_weight, r_idx, probabilities)."""
    batch, height, width, _ = x.shape
    s, qk_dim = o.n_win, o.qk_dim or o.dim
    scale = o.qk_scale or qk_dim**-0.5
    if o.auto_pad:
        x = F.pad(x, (0, 0, 0, -width % s, 0, -height % s))
    h, w = x.shape[1] // s, x.shape[2] // s
    assert (h * s, w * s) == x.shape[1:3]
    q, k, v = linear(state, "qkv.qkv", x).split([qk_dim, qk_dim, o.dim], -1)
    lepe = torch.zeros_like(v)
    if o.side_dwconv:
        lepe = depthwise(state, "lepe", v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    q_regions, k_regions, v_regions = (cut(t, (s, s), (h, w)) for t in (q, k, v))
    q_mean = torch.stack([t.mean((1, 2)) for t in q_regions], 1)
    k_mean = torch.stack([t.mean((1, 2)) for t in k_regions], 1)
    if not o.diff_routing:
        q_mean, k_mean = q_mean.detach(), k_mean.detach()
    if o.param_routing:
        q_mean, k_mean = linear(state, "router.emb", q_mean), linear(state, "router.emb", k_mean)
    value, idx = torch.topk((q_mean * scale) @ k_mean.mT, o.topk, -1)
    r_weight = torch.softmax(value, -1)
    keys = torch.stack([_pool(t, o).flatten(1, 2) for t in k_regions], 1)
    values = torch.stack([_pool(t, o).flatten(1, 2) for t in v_regions], 1)
    b = torch.arange(batch)[:, None]
    out, attn = torch.zeros_like(v), []
    rows: list[list[Tensor]] = [[] for _ in range(s)]
    for r in range(s * s):
        k_sel, v_sel = keys[b, idx[:, r]], values[b, idx[:, r]]
        if o.soft_routing:
            weight = r_weight[:, r, :, None, None]
            k_sel, v_sel = k_sel * weight, v_sel * weight
        q_rows = q_regions[r].flatten(1, 2)
        y, p = attend(q_rows, k_sel.flatten(1, 2), v_sel.flatten(1, 2), o.num_heads, scale)
        rows[r // s].append(y.unflatten(1, (h, w)))
        attn.append(p)
    out = torch.cat([torch.cat(row, 2) for row in rows], 1) + lepe
    if o.param_attention == "qkvo":
        out = linear(state, "wo", out)
    return out[:, :height, :width], r_weight, idx, torch.stack(attn, 1).flatten(0, 1)


def _pool(x: Tensor, o: Legacy) -> Tensor:
    """Pools a region [B, h, w, C]."""
    x, mode, ratio = x.permute(0, 3, 1, 2), o.kv_downsample_mode, o.kv_downsample_ratio
    if mode == "ada_avgpool":
        x = F.adaptive_avg_pool2d(x, o.kv_per_win)
    elif mode == "ada_maxpool":
        x = F.adaptive_max_pool2d(x, o.kv_per_win)
    elif mode == "avgpool":
        x = F.avg_pool2d(x, ratio)
    elif mode == "maxpool":
        x = F.max_pool2d(x, ratio)
    return x.permute(0, 2, 3, 1)


def nchw_bra(
    state: State, x: Tensor, heads: int, n_win: int, topk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops/bra_nchw.py`: x [B, C, H, W] -> (out, idx [B, R, topk], probabilities [B, M, R, n, m]).

    Regions are of H // S by W // S; padding is zeros behind the projection; means are over what is
    there.
    """
    batch, dim, height, width = x.shape
    h, w = height // n_win, width // n_win
    counts = (-(-height // h), -(-width // w))
    qkv = conv(state, "qkv_linear", x).permute(0, 2, 3, 1)
    q, k, v = qkv.chunk(3, -1)
    q_mean, k_mean = (
        torch.stack([t.mean((1, 2)) for t in cut(m, counts, (h, w))], 1).detach() for m in (q, k)
    )
    idx = torch.topk(q_mean @ k_mean.mT, topk, -1).indices
    pad = (0, 0, 0, counts[1] * w - width, 0, counts[0] * h - height)
    q_regions, k_regions, v_regions = (
        torch.stack([t.flatten(1, 2) for t in cut(F.pad(m, pad), counts, (h, w))], 1)
        for m in (q, k, v)
    )
    b = torch.arange(batch)[:, None]
    rows: list[list[Tensor]] = [[] for _ in range(counts[0])]
    attn = []
    for r in range(counts[0] * counts[1]):
        k_sel, v_sel = k_regions[b, idx[:, r]].flatten(1, 2), v_regions[b, idx[:, r]].flatten(1, 2)
        y, p = attend(q_regions[:, r], k_sel, v_sel, heads, dim**-0.5)
        rows[r // counts[1]].append(y.unflatten(1, (h, w)))
        attn.append(p)
    out = torch.cat([torch.cat(row, 2) for row in rows], 1)[:, :height, :width]
    out = out.permute(0, 3, 1, 2) + depthwise(state, "lepe", v.permute(0, 3, 1, 2))
    return conv(state, "output_linear", out), idx, torch.stack(attn, 2)


def dense_lepe(state: State, x: Tensor) -> Tensor:
    """`AttentionLePE` over [B, H, W, C]: eight heads, the convolution sees the input."""
    q, k, v = linear(state, "qkv", x.flatten(1, 2)).chunk(3, -1)
    out, _ = attend(q, k, v, 8, (x.shape[-1] // 8) ** -0.5)
    lepe = depthwise(state, "lepe", x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return linear(state, "proj", out.unflatten(1, x.shape[1:3]) + lepe)


def dense(state: State, x: Tensor) -> Tensor:
    """`Attention` over [B, H, W, C]: eight heads."""
    q, k, v = linear(state, "qkv", x.flatten(1, 2)).chunk(3, -1)
    out, _ = attend(q, k, v, 8, (x.shape[-1] // 8) ** -0.5)
    return linear(state, "proj", out.unflatten(1, x.shape[1:3]))


def dense_nchw_lepe(state: State, x: Tensor) -> Tensor:
    """`nchwAttentionLePE` over [B, C, H, W]: eight heads, the convolution sees v."""
    qkv = conv(state, "qkv", x)
    q, k, v = (t.flatten(2).mT for t in qkv.chunk(3, 1))
    out, _ = attend(q, k, v, 8, (x.shape[1] // 8) ** -0.5)
    out = out.mT.unflatten(2, x.shape[2:])
    return conv(state, "proj", out + depthwise(state, "lepe", qkv.chunk(3, 1)[2]))


@dataclass(frozen=True)
class Net:
    """A network: `stl` chooses Swin's layout, `nchw` its channels-first form."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    head_dim: int
    topks: tuple[int, ...]
    n_win: int
    auto_pad: bool = False
    stl: bool = False
    nchw: bool = False


def network(
    state: State, x: Tensor, net: Net, training: bool = False
) -> tuple[list[Tensor], Tensor]:
    """The maps of four stages and the logits; batch norms use running statistics in eval."""
    maps = []
    for i in range(4):
        down = sub(state, f"downsample_layers.{i}.")
        if not net.stl:
            x = _norm(down, "1", conv(down, "0", x, stride=2, padding=1), training)
            if i == 0:
                x = conv(down, "3", F.gelu(x), stride=2, padding=1)
                x = _norm(down, "4", x, training)
        elif i == 0:
            x = _norm(down, "1", conv(down, "0", x, stride=4), training)
        else:
            x = conv(down, "1", _norm(down, "0", x, training), stride=2)
        for j in range(net.depths[i]):
            name = f"stages.{i}.blocks.{j}." if net.stl else f"stages.{i}.{j}."
            x = _block(sub(state, name), x, net, i)
        maps.append(x)
    x = _norm(state, "norm", x, training).mean((2, 3))
    return maps, linear(state, "head", x)


def _block(state: State, x: Tensor, net: Net, stage: int) -> Tensor:
    if not net.stl:
        x = x + depthwise(state, "pos_embed", x)
    x = x.permute(0, 2, 3, 1)
    x = x + _attention(sub(state, "attn."), _layer_norm(state, "norm1", x), net, stage)
    y = _layer_norm(state, "norm2", x)
    last = "2" if net.stl else "3"
    flat = {k: t.flatten(1) if t.dim() == 4 else t for k, t in sub(state, "mlp.").items()}
    return (x + linear(flat, last, F.gelu(linear(flat, "0", y)))).permute(0, 3, 1, 2)


def _attention(state: State, x: Tensor, net: Net, stage: int) -> Tensor:
    dim, topk = net.dims[stage], net.topks[stage]
    if net.nchw:
        x = x.permute(0, 3, 1, 2)
        if topk > 0:
            x, *_ = nchw_bra(state, x, dim // net.head_dim, net.n_win, topk)
        else:
            x = dense_nchw_lepe(state, x)
        return x.permute(0, 2, 3, 1)
    if topk > 0:
        options = Legacy(dim, dim // net.head_dim, net.n_win, topk, auto_pad=net.auto_pad)
        return legacy_bra(state, x, options)[0]
    if topk == -2:
        return dense_lepe(state, x)
    if topk == -1:
        return dense(state, x)
    x = conv(state, "1", x.permute(0, 3, 1, 2))
    return conv(state, "3", depthwise(state, "2", x)).permute(0, 2, 3, 1)


def _layer_norm(state: State, name: str, x: Tensor) -> Tensor:
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return F.layer_norm(x, weight.shape, weight, bias, 1e-6)


def _norm(state: State, name: str, x: Tensor, training: bool) -> Tensor:
    s = sub(state, f"{name}.")
    mean, var = s["running_mean"].clone(), s["running_var"].clone()
    return F.batch_norm(x, mean, var, s["weight"], s["bias"], training)
