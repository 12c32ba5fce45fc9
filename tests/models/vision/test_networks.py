"""Whole networks against the independent account, their state dicts, and timm's protocol."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from permattn.models.vision import (
    BiFormer,
    BiFormerSTL,
    biformer_base,
    biformer_small,
    biformer_stl,
    biformer_stl_nchw,
    biformer_tiny,
)
from permattn.models.vision.layers import DropPath
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from . import reference
from .reference import Net

SMALL = {"depths": (1, 2, 1, 1), "dims": (16, 24, 32, 48), "head_dim": 8, "num_classes": 7}
NETS: dict[str, tuple[type[BiFormer] | type[BiFormerSTL], dict[str, Any], Net, int]] = {
    "biformer": (
        BiFormer,
        {"topks": (1, 2, 4, -2), "n_win": 2},
        Net((1, 2, 1, 1), (16, 24, 32, 48), 8, (1, 2, 4, -2), 2),
        64,
    ),
    "padded": (
        BiFormer,
        {"topks": (2, 3, 4, -2), "n_win": 3, "auto_pad": True},
        Net((1, 2, 1, 1), (16, 24, 32, 48), 8, (2, 3, 4, -2), 3, auto_pad=True),
        72,
    ),
    "other-stages": (
        BiFormer,
        {"topks": (0, 2, -1, -2), "n_win": 2},
        Net((1, 2, 1, 1), (16, 24, 32, 48), 8, (0, 2, -1, -2), 2),
        64,
    ),
    "stl": (
        BiFormerSTL,
        {"topks": (1, 2, 4, -2), "n_win": 2},
        Net((1, 2, 1, 1), (16, 24, 32, 48), 8, (1, 2, 4, -2), 2, stl=True),
        64,
    ),
    "stl-nchw": (
        BiFormerSTL,
        {"topks": (1, 2, 3, -1), "n_win": 2, "layout": "nchw"},
        Net((1, 2, 1, 1), (16, 24, 32, 48), 8, (1, 2, 3, -1), 2, stl=True, nchw=True),
        72,
    ),
}


def small(name: str = "biformer", **options: Any) -> BiFormer | BiFormerSTL:
    """A small network with weights that route clearly and running statistics of its own."""
    cls, chosen, _, _ = NETS[name]
    torch.manual_seed(0)
    net = cls(**{**SMALL, **chosen, **options})
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=m.in_features**-0.5)
    return net


def images(size: int | tuple[int, int] = 64, batch: int = 2) -> torch.Tensor:
    size = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NETS)
def test_network_and_its_gradients(name: str, training: bool):
    net, x = small(name).double().train(training), images(NETS[name][3]).double()
    state = {k: t.detach().clone() for k, t in net.state_dict().items()}
    leaves = {k: state[k].requires_grad_() for k, _ in net.named_parameters()}
    maps, want = reference.network(state, x, NETS[name][2], training)
    before = copy.deepcopy(net)
    got = net(x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(before.features(x), maps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    dout = torch.randn_like(got)
    ours = torch.autograd.grad(got, list(net.parameters()), dout)
    theirs = torch.autograd.grad(want, list(leaves.values()), dout)
    for (key, _), a, b in zip(net.named_parameters(), ours, theirs, strict=True):
        scale = float(b.abs().max().clamp_min(1.0))
        assert float((a - b).abs().max()) <= 1e-10 * scale, key


RELEASED = {
    # constructor: tensors, millions of parameters, depths, dims
    "tiny": (biformer_tiny, 264, 13.14, (2, 2, 8, 2), (64, 128, 256, 512)),
    "small": (biformer_small, 518, 25.54, (4, 4, 18, 4), (64, 128, 256, 512)),
    "base": (biformer_base, 518, 56.80, (4, 4, 18, 4), (96, 192, 384, 768)),
}


def released_shapes(depths: tuple[int, ...], dims: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released T, S or B, from the account's table."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *weight: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = weight
        if bias:
            shapes[f"{name}.bias"] = weight[:1]

    def batch_norm(name: str, dim: int) -> None:
        layer(name, dim)
        shapes.update({f"{name}.running_mean": (dim,), f"{name}.running_var": (dim,)})
        shapes[f"{name}.num_batches_tracked"] = ()

    half = dims[0] // 2
    layer("downsample_layers.0.0", half, 3, 3, 3)
    batch_norm("downsample_layers.0.1", half)
    layer("downsample_layers.0.3", dims[0], half, 3, 3)
    batch_norm("downsample_layers.0.4", dims[0])
    for i, dim in enumerate(dims):
        if i:
            layer(f"downsample_layers.{i}.0", dim, dims[i - 1], 3, 3)
            batch_norm(f"downsample_layers.{i}.1", dim)
        for j in range(depths[i]):
            at = f"stages.{i}.{j}"
            layer(f"{at}.pos_embed", dim, 1, 3, 3)
            layer(f"{at}.norm1", dim)
            layer(f"{at}.norm2", dim)
            layer(f"{at}.mlp.0", 3 * dim, dim)
            layer(f"{at}.mlp.3", dim, 3 * dim)
            layer(f"{at}.attn.lepe", dim, 1, 5, 5)
            if i < 3:
                layer(f"{at}.attn.qkv.qkv", 3 * dim, dim)
                layer(f"{at}.attn.wo", dim, dim)
            else:
                layer(f"{at}.attn.qkv", 3 * dim, dim, bias=False)
                layer(f"{at}.attn.proj", dim, dim)
    batch_norm("norm", dims[-1])
    layer("head", 1000, dims[-1])
    return shapes


def parameters_in_millions(net: nn.Module) -> float:
    return round(sum(p.numel() for p in net.parameters()) / 1e6, 2)


@pytest.mark.parametrize("name", RELEASED)
def test_released_names_shapes_and_sizes(name: str):
    make, tensors, millions, depths, dims = RELEASED[name]
    with torch.device("meta"):
        net = make()
    state = {k: tuple(x.shape) for k, x in net.state_dict().items()}
    assert state == released_shapes(depths, dims)
    assert len(state) == tensors
    assert parameters_in_millions(net) == millions


def test_stl_names_and_sizes():
    with torch.device("meta"):
        stl, nchw = biformer_stl(), biformer_stl_nchw()
    names, twin = stl.state_dict(), nchw.state_dict()
    assert parameters_in_millions(stl) == parameters_in_millions(nchw) == 28.37
    assert {"stages.0.blocks.1.mlp.2.weight", "downsample_layers.1.1.weight"} <= names.keys()
    assert tuple(names["downsample_layers.3.1.weight"].shape) == (768, 384, 2, 2)
    assert not any("pos_embed" in name for name in names)
    assert tuple(twin["stages.2.blocks.5.attn.qkv_linear.weight"].shape) == (1152, 384, 1, 1)
    assert tuple(names["stages.2.blocks.5.attn.qkv.qkv.weight"].shape) == (1152, 384)


def test_extra_norms_take_the_place_of_norm_and_head():
    net = small("biformer", extra_norms=True)
    state = net.state_dict()
    assert not any(k.startswith(("norm.", "head.")) for k in state)
    assert sum(k.startswith("extra_norms.") for k in state) == 8
    plain = small("biformer").eval()
    plain.load_state_dict(state, strict=False)
    with torch.no_grad():
        for ours, raw in zip(net.eval().features(images()), plain.features(images()), strict=True):
            want = nn.functional.layer_norm(raw.permute(0, 2, 3, 1), raw.shape[1:2], eps=1e-6)
            torch.testing.assert_close(ours, want.permute(0, 3, 1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "giga"), [("tiny", 2.2), ("small", 4.5), ("base", 9.8)])
def test_flop_counter_says_what_the_paper_says(name: str, giga: float):
    """Multiplications of one image of 224 x 224.

    Counted: matrix products, convolutions, routing and attention from region to region. Not: norms,
    and the dense attention of the last stage, for whose kernel torch's counter has no formula (two
    products of 49 x 49 x width for a block, 0.2 % of the whole).
    """
    net = RELEASED[name][0]().eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga, rel=0.015)
    counted = {str(op) for op in counter.get_flop_counts()["Global"]}
    assert {"permattn.region_attention", "permattn.route_regions"} <= counted


def test_pickle_and_deepcopy_give_the_same_numbers():
    net = small(side_dwconv=0).eval()
    with torch.no_grad():
        want = net(images())
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(twin(images()), want)


def test_drop_path_acts_in_training_only():
    net = small(drop_path_rate=0.9)
    with torch.no_grad():
        net.eval()
        assert torch.equal(net(images()), small().eval()(images()))
        net.train()
        torch.manual_seed(1)
        assert not torch.equal(net(images()), net(images()))
    rates = [m.rate for m in net.modules() if type(m).__name__ == "DropPath"]
    assert rates == pytest.approx([0.225, 0.45, 0.675, 0.9])


def test_drop_path_keeps_the_mean_and_drops_whole_samples():
    torch.manual_seed(0)
    y = DropPath(0.25)(torch.ones(4000, 3, 2))
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert bool((y == y[:, :1, :1]).all())
    assert float(y.mean()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("name", ["biformer", "stl", "stl-nchw"])
def test_grad_checkpointing_changes_no_gradient(name: str):
    x = images(NETS[name][3])
    grads = []
    for enable in (False, True):
        net = small(name, drop_path_rate=0.3).train()
        net.set_grad_checkpointing(enable)
        torch.manual_seed(7)
        net(x).square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_feature_maps_in_training_leave_the_unused_norm_alone():
    net = small().train()
    before = net.norm.running_mean.clone()
    sum(m.sum() for m in net.features(images())).backward()
    assert torch.equal(net.norm.running_mean, before)
    assert net.norm.weight.grad is None and net.head.weight.grad is None


def test_import_needs_torch_only():
    blocked = ("timm", "transformers", "fairscale", "mmcv", "einops", "torchvision", "safetensors")
    code = f"""
