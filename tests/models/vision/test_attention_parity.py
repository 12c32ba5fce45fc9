"""Modules against the independent account of the released ones: results and every gradient."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from permattn.models.vision import (
    Attention,
    AttentionLePE,
    BiLevelRoutingAttention,
    NchwAttentionLePE,
    NchwBiLevelRoutingAttention,
    legacy_from_nchw,
    nchw_from_legacy,
)
from permattn.testing import assert_within
from torch import Tensor, nn

from . import reference
from .reference import Legacy

# name: (options, map). All nine modes of the account, and what crosses them.
MODES: dict[str, tuple[Legacy, tuple[int, int]]] = {
    "hard": (Legacy(16, 2, 4, 3), (8, 12)),
    "hard-one-region": (Legacy(16, 2, 1, 1), (3, 5)),
    "hard-one-token": (Legacy(16, 4, 4, 16, side_dwconv=3), (4, 4)),
    "padded": (Legacy(16, 2, 3, 4, auto_pad=True), (7, 11)),
    "padded-small": (Legacy(16, 2, 4, 5, auto_pad=True), (2, 6)),
    "qk-dim": (Legacy(24, 2, 2, 2, qk_dim=16), (6, 4)),
    "qk-scale": (Legacy(16, 2, 2, 2, qk_scale=0.35, param_attention="qkv"), (6, 4)),
    "no-conv": (Legacy(16, 2, 2, 3, side_dwconv=0), (4, 4)),
    "ada-avgpool": (
        Legacy(16, 2, 2, 2, kv_downsample_mode="ada_avgpool", kv_per_win=2, auto_pad=True),
        (9, 6),
    ),
    "ada-maxpool": (Legacy(16, 2, 2, 3, kv_downsample_mode="ada_maxpool", kv_per_win=2), (6, 10)),
    "avgpool": (Legacy(16, 2, 2, 2, kv_downsample_mode="avgpool", kv_downsample_ratio=2), (10, 6)),
    "maxpool": (
        Legacy(24, 2, 2, 2, qk_dim=8, kv_downsample_mode="maxpool", kv_downsample_ratio=3),
        (6, 8),
    ),
    "soft": (Legacy(16, 2, 3, 4, soft_routing=True), (6, 9)),
    "soft-diff": (Legacy(16, 2, 3, 4, soft_routing=True, diff_routing=True), (6, 6)),
    "soft-diff-param": (
        Legacy(16, 2, 3, 4, soft_routing=True, diff_routing=True, param_routing=True),
        (6, 6),
    ),
    "soft-padded-pooled": (
        Legacy(
            *(16, 2, 3, 4),
            soft_routing=True,
            diff_routing=True,
            auto_pad=True,
            kv_downsample_mode="ada_avgpool",
            kv_per_win=2,
        ),
        (8, 10),
    ),
}
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def strong(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of order one over the square root of the inputs, no bias near 0: routing is clear."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            fan = max(1, p[0].numel()) if p.dim() > 1 else 1
            p.copy_(torch.randn(p.shape, generator=g) * (1.0 if p.dim() > 1 else 0.5) / fan**0.5)
    return module


def leaves(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict as leaves that want gradients, for the reference."""
    return {k: x.detach().to(dtype).requires_grad_() for k, x in module.state_dict().items()}


