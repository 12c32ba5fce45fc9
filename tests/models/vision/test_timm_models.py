"""timm builds, loads, wraps, trains and compiles BiFormer by name."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from permattn.models.vision import BiFormer, BiFormerSTL, register_timm
from torch import nn

from .torchvision_stand_in import import_timm

timm = import_timm()
register_timm()

from permattn.models.vision import timm_models  # noqa: E402

TINY = "permattn_biformer_tiny"
SMALL: dict[str, Any] = {
    "depths": (1, 2, 1, 1),
    "dims": (16, 24, 32, 48),
    "head_dim": 8,
    "n_win": 2,
    "topks": (1, 2, 4, -2),
}


def small(name: str = TINY, **options: Any) -> Any:
    """A small network, by its name in timm."""
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **options}).eval()


def images(size: int = 64, channels: int = 3, count: int = 2) -> torch.Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def test_names_are_listed():
    names = ["base", "small", "stl", "stl_nchw", "tiny"]
    assert timm.list_models("permattn*") == [f"permattn_biformer_{x}" for x in names]
    assert timm.list_models("permattn*", pretrained=True) == []
    assert timm.is_model(TINY)


def test_registering_twice_changes_nothing(recwarn: pytest.WarningsRecorder):
    register_timm()
    assert timm.is_model(TINY)
    assert not [w for w in recwarn if "registry" in str(w.message)]


@pytest.mark.parametrize(
    ("name", "millions"), [("tiny", 13.14), ("small", 25.54), ("base", 56.80), ("stl", 28.37)]
)
def test_released_sizes(name: str, millions: float):
    with torch.device("meta"):
        model = timm.create_model(f"permattn_biformer_{name}")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_stl_layouts_are_the_class():
    with torch.device("meta"):
        models = [timm.create_model(f"permattn_biformer_{x}") for x in ("stl", "stl_nchw")]
    assert [m.layout for m in models if isinstance(m, BiFormerSTL)] == ["nhwc", "nchw"]


def test_created_is_the_class_with_timms_options():
    model = small(num_classes=10, in_chans=1, drop_path_rate=0.2, drop_rate=0.1)
    torch.manual_seed(0)
    own = BiFormer(num_classes=10, in_chans=1, drop_path_rate=0.2, drop_rate=0.1, **SMALL).eval()
    x = images(channels=1)
    assert torch.equal(model(x), own(x))
    rates = [m.rate for m in model.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.2)
    assert model.head_drop.p == 0.1


def test_data_config_is_the_released_evaluation():
    config = timm.data.resolve_data_config(model=small())
    assert config["input_size"] == (3, 224, 224)
    assert (config["crop_pct"], config["interpolation"]) == (0.875, "bicubic")
    assert config["mean"] == timm.data.IMAGENET_DEFAULT_MEAN


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3), (1,), (-2, -1)], ids=str)
def test_features_only_gives_the_networks_maps(out_indices: tuple[int, ...]):
    wrapped = small(features_only=True, out_indices=out_indices, in_chans=1)
    x = images(channels=1)
    maps = small(in_chans=1).features(x)
    seen = wrapped(x)
    assert len(seen) == len(out_indices)
    for got, i in zip(seen, out_indices, strict=True):
        assert torch.equal(got, maps[i])
    stages = [i % 4 for i in out_indices]
    assert wrapped.feature_info.channels() == [SMALL["dims"][i] for i in stages]
    assert wrapped.feature_info.reduction() == [4 * 2**i for i in stages]
    # What lies behind the last map is gone.
    assert len(wrapped.model.stages) == max(stages) + 1


def test_features_only_keeps_the_norms_that_are_asked_for():
    wrapped = small(features_only=True, extra_norms=True)
    for m in wrapped(images()):
        mean = m.mean(1)
        assert torch.allclose(mean, torch.zeros_like(mean), atol=1e-5)


def test_no_classes_is_a_vector_and_no_pool_a_map():
    x = images()
    pooled, maps = small(num_classes=0), small(num_classes=0, global_pool="")
    assert pooled(x).shape == (2, 48)
    assert maps(x).shape == (2, 48, 2, 2)
    assert torch.allclose(maps(x).mean((2, 3)), pooled(x), atol=1e-6)
    assert torch.allclose(maps(x).amax((2, 3)), small(num_classes=0, global_pool="max")(x))


def test_forward_intermediates_and_a_new_head():
    model, x = small(num_classes=5), images()
    last, maps = model.forward_intermediates(x, indices=[0, 2], norm=False)
    assert torch.equal(last, model.forward_features(x))
    assert [tuple(m.shape) for m in maps] == [(2, 16, 16, 16), (2, 32, 4, 4)]
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.get_classifier().out_features == 3


def saved(folder: Path, name: str = TINY, **options: Any) -> tuple[Any, Path]:
    """A network, and a file in the released format with its weights."""
    model = small(name, **options)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_(-0.1, 0.1)
    path = folder / "weights.pth"
    torch.save({"model": model.state_dict(), "epoch": 299}, path)
    return model, path


@pytest.mark.parametrize("name", ["tiny", "stl"])
def test_checkpoint_path_loads_a_released_file(name: str, tmp_path: Path):
    full = f"permattn_biformer_{name}"
    model, path = saved(tmp_path, full)
    torch.manual_seed(3)
    again = timm.create_model(full, checkpoint_path=path, **SMALL).eval()
    assert torch.equal(model(images()), again(images()))


def test_checkpoint_of_another_network_is_an_error(tmp_path: Path):
    _, path = saved(tmp_path)
    with pytest.raises(RuntimeError, match="Missing key"):
        small("permattn_biformer_stl", checkpoint_path=path)


def test_file_of_other_classes_and_channels(tmp_path: Path):
    model, path = saved(tmp_path)
    overlay = {"file": str(path)}
    tuned = small(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, in_chans=1)
    x = images(channels=1)
    assert tuned(x).shape == (2, 3)
    # timm sums the stem's weights over the channels, as if the image were grey.
    grey = model.forward_features(x.expand(-1, 3, -1, -1))
    assert torch.allclose(tuned.forward_features(x), grey, atol=1e-4)


def test_file_for_features(tmp_path: Path):
    model, path = saved(tmp_path)
    wrapped = small(pretrained=True, pretrained_cfg_overlay={"file": str(path)}, features_only=True)
    for got, want in zip(wrapped(images()), model.features(images()), strict=True):
        assert torch.equal(got, want)
    normed = small(
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path)},
        features_only=True,
        extra_norms=True,
    )
    want = model.features(images())[0].permute(0, 2, 3, 1)
    want = nn.functional.layer_norm(want, want.shape[-1:], eps=1e-6).permute(0, 3, 1, 2)
    assert torch.allclose(normed(images())[0], want, atol=1e-6)


def test_folder_as_on_the_hub(tmp_path: Path):
    model = small(num_classes=5)
    timm.models.save_for_hf(model, str(tmp_path), model_args=SMALL)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images()), model(images()))


def test_foreign_names_in_a_file_are_named(tmp_path: Path):
    state = small().state_dict()
    state["stages.9.weight"] = state.pop("norm.bias")
    torch.save({"model": state}, tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    # With other classes timm would load whatever fits.
    with pytest.raises(ValueError, match=r"missing: norm\.bias; unexpected: stages\.9\.weight"):
        small(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)


def test_pretrained_says_that_there_is_nothing_to_download():
    with pytest.raises(ValueError, match=r"no weights to download.*checkpoint_path"):
        timm.create_model(TINY, pretrained=True)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"img_size": 256}, TypeError, "img_size: .* any size.*pad_mode"),
        ({"pad_mode": "reflect"}, ValueError, "pad_mode: .*reflect"),
        ({"global_pool": "catavgmax"}, ValueError, "global_pool: .*catavgmax"),
        ({"dims": (16, 24)}, ValueError, r"dims: .*\(16, 24\)"),
        ({"features_only": True, "out_indices": (4,)}, ValueError, "indices: .*4"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_options(options: dict[str, Any], error: type[Exception], match: str):
    with pytest.raises(error, match=match):
        small(**options)


def test_layer_decay_grows_with_depth():
    model = small()
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1.0, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    per_name = {name: scale[id(p)] for name, p in model.named_parameters()}
    order = [
        "downsample_layers.0.0.weight",
        "stages.0.0.mlp.0.weight",
        "stages.1.0.mlp.0.weight",
        "stages.1.1.mlp.0.weight",
        "stages.2.0.mlp.0.weight",
        "stages.3.0.mlp.0.weight",
        "head.weight",
    ]
    scales = [per_name[name] for name in order]
    assert scales == sorted(scales) and len(set(scales)) == len(scales)
    assert scales[-1] == 1.0
    merge = per_name["downsample_layers.2.0.weight"]
    assert merge == per_name["stages.2.0.mlp.0.weight"]


def test_weight_decay_spares_biases_and_norms():
    model = small()
    groups = timm.optim.param_groups_weight_decay(
        model, 0.05, no_weight_decay_list=model.no_weight_decay()
    )
    decay = {group["weight_decay"]: {id(p) for p in group["params"]} for group in groups}
    for name, p in model.named_parameters():
        assert id(p) in decay[0.05 if p.dim() > 1 else 0.0], name


def test_a_step_of_training_with_ema_and_checkpointing():
    model = small(num_classes=4, drop_path_rate=0.1).train()
    model.set_grad_checkpointing()
    ema = timm.utils.ModelEmaV3(model, decay=0.5)
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.05)
    before = copy.deepcopy(model.state_dict())
    nn.functional.cross_entropy(model(images()), torch.tensor([0, 3])).backward()
    optimizer.step()
    ema.update(model)
    assert all(p.grad is not None for p in model.parameters())
    name = "stages.2.0.attn.qkv.qkv.weight"
    new, old = model.state_dict()[name], before[name]
    assert not torch.equal(new, old)
    assert torch.allclose(ema.module.state_dict()[name], (new + old) / 2, atol=1e-7)


def test_compiles_in_one_graph():
    model, x = small(num_classes=4, depths=(1, 1, 1, 1)), images()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(x), model(x), atol=1e-5)


def test_transformers_takes_the_name(monkeypatch: pytest.MonkeyPatch):
    transformers = pytest.importorskip("transformers", minversion="5.20")
    from transformers import utils
    from transformers.utils import import_utils

    # They want torchvision to be there, too.
    monkeypatch.setattr(utils, "is_timm_available", lambda: True)
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "timm", (lambda: True, ""))
    from transformers.models.timm_backbone.modeling_timm_backbone import TimmBackbone

    config = transformers.TimmBackboneConfig(backbone=TINY, out_indices=[1, 3])
    backbone = TimmBackbone(config).eval()
    with torch.no_grad():
        maps = backbone(images(224, count=1)).feature_maps
    assert backbone.channels == [128, 512]
    assert [tuple(m.shape) for m in maps] == [(1, 128, 28, 28), (1, 512, 7, 7)]


def test_every_name_has_a_config():
    assert sorted(timm_models.default_cfgs) == sorted(timm_models.__all__)


def test_the_stand_in_is_gone():
    """Else transformers, in the same process, would take it for torchvision."""
    if importlib.util.find_spec("torchvision") is None:
        assert not [name for name in sys.modules if name.split(".")[0] == "torchvision"]
