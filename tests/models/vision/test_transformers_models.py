"""transformers builds, saves, loads, trains and uses BiFormer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from permattn.models.vision import BiFormer, BiFormerSTL, load_biformer, register_transformers
from torch import nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModelForImageClassification,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

register_transformers()

from permattn.models.vision.transformers_models import (  # noqa: E402
    BiFormerBackbone,
    BiFormerConfig,
    BiFormerForImageClassification,
    biformer_config,
)

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SMALL: dict[str, Any] = {
    "depths": [1, 2, 1, 1],
    "dims": [16, 24, 32, 48],
    "head_dim": 8,
    "n_win": 2,
    "topks": [1, 2, 4, -2],
}
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def small(**options: Any) -> BiFormerConfig:
    return BiFormerConfig(**{**SMALL, **options})


def backbone_of(**options: Any) -> BiFormerBackbone:
    torch.manual_seed(0)
    return AutoBackbone.from_config(small(**options)).eval()


def classifier_of(**options: Any) -> BiFormerForImageClassification:
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_config(small(**options)).eval()


def images(size: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def said_by(config: BiFormerConfig) -> dict[str, Any]:
    """What a config says, without what saving adds."""
    added = ("architectures", "dtype", "_name_or_path")
    return {k: v for k, v in config.to_dict().items() if k not in added}


def test_auto_classes_know_the_type():
    config = AutoConfig.for_model("permattn_biformer", **SMALL)
    assert type(config) is BiFormerConfig
    assert type(backbone_of()) is BiFormerBackbone
    assert type(classifier_of()) is BiFormerForImageClassification


@pytest.mark.parametrize(
    ("name", "kind", "millions"),
    [
        ("tiny", BiFormer, 13.14),
        ("small", BiFormer, 25.54),
        ("base", BiFormer, 56.80),
        ("stl", BiFormerSTL, 28.37),
        ("stl_nchw", BiFormerSTL, 28.37),
    ],
)
def test_released_configs(name: str, kind: type[nn.Module], millions: float):
    with torch.device("meta"):
        network = biformer_config(name).build(num_classes=1000)
    assert type(network) is kind
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_config_goes_through_json(tmp_path: Path):
    config = small(
        out_features=["stage1", "stage3"],
        id2label={0: "cat", 1: "dog"},
        pad_mode="mask",
        backend="reference",
        drop_path_rate=0.1,
        num_channels=1,
        attention={"soft_routing": True, "diff_routing": True},
    )
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "permattn_biformer"
    again = AutoConfig.from_pretrained(tmp_path)
    assert said_by(again) == said_by(config)
    assert again.id2label == {0: "cat", 1: "dog"}
    assert again.out_indices == [1, 3]
    assert again.hidden_sizes == again.dims == [16, 24, 32, 48]
    assert again.hidden_size == 48


def test_config_reaches_the_attention():
    model = backbone_of(pad_mode="mask", backend="reference", attention={"qk_scale": 0.5})
    attention = model.biformer.stages[0][0].attn
    assert (attention.pad_mode, attention.backend) == ("mask", "reference")
    assert (attention.scale, attention.n_win, attention.topk) == (0.5, (2, 2), 1)


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        ({"out_features": ["stage2", "stage4"]}, ["stage2", "stage4"]),
        ({"out_indices": [1, 2, 3, 4]}, STAGES),
        ({"out_indices": (0, -1)}, ["stem", "stage4"]),
        ({}, ["stage4"]),
    ],
    ids=["names", "numbers", "from-the-end", "default"],
)
def test_backbone_gives_the_chosen_maps(chosen: dict[str, Any], names: list[str]):
    model, x = backbone_of(**chosen, extra_norms=False), images()
    output = model(x)
    maps = [model.biformer.downsample(x, 0), *model.biformer.features(x)]
    numbers = [model.stage_names.index(n) for n in names]
    assert model.out_features == names
    assert model.channels == [[16, *SMALL["dims"]][i] for i in numbers]
    assert len(output.feature_maps) == len(names) and output.hidden_states is None
    for got, i in zip(output.feature_maps, numbers, strict=True):
        assert torch.equal(got, maps[i])


def test_backbone_norms_its_maps_as_the_released_segmenters():
    model, x = backbone_of(out_features=STAGES), images()
    for got, want in zip(model(x).feature_maps, model.biformer.features(x), strict=True):
        assert torch.equal(got, want)
        mean = got.mean(1)
        assert torch.allclose(mean, torch.zeros_like(mean), atol=1e-5)


def test_outputs_as_tuples_and_all_maps():
    model, x = backbone_of(out_features=["stage2"]), images()
    maps, hidden = model(x, output_hidden_states=True, return_dict=False)
    assert [tuple(m.shape[1:]) for m in hidden] == [
        *((16, 16, 16), (16, 16, 16), (24, 8, 8), (32, 4, 4), (48, 2, 2)),
    ]
    assert len(maps) == 1
    classifier = classifier_of(num_labels=3)
    loss, logits = classifier(x, labels=torch.tensor([0, 2]), return_dict=False)
    assert logits.shape == (2, 3) and loss.dim() == 0
    assert len(classifier(x, output_hidden_states=True).hidden_states) == 4
    with pytest.raises(ValueError, match="output_attentions"):
        model(x, output_attentions=True)


@pytest.mark.parametrize("kind", ["backbone", "classifier"])
def test_saved_and_loaded_is_the_same(kind: str, tmp_path: Path):
    if kind == "backbone":
        model: Any = backbone_of(out_features=["stage1", "stage4"])
    else:
        model = classifier_of(num_labels=5)
    # Statistics that a new network does not have.
    model.train()(images())
    model.eval().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    again = type(model).from_pretrained(tmp_path)
    assert not again.training
    assert said_by(again.config) == said_by(model.config)
    state = again.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    with torch.no_grad():
        for got, want in zip(again(images())[0], model(images())[0], strict=True):
            assert torch.equal(got, want)


def test_backbone_from_a_classifier(tmp_path: Path):
    model = classifier_of(num_labels=5)
    model.save_pretrained(tmp_path)
    backbone, info = BiFormerBackbone.from_pretrained(
        tmp_path, out_features=STAGES, output_loading_info=True
    )
    assert {name.split(".")[1] for name in info["missing_keys"]} == {"extra_norms"}
    assert not info["unexpected_keys"]
    for got, want in zip(
        backbone.biformer.forward_intermediates(images(), intermediates_only=True),
        model.biformer.features(images()),
        strict=True,
    ):
        assert torch.equal(got, want)
    # Norms that the file lacks start as a new backbone's, not as uninitialised memory.
    assert all(bool((n.weight == 1).all() & (n.bias == 0).all()) for n in norms_of(backbone))


def norms_of(backbone: BiFormerBackbone) -> list[Any]:
    return list(backbone.biformer.extra_norms or [])


def test_new_head_on_an_old_body(tmp_path: Path):
    model = classifier_of(num_labels=5)
    model.save_pretrained(tmp_path)
    tuned = AutoModelForImageClassification.from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True
    )
    assert tuned(images()).logits.shape == (2, 7)
    assert 0.0 < tuned.biformer.head.weight.std() < 0.04
    name = "biformer.stages.0.0.mlp.0.weight"
    assert torch.equal(tuned.state_dict()[name], model.state_dict()[name])


@torch.no_grad()
def test_weights_start_as_the_networks():
    """From nothing, and where a checkpoint holds nothing: after memory that nobody wrote."""
    loaded = BiFormerForImageClassification.from_pretrained(
        None, state_dict={}, config=small(num_labels=5, initializer_range=0.05)
    )
    for model, std in ((classifier_of(num_labels=5), 0.02), (loaded, 0.05)):
        for name, m in model.named_modules():
            if isinstance(m, nn.Linear):
                assert float(m.weight.abs().max()) <= 2.0, name
                assert float(m.weight.std()) == pytest.approx(std, rel=0.35), name
                assert m.bias is None or not m.bias.any(), name
            elif isinstance(m, nn.Conv2d):
                bound = m.weight[0].numel() ** -0.5
                assert float(m.weight.abs().max()) <= bound, name
                assert float(m.weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.35)
                assert m.bias is not None and 0.0 < float(m.bias.abs().max()) <= bound, name
            elif isinstance(m, nn.BatchNorm2d):
                assert not m.running_mean.any() and bool((m.running_var == 1).all()), name
                assert bool((m.weight == 1).all()) and not m.bias.any(), name


def test_released_file_goes_into_the_network(tmp_path: Path):
    torch.manual_seed(7)
    net = small().build(num_classes=3).eval()
    torch.save({"model": net.state_dict()}, tmp_path / "weights.pth")
    model = classifier_of(num_labels=3)
    load_biformer(tmp_path / "weights.pth", model.biformer)
    assert torch.equal(model(images()).logits, net(images()))


@pytest.mark.parametrize(
    ("labels", "options", "loss"),
    [
        (torch.tensor([0, 2]), {}, nn.functional.cross_entropy),
        (
            torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]),
            {"problem_type": "multi_label_classification"},
            nn.functional.binary_cross_entropy_with_logits,
        ),
        (torch.randn(2, 3), {"problem_type": "regression"}, nn.functional.mse_loss),
    ],
    ids=["classes", "labels", "regression"],
)
def test_loss(labels: torch.Tensor, options: dict[str, Any], loss: Any):
    model = classifier_of(num_labels=3, **options)
    output = model(images(), labels=labels)
    assert torch.allclose(output.loss, loss(output.logits, labels))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for enable in (False, True):
        model = classifier_of(num_labels=3).train()
        if enable:
            model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing == model.biformer.grad_checkpointing == enable
        model(images(), labels=torch.tensor([0, 2])).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(x, grads[1][name]) for name, x in grads[0].items())
    model.gradient_checkpointing_disable()
    assert not model.biformer.grad_checkpointing
    with pytest.raises(ValueError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


def test_gradient_checkpointing_is_by_transformers_own_function():
    model, seen = classifier_of(num_labels=3).train(), []

    def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        seen.append(module)
        return module(x)

    model._set_gradient_checkpointing(True, run)
    model(images())
    assert len(seen) == 4 + sum(SMALL["depths"])


def test_segments_with_upernet(tmp_path: Path):
    """Size, stages and region number that do not fit each other: 33 x 31 tokens, padded."""
    config = UperNetConfig(
        backbone_config=small(out_features=STAGES, pad_mode="legacy", n_win=3, topks=[1, 2, 9, -2]),
        hidden_size=16,
        auxiliary_in_channels=32,
        auxiliary_channels=16,
        num_labels=5,
    )
    torch.manual_seed(0)
    model = UperNetForSemanticSegmentation(config)
    x = torch.randn(2, 3, 131, 122)
    labels = torch.randint(0, 5, (2, 131, 122))
    output = model.train()(x, labels=labels)
    assert output.logits.shape == (2, 5, 131, 122)
    output.loss.backward()
    stem = model.backbone.biformer.downsample_layers[0][0].weight
    assert stem.grad is not None and bool(stem.grad.any())
    model.eval().save_pretrained(tmp_path)
    again = UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)


def test_an_image_processor_beside_the_model(tmp_path: Path):
    """The released evaluation: 256 pixels, the middle 224, ImageNet's mean and deviation."""
    processor = transformers.ConvNextImageProcessor(
        size={"shortest_edge": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    classifier_of().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    image = torch.randint(0, 256, (3, 300, 400), dtype=torch.uint8).numpy()
    pixels = again(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224)
    assert list(again.image_mean) == [0.485, 0.456, 0.406]


def test_compiles_in_one_graph():
    model, x = classifier_of(num_labels=3, depths=[1, 1, 1, 1]), images()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(x).logits, model(x).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"pad_mode": "reflect"}, "pad_mode: wants .*'mask'.*got 'reflect'"),
        ({"network": "swin"}, "network: wants .*'stl'.*got 'swin'"),
        ({"depths": [1, 1, 1]}, r"depths: wants 4 values, one per stage, got \(1, 1, 1\)"),
        ({"dims": [16, 24]}, r"dims: wants 4 values, one per stage, got \(16, 24\)"),
        ({"topks": [1]}, r"topks: wants 4 values"),
        ({"mlp_ratios": [3] * 5}, r"mlp_ratios: wants 4 values"),
        ({"out_features": ["stage5"]}, "out_features must be a subset of stage_names.*stage5"),
        ({"out_indices": [5]}, r"out_indices: wants -5 to 4, .*got \[5\]"),
        ({"network": "stl", "attention": {"qk_dim": 8}}, "attention: only of network 'biformer'"),
        ({"initializer_range": -1.0}, "initializer_range: .*-1.0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_configs(options: dict[str, Any], match: str):
    with pytest.raises(ValueError, match=match):
        small(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"head_dim": 7}, "head_dim: 16 channels do not split into heads of 7"),
        ({"topks": [1, 2, 4, -3]}, "topks: .*-3"),
        ({"network": "stl_nchw", "topks": None, "pad_mode": "legacy"}, "pad_mode: layout 'nchw'"),
        ({"drop_path_rate": 1.5}, "drop_path_rate: .*1.5"),
    ],
    ids=["heads", "topks", "layout", "drop-path"],
)
def test_networks_that_cannot_be_built(options: dict[str, Any], match: str):
    with pytest.raises(ValueError, match=match):
        BiFormerBackbone(small(**options))


def test_unknown_release():
    with pytest.raises(ValueError, match=r"name: wants one of \['base'.*got 'huge'"):
        biformer_config("huge")


def test_sizes_that_do_not_divide_say_what_to_do():
    with pytest.raises(ValueError, match="pad_mode"):
        backbone_of(n_win=3, topks=[1, 1, 1, -2])(images(80))