import sys
for name in {blocked!r}:
    sys.modules[name] = None
from permattn.models.vision import biformer_tiny
biformer_tiny(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), head_dim=8)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_intermediates_take_what_is_asked():
    net, x = small().eval(), images()
    with torch.no_grad():
        maps = net.features(x)
        last, chosen = net.forward_intermediates(x, indices=(-1, 1))
        assert [m.shape[1] for m in chosen] == [24, 48]
        assert torch.equal(last, net.norm(maps[3]))
        _, normed = net.forward_intermediates(x, indices=1, norm=True)
        assert torch.equal(normed[0], last)
        early, chosen = net.forward_intermediates(x, indices=[0], stop_early=True)
        assert torch.equal(early, maps[0]) and torch.equal(chosen[0], maps[0])
        (only,) = net.forward_intermediates(
            x, indices=[2], output_fmt="NHWC", intermediates_only=True
        )
        assert torch.equal(only, maps[2].permute(0, 2, 3, 1))
        assert torch.equal(net.forward_head(last), net(x))
        assert net.forward_head(last, pre_logits=True).shape == (2, 48)
    assert [i["reduction"] for i in net.feature_info] == [4, 8, 16, 32]
    assert [m.shape[-1] for m in maps] == [16, 8, 4, 2]


def test_pruning_keeps_the_maps():
    net, x = small().eval(), images()
    with torch.no_grad():
        want = net.forward_intermediates(x, indices=(0, 1), intermediates_only=True)
        assert net.prune_intermediate_layers((0, 1)) == [0, 1]
        got = net.forward_intermediates(x, indices=(0, 1), intermediates_only=True)
        assert net.forward_features(x).shape == (2, 24, 8, 8)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert len(net.stages) == len(net.downsample_layers) == 2
    assert net.num_features == 24 and net.num_classes == 0


