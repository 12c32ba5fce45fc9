"""BiFormer by name in timm. Importing this module registers the names.

    import permattn.models.vision.timm_models
    model = timm.create_model("permattn_biformer_tiny", num_classes=10)

Needs timm >= 1.0.20 (`pip install 'permattn[timm]'`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from torch import Tensor

from permattn.models.vision.biformer import biformer_base, biformer_small, biformer_tiny
from permattn.models.vision.checkpoint import listed_names
from permattn.models.vision.features import FourStageNet
from permattn.models.vision.stl import biformer_stl, biformer_stl_nchw

__all__ = [
    "permattn_biformer_base",
    "permattn_biformer_small",
    "permattn_biformer_stl",
    "permattn_biformer_stl_nchw",
    "permattn_biformer_tiny",
]

# The evaluation of the released code: bicubic, 256 pixels, the middle 224, ImageNet's mean and
# deviation, which are timm's defaults.
_CFG = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "first_conv": "downsample_layers.0.0",
    "classifier": "head",
    "origin_url": "https://github.com/rayleizhu/BiFormer",
    "paper_ids": "arXiv:2303.08810",
}

default_cfgs = generate_default_cfgs({name: dict(_CFG) for name in __all__})


def _build(make: Callable[..., FourStageNet], name: str, pretrained: bool, options: Any) -> Any:
    """A network, or timm's wrapper that returns its maps.

    Raises:
        ValueError: pretrained without a source of weights; weights of another network.
        TypeError: img_size, which no network here has.
    """
    if "img_size" in options:
        raise TypeError(
            f"img_size: not an argument of {name}, which runs at any size; where n_win does not "
            "divide its maps, pad_mode says what happens"
        )
    if pretrained:
        _check_source(name, options.get("pretrained_cfg"), options.get("pretrained_cfg_overlay"))
    features: dict[str, Any] = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
    # Else the wrapper would drop the norms that were asked for.
    features["norm"] = bool(options.get("extra_norms"))
    return build_model_with_cfg(
        *(make, name, pretrained),
        feature_cfg=features,
        pretrained_filter_fn=_checked_names,
        **options,
    )


def _check_source(name: str, cfg: Any, overlay: Any) -> None:
    held = resolve_pretrained_cfg(name, pretrained_cfg=cfg, pretrained_cfg_overlay=overlay)
    if not (held.has_weights or held.state_dict):
        raise ValueError(
            f"pretrained: {name} has no weights to download; load a local file with "
            "checkpoint_path='weights.pth', or, to change in_chans or num_classes or with "
            "features_only, with pretrained=True, pretrained_cfg_overlay={'file': 'weights.pth'}"
        )


def _checked_names(state: Mapping[str, Tensor], model: FourStageNet) -> Mapping[str, Tensor]:
    """The weights of a file, every name of which fits.

    timm drops the head where the numbers of classes differ, and then loads what it finds without
    a word.
    """
    loose: tuple[str, ...] = ("head.",)
    if model.extra_norms is not None:
        # Other norms than those of a classifier, which start as they are built.
        loose += ("norm.", "extra_norms.")
    own = model.state_dict()
    missing = [x for x in own if x not in state and not x.startswith(loose)]
    unexpected = [x for x in state if x not in own and not x.startswith(loose)]
    if missing or unexpected:
        raise ValueError(
            f"checkpoint: does not fit {type(model).__name__}. missing: {listed_names(missing)}; "
            f"unexpected: {listed_names(unexpected)}"
        )
    return state


@register_model
def permattn_biformer_tiny(pretrained: bool = False, **options: Any) -> Any:
    """BiFormer-T; `options` are timm's and those of `permattn.models.vision.BiFormer`."""
    return _build(biformer_tiny, "permattn_biformer_tiny", pretrained, options)


@register_model
def permattn_biformer_small(pretrained: bool = False, **options: Any) -> Any:
    """BiFormer-S; `options` are timm's and those of `permattn.models.vision.BiFormer`."""
    return _build(biformer_small, "permattn_biformer_small", pretrained, options)


@register_model
def permattn_biformer_base(pretrained: bool = False, **options: Any) -> Any:
    """BiFormer-B; `options` are timm's and those of `permattn.models.vision.BiFormer`."""
    return _build(biformer_base, "permattn_biformer_base", pretrained, options)


@register_model
def permattn_biformer_stl(pretrained: bool = False, **options: Any) -> Any:
    """BiFormer-STL; `options` are timm's and those of `permattn.models.vision.BiFormerSTL`."""
    return _build(biformer_stl, "permattn_biformer_stl", pretrained, options)


@register_model
def permattn_biformer_stl_nchw(pretrained: bool = False, **options: Any) -> Any:
    """BiFormer-STL, channels first; options as of `permattn_biformer_stl`."""
    return _build(biformer_stl_nchw, "permattn_biformer_stl_nchw", pretrained, options)
