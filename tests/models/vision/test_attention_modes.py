"""What the released modules lack: pad modes, video, dtypes, and errors that name the argument."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from permattn.bilevel import route_regions
from permattn.models.vision import (
    AttentionLePE,
    BiLevelRoutingAttention,
    NchwBiLevelRoutingAttention,
    VideoBiLevelRoutingAttention,
    nchw_from_legacy,
)
from torch import Tensor

from .test_attention_parity import strong


def attention(dim: int = 16, heads: int = 2, **options: Any) -> BiLevelRoutingAttention:
    module = BiLevelRoutingAttention(dim, heads, **options)
    return strong(module).double()  # type: ignore[return-value]


def maps(*size: int, dim: int = 16, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, *size, dim, generator=g, dtype=torch.float64)


def test_zero_padding_is_the_twin_off_the_grid():
    ours = attention(n_win=3, topk=4, pad_mode="zero")
    twin = NchwBiLevelRoutingAttention(16, 2, 3, topk=4).double()
    twin.load_state_dict(nchw_from_legacy(ours.state_dict()))
    x = maps(7, 11)
    want = twin(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("topk", [4, 9], ids=["routed", "all-regions"])
def test_masked_padding_is_seen_by_nobody(topk: int):
    """7 x 11 in 3 x 3 regions of 3 x 4: with all regions listed, dense attention."""
    module = attention(n_win=3, topk=topk, pad_mode="mask", side_dwconv=0, param_attention="qkv")
    x = maps(7, 11)
    q, k, v = (t.unflatten(-1, (2, 8)) for t in module.qkv(x).chunk(3, -1))
    graph, _ = route_regions(q, k, region_size=(3, 4), topk=topk, pad_mode="mask")
    region = (torch.arange(7) // 3)[:, None] * 3 + torch.arange(11) // 4
    region = region.flatten()
    seen = (graph.long()[:, region, :, None] == region).any(2)
    rows, keys, values = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(
        rows, keys, values, seen[:, None], scale=16**-0.5
    )
    want = want.transpose(1, 2).flatten(2).unflatten(1, (7, 11))
    torch.testing.assert_close(module(x), want, rtol=1e-12, atol=1e-12)


def test_mask_clamps_topk_and_regions_to_the_map():
    module = attention(n_win=7, topk=16, pad_mode="mask")
    assert module(maps(3, 2)).shape == (2, 3, 2, 16)
    out, weights, graph, attn = module(maps(3, 2), ret_attn_mask=True)
    assert weights.shape == graph.shape == (2, 6, 6)
    assert attn.shape == (12, 2, 1, 6)
    torch.testing.assert_close(module(maps(3, 2)), out, rtol=1e-12, atol=1e-12)


def test_auto_pad_means_legacy_unless_a_pad_mode_is_given():
    assert BiLevelRoutingAttention(16, auto_pad=True).pad_mode == "legacy"
    assert BiLevelRoutingAttention(16, auto_pad=True, pad_mode="mask").pad_mode == "mask"
    assert BiLevelRoutingAttention(16).pad_mode is None


CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "hard": ({"n_win": 2, "topk": 2}, (6, 8)),
    "two-sizes": ({"n_win": (2, 3), "topk": 4}, (4, 9)),
    "legacy": ({"n_win": 3, "topk": 4, "auto_pad": True}, (7, 5)),
    "zero": ({"n_win": 3, "topk": 4, "pad_mode": "zero"}, (7, 5)),
    "mask": ({"n_win": 3, "topk": 4, "pad_mode": "mask"}, (7, 5)),
    "pooled": ({"n_win": 2, "topk": 2, "kv_downsample_mode": "ada_avgpool"}, (10, 12)),
    "soft": ({"n_win": 2, "topk": 2, "soft_routing": True, "diff_routing": True}, (6, 8)),
    "video": ({"n_win": (2, 2, 3), "topk": 5}, (4, 6, 6)),
    "video-legacy": ({"n_win": (2, 2, 3), "topk": 5, "pad_mode": "legacy"}, (3, 6, 7)),
    "video-mask": ({"n_win": (2, 2, 3), "topk": 5, "pad_mode": "mask"}, (3, 6, 7)),
    "video-pooled": (
        {"n_win": (2, 2, 2), "topk": 5, "kv_downsample_mode": "maxpool", "kv_downsample_ratio": 2},
        (4, 6, 8),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_plain_torch_backend_agrees_with_gradients(name: str):
    options, size = CASES[name]
    ours, plain = attention(**options), attention(**options, backend="torch")
    results = []
    for module in (ours, plain):
        x = maps(*size).requires_grad_()
        out = module(x)
        grads = torch.autograd.grad(out.sin().sum(), [x, *module.parameters()])
        results.append([out, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_video_of_one_region_in_time_is_dense_over_frames():
    module = VideoBiLevelRoutingAttention(
        *(16, 2, (1, 1, 1)), topk=1, side_dwconv=0, param_attention="qkv"
    )
    module = strong(module).double()
    x = maps(3, 4, 5)
    q, k, v = (
        t.flatten(1, 3).unflatten(-1, (2, 8)).transpose(1, 2) for t in module.qkv(x).chunk(3, -1)
    )
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.25)
    want = want.transpose(1, 2).flatten(2).unflatten(1, (3, 4, 5))
    torch.testing.assert_close(module(x), want, rtol=1e-12, atol=1e-12)


def test_video_of_one_frame_is_an_image():
    image = attention(n_win=(2, 3), topk=4, side_dwconv=0)
    video = VideoBiLevelRoutingAttention(16, 2, (1, 2, 3), topk=4, side_dwconv=0).double()
    video.load_state_dict(image.state_dict())
    x = maps(4, 6)
    torch.testing.assert_close(video(x[:, None])[:, 0], image(x), rtol=1e-12, atol=1e-12)


def test_video_convolution_has_three_axes():
    module = VideoBiLevelRoutingAttention(16, 2, (2, 2, 2), topk=3, side_dwconv=3)
    assert tuple(module.state_dict()["lepe.weight"].shape) == (16, 1, 3, 3, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["hard", "zero", "soft", "pooled"])
def test_autocast_keeps_the_dtype_and_stays_near(name: str, dtype: torch.dtype):
    options, size = CASES[name]
    module, x = attention(**options).float(), maps(*size).float().requires_grad_()
    with torch.autocast("cpu", dtype):
        out = module(x)
    assert out.dtype == dtype
    out.float().square().sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())
    exact = module(x)
    error = (out - exact).detach().abs().max() / exact.abs().max()
    # Three roundings in a row (projection, attention, projection), and sums over 16 channels.
    assert float(error) < 16 * torch.finfo(dtype).eps


def test_half_precision_modules_run_whole():
    module = attention(n_win=2, topk=2, soft_routing=True, diff_routing=True, param_routing=True)
    out = module.bfloat16()(maps(6, 8).bfloat16())
    assert out.dtype == torch.bfloat16


def test_copies_and_pickles_of_a_module():
    module = attention(n_win=2, topk=2, side_dwconv=0)
    x = maps(4, 4)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "heads": ({"num_heads": 3}, ValueError, "dim: 16 channels do not split into num_heads = 3"),
    "qk-dim": ({"qk_dim": 9}, ValueError, "qk_dim: 9 channels do not split into num_heads = 2"),
    "n-win": ({"n_win": 0}, ValueError, "n_win: wants"),
    "n-win-axes": ({"n_win": (1, 2, 3, 4)}, ValueError, "n_win: wants"),
    "topk": ({"topk": 0}, ValueError, "topk: wants a number of regions >= 1, got 0"),
    "topk-float": ({"topk": 2.0}, ValueError, "topk: wants a number of regions >= 1, got 2.0"),
    "param": ({"param_attention": "none"}, ValueError, "param_attention: wants 'qkvo' or 'qkv'"),
    "pad": ({"pad_mode": "same"}, ValueError, "pad_mode: wants one of"),
    "router": ({"param_routing": True}, ValueError, "param_routing: wants diff_routing=True"),
    "hard-diff": ({"diff_routing": True}, ValueError, "diff_routing: wants soft_routing=True"),
    "fracpool": (
        {"kv_downsample_mode": "fracpool"},
        NotImplementedError,
        "kv_downsample_mode: 'fracpool' was never written",
    ),
    "conv": (
        {"kv_downsample_mode": "conv"},
        NotImplementedError,
        "kv_downsample_mode: 'conv' was never written",
    ),
    "pool": ({"kv_downsample_mode": "max"}, ValueError, "kv_downsample_mode: wants 'identity'"),
    "pool-pad": (
        {"kv_downsample_mode": "maxpool", "pad_mode": "mask"},
        ValueError,
        "kv_downsample_mode: wants 'identity' beside pad_mode 'mask'",
    ),
    "per-win": (
        {"kv_downsample_mode": "ada_maxpool", "kv_per_win": 0},
        ValueError,
        "kv_per_win: wants at least 1, got 0",
    ),
    "kernel": ({"kv_downsample_kernel": 2}, ValueError, "kv_downsample_kernel: wants None"),
    "dwconv": ({"side_dwconv": 2}, ValueError, "side_dwconv: wants 0 or an odd kernel size, got 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_named(name: str):
    options, kind, message = BAD[name]
    with pytest.raises(kind, match=re.escape(message)):
        BiLevelRoutingAttention(**{"dim": 16, "num_heads": 2, **options})


# What fits no region or no number of them.
SIZES: dict[str, tuple[dict[str, Any], tuple[int, ...], str]] = {
    "divides-not": ({"n_win": 3}, (6, 8), "n_win: (3, 3) does not divide a map of (6, 8)"),
    "too-small": ({"n_win": 4}, (3, 8), "n_win: a map of (3, 8) has no (4, 4) regions"),
    "too-small-zero": ({"n_win": 4, "pad_mode": "zero"}, (3, 8), "has no (4, 4) regions"),
    "topk": ({"n_win": 2, "topk": 5}, (4, 4), "topk: wants 1 to 4, the number of regions"),
    "topk-soft": (
        {"n_win": 2, "topk": 5, "soft_routing": True, "diff_routing": True, "param_routing": True},
        (4, 4),
        "topk: wants 1 to 4",
    ),
    "axes": ({"n_win": 2}, (1, 4, 4), "x: wants [B, H, W, 16], got shape [2, 1, 4, 4, 16]"),
    "video": ({"n_win": (1, 2, 2)}, (4, 4), "x: wants [B, T, H, W, 16], got shape"),
    "ratio": (
        {"n_win": 2, "kv_downsample_mode": "avgpool"},
        (6, 8),
        "kv_downsample_ratio: wants at most the region's (3, 4) tokens per axis, got 4",
    ),
    "backend": ({"n_win": 2, "backend": "cuda13"}, (4, 4), "backend: wants one of"),
}


@pytest.mark.parametrize("name", SIZES)
def test_maps_that_do_not_fit_are_named(name: str):
    options, size, message = SIZES[name]
    module = attention(**{"topk": 1, **options})
    with pytest.raises(ValueError, match=re.escape(message)):
        module(maps(*size))


def test_other_modules_name_what_does_not_fit():
    with pytest.raises(ValueError, match="dim: 12 channels do not split into num_heads = 8"):
        AttentionLePE(12)
    with pytest.raises(ValueError, match=r"n_win: wants \(frames, rows, columns\), got 7"):
        VideoBiLevelRoutingAttention(16, 2, 7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pad_mode: wants None, 'zero' or 'mask', got 'legacy'"):
        NchwBiLevelRoutingAttention(16, 2, pad_mode="legacy")  # type: ignore[arg-type]
    module = NchwBiLevelRoutingAttention(16, 2, 4)
    with pytest.raises(ValueError, match=r"x: wants \[B, 16, H, W\], got shape \[1, 8, 8, 16\]"):
        module(torch.zeros(1, 8, 8, 16))
    with pytest.raises(ValueError, match=r"has no \(4, 4\) regions"):
        module(torch.zeros(1, 16, 3, 8))
    with pytest.raises(ValueError, match="topk: wants 1 to 1, the number of regions"):
        NchwBiLevelRoutingAttention(16, 2, 1)(torch.zeros(1, 16, 3, 8))
    with pytest.raises(ValueError, match="x: wants"):
        attention()(maps(8, 8, dim=8))