def test_reset_classifier():
    net = small().double()
    net.reset_classifier(3)
    assert net.get_classifier().weight.dtype == torch.float64
    assert net(images().double()).shape == (2, 3)
    net.reset_classifier(0, "max")
    assert net.eval()(images().double()).shape == (2, 48)
    net.reset_classifier(0, "")
    assert net(images().double()).shape == (2, 48, 2, 2)


def test_groups_cover_every_parameter_in_depth_order():
    net = small()
    groups = net.group_matcher()
    patterns = [(groups["stem"], None), *groups["blocks"]]
    for name, _ in net.named_parameters():
        assert name.startswith("head") or any(re.match(p, name) for p, _ in patterns), name
    assert net.no_weight_decay() == set()


# Any H x W: maps that n_win does not divide, and that are smaller than n_win.
@pytest.mark.parametrize("pad_mode", ["legacy", "mask"])
@pytest.mark.parametrize("size", [(65, 97), (33, 40), (128, 64)], ids=str)
def test_feature_maps_of_any_size(size: tuple[int, int], pad_mode: str):
    topks = (1, 2, 4, -2)
    net = small(n_win=4, topks=topks, pad_mode=pad_mode).eval()
    with torch.no_grad():
        maps = net.features(images(size))
    for m, stride in zip(maps, (4, 8, 16, 32), strict=True):
        assert m.shape[2:] == tuple(-(-n // stride) for n in size)
        assert bool(m.isfinite().all())
        assert m.is_contiguous(memory_format=torch.channels_last)


BAD = {
    "in-chans": ({"in_chans": 0}, "in_chans: wants at least 1, got 0"),
    "dims": ({"dims": (16, 24, 32)}, "dims: wants 4 values"),
    "depths": ({"depths": (1, 0, 1, 1)}, "depths: wants at least one block"),
    "topks": ({"topks": (1, 2)}, "topks: wants 4 values"),
    "topk": ({"topks": (1, 2, -3, -2)}, "topks: wants numbers of regions, 0, -1 or -2, got -3"),
    "head-dim": ({"head_dim": 7}, "head_dim: 16 channels do not split into heads of 7"),
    "drop-path": ({"drop_path_rate": 1.5}, "drop_path_rate: wants 0 <= rate < 1"),
    "drop": ({"drop_rate": -0.1}, "drop_rate: wants 0 <= rate < 1"),
    "pool": ({"global_pool": "mean"}, "global_pool: wants 'avg', 'max' or '', got 'mean'"),
    "map-head": ({"global_pool": ""}, "a head of 7 wants a vector"),
    "classes": ({"num_classes": -1}, "num_classes: wants at least 0"),
    "pad-mode": ({"pad_mode": "reflect"}, "pad_mode: wants one of"),
    "conv": ({"side_dwconv": 4}, "side_dwconv: wants 0 or an odd kernel size, got 4"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_named(name: str):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        BiFormer(**{**SMALL, "n_win": 2, "topks": (1, 2, 4, -2), **options})


def test_bad_images_and_indices_are_named():
    net = small().eval()
    with pytest.raises(ValueError, match=r"x: wants \[B, 3, H, W\], got shape \[2, 4, 64, 64\]"):
        net(torch.zeros(2, 4, 64, 64))
    with pytest.raises(TypeError, match=r"x: wants a floating dtype, got torch\.uint8"):
        net(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"n_win: \(2, 2\) does not divide a map of \(17, 16\)"):
        net(torch.zeros(2, 3, 65, 64))
    with pytest.raises(ValueError, match="indices: wants stages -4 to 3"):
        net.forward_intermediates(images(), indices=[4])
    with pytest.raises(ValueError, match="indices: wants the last 1 to 4 stages, got 0"):
        net.forward_intermediates(images(), indices=0)
    with pytest.raises(ValueError, match="layout: wants 'nhwc' or 'nchw'"):
        BiFormerSTL(layout="hwc")
    with pytest.raises(ValueError, match="layout 'nchw' has 'zero', 'mask' or None"):
        BiFormerSTL(layout="nchw", auto_pad=True)