def gradients(out: Tensor, x: Tensor, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a fixed random loss, of x and of every tensor (zeros where none reaches)."""
    g = torch.Generator().manual_seed(5)
    dout = torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype)
    names = ["x", *named]
    found = torch.autograd.grad(out, [x, *named.values()], dout, allow_unused=True)
    tensors = [x, *named.values()]
    return {
        n: torch.zeros_like(t) if d is None else d
        for n, t, d in zip(names, tensors, found, strict=True)
    }


def check_parity(module: nn.Module, account: Any, x: Tensor, dtype: torch.dtype) -> None:
    """Results and gradients: float64 to 1e-10, float32 within twice the account's own error."""
    module = module.to(dtype)
    ours_x = x.to(dtype).requires_grad_()
    ours = module(ours_x)
    ours_grads = gradients(ours, ours_x, dict(module.named_parameters()))
    want = {}
    for d in {dtype, torch.float64}:
        state, there = leaves(module, d), x.to(d).requires_grad_()
        out = account(state, there)
        want[d] = out, gradients(out, there, state)
    assert ours.shape == x.shape
    assert ours_grads.keys() == want[dtype][1].keys()
    if dtype == torch.float64:
        torch.testing.assert_close(ours, want[dtype][0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(ours_grads, want[dtype][1], rtol=1e-10, atol=1e-10)
        return
    assert_within(ours, want[dtype][0], want[torch.float64][0], "out")
    for name, grad in ours_grads.items():
        exact = want[torch.float64][1][name]
        # Sums over all tokens: a rounding of the largest intermediate is of the sum's size.
        size = float(exact.abs().max()) * 4
        assert_within(grad, want[dtype][1][name], exact, f"gradient of {name}", cancelled=size)


def case(name: str) -> tuple[BiLevelRoutingAttention, Legacy, Tensor]:
    options, size = MODES[name]
    module = strong(BiLevelRoutingAttention(**asdict(options)))
    x = torch.randn(2, *size, options.dim, generator=torch.Generator().manual_seed(1))
    return module, options, x  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("name", MODES)
def test_legacy_module_and_its_gradients(name: str, dtype: torch.dtype):
    module, options, x = case(name)
    check_parity(module, lambda s, t: reference.legacy_bra(s, t, options)[0], x, dtype)


# In "padded-small" whole regions are padding, of equal affinity: torch.topk takes any of them.
@pytest.mark.parametrize("name", [n for n in MODES if n != "padded-small"])
def test_legacy_attention_mask_has_the_released_form(name: str):
    module, options, x = case(name)
    module, x = module.double(), x.double()
    want = reference.legacy_bra(module.state_dict(), x, options)
    got = module(x, ret_attn_mask=True)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize(
    ("size", "n_win", "topk"),
    [((8, 12), 4, 3), ((7, 11), 3, 4), ((5, 5), 4, 9), ((6, 4), 1, 1), ((3, 3), 2, 9)],
    ids=lambda x: str(x),
)
def test_nchw_module_on_and_off_the_grid(size, n_win: int, topk: int, dtype: torch.dtype):
    module = strong(NchwBiLevelRoutingAttention(16, 2, n_win, topk=topk))
    x = torch.randn(2, 16, *size, generator=torch.Generator().manual_seed(1))
    check_parity(module, lambda s, t: reference.nchw_bra(s, t, 2, n_win, topk)[0], x, dtype)


def test_nchw_attention_mask_has_the_released_form():
    module = strong(NchwBiLevelRoutingAttention(16, 2, 3, topk=4)).double()
    x = torch.randn(2, 16, 7, 11, dtype=torch.float64)
    want = reference.nchw_bra(module.state_dict(), x, 2, 3, 4)
    out, attn = module(x, ret_attn_mask=True)
    torch.testing.assert_close(out, want[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(attn, want[2], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("module", "account", "channels_first"),
    [
        (AttentionLePE, reference.dense_lepe, False),
        (Attention, reference.dense, False),
        (NchwAttentionLePE, reference.dense_nchw_lepe, True),
    ],
    ids=["lepe", "plain", "nchw-lepe"],
)
def test_dense_modules(module, account, channels_first: bool):
    x = torch.randn(2, 5, 7, 32, generator=torch.Generator().manual_seed(1))
    x = x.permute(0, 3, 1, 2) if channels_first else x
    for dtype in DTYPES.values():
        check_parity(strong(module(32)), account, x, dtype)


def test_twins_agree_where_regions_divide_the_map_and_only_there():
    legacy = strong(BiLevelRoutingAttention(16, 2, 3, topk=4, auto_pad=True)).double()
    nchw = NchwBiLevelRoutingAttention(16, 2, 3, topk=4).double()
    nchw.load_state_dict(nchw_from_legacy(legacy.state_dict()))
    back = legacy_from_nchw(nchw.state_dict())
    assert all(torch.equal(back[k], x) for k, x in legacy.state_dict().items())
    on, off = (torch.randn(2, *size, 16, dtype=torch.float64) for size in ((6, 9), (7, 9)))
    same = nchw(on.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(legacy(on), same, rtol=1e-12, atol=1e-12)
    other = nchw(off.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert (legacy(off) - other).abs().max() > 1e-3
