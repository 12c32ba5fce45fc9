"""BiFormer in transformers: a backbone and a classifier. Importing this module registers them.

    import permattn.models.vision.transformers_models
    config = AutoConfig.for_model("permattn_biformer", out_features=["stage2", "stage4"])
    backbone = AutoBackbone.from_config(config)

Needs transformers >= 5.20 (`pip install 'permattn[transformers]'`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutputWithNoAttention

from permattn.models.vision.attention import PAD_MODES
from permattn.models.vision.biformer import BiFormer, Block
from permattn.models.vision.features import FourStageNet, check_four
from permattn.models.vision.stl import BiFormerSTL, NchwSTLBlock, STLBlock

__all__ = [
    "BiFormerBackbone",
    "BiFormerConfig",
    "BiFormerForImageClassification",
    "biformer_config",
]

MODEL_TYPE = "permattn_biformer"
NETWORKS = ("biformer", "stl", "stl_nchw")
# What the released models differ in.
_RELEASED: dict[str, dict[str, Any]] = {
    "tiny": {"depths": [2, 2, 8, 2], "dims": [64, 128, 256, 512]},
    "small": {"depths": [4, 4, 18, 4], "dims": [64, 128, 256, 512]},
    "base": {"depths": [4, 4, 18, 4], "dims": [96, 192, 384, 768]},
    "stl": {"network": "stl", "depths": [2, 2, 6, 2], "dims": [96, 192, 384, 768]},
    "stl_nchw": {"network": "stl_nchw", "depths": [2, 2, 6, 2], "dims": [96, 192, 384, 768]},
}


class BiFormerConfig(BackboneConfigMixin, PreTrainedConfig):
    """The config of a BiFormer; the defaults are those of BiFormer-T.

    Args:
        network: "biformer", "stl" or "stl_nchw": `BiFormer`, or `BiFormerSTL` in one of its
            layouts.
        num_channels: channels of the image.
        depths, dims, head_dim, n_win, side_dwconv, drop_path_rate, drop_rate, pad_mode, backend:
            see `permattn.models.vision.BiFormer`. Four numbers each for depths and dims.
        mlp_ratios, topks: the same; None = those of the released network.
        attention: further keyword arguments of `BiLevelRoutingAttention`, only of "biformer".
        extra_norms: a LayerNorm for each map of a backbone, as released detectors and segmenters
            have it; no part of a classifier.
        initializer_range: standard deviation with which linear layers start.
        out_features, out_indices: the maps of a backbone: "stem", "stage1" to "stage4", or their
            numbers 0 to 4.

    Raises:
        ValueError: an option that does not fit; names it.
    """

    model_type = MODEL_TYPE
    attribute_map: ClassVar[dict[str, str]] = {"hidden_sizes": "dims"}

    network: str = "biformer"
    num_channels: int = 3
    depths: list[int] | tuple[int, ...] = (2, 2, 8, 2)
    dims: list[int] | tuple[int, ...] = (64, 128, 256, 512)
    head_dim: int = 32
    mlp_ratios: list[float] | tuple[float, ...] | None = None
    topks: list[int] | tuple[int, ...] | None = None
    n_win: int | list[int] | tuple[int, ...] = 7
    side_dwconv: int = 5
    drop_path_rate: float = 0.0
    drop_rate: float = 0.0
    pad_mode: str | None = None
    backend: str = "auto"
    attention: dict[str, Any] | None = None
    extra_norms: bool = True
    initializer_range: float = 0.02
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.network not in NETWORKS:
            raise ValueError(f"network: wants one of {NETWORKS}, got {self.network!r}")
        if self.pad_mode not in PAD_MODES:
            raise ValueError(f"pad_mode: wants one of {PAD_MODES}, got {self.pad_mode!r}")
        if self.attention and self.network != "biformer":
            raise ValueError(f"attention: only of network 'biformer', got {self.network!r}")
        if not 0.0 <= self.initializer_range < math.inf:
            raise ValueError(f"initializer_range: wants a deviation, got {self.initializer_range}")
        check_four(depths=self.depths, dims=self.dims)
        check_four(**{k: v for k in ("mlp_ratios", "topks") if (v := getattr(self, k)) is not None})
        self.stage_names = ["stem", "stage1", "stage2", "stage3", "stage4"]
        indices = kwargs.pop("out_indices", None)
        if indices is not None and any(not -5 <= i < 5 for i in indices):
            raise ValueError(f"out_indices: wants -5 to 4, of {self.stage_names}, got {indices}")
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=indices
        )
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Channels of the last map."""
        return self.dims[-1]

    def build(self, num_classes: int = 0, extra_norms: bool = False) -> FourStageNet:
        """The network that this config describes, with new weights."""
        options: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                *("depths", "dims", "head_dim", "n_win", "side_dwconv", "drop_path_rate"),
                *("drop_rate", "pad_mode", "backend"),
            )
        }
        for name in ("mlp_ratios", "topks"):
            if getattr(self, name) is not None:
                options[name] = getattr(self, name)
        options.update(in_chans=self.num_channels, num_classes=num_classes, extra_norms=extra_norms)
        if self.network == "biformer":
            return BiFormer(attention=self.attention, **options)
        return BiFormerSTL(layout="nchw" if self.network == "stl_nchw" else "nhwc", **options)


def biformer_config(name: str, **options: Any) -> BiFormerConfig:
    """The config of a released model.

    Args:
        name: "tiny", "small", "base", "stl" or "stl_nchw".
        options: of `BiFormerConfig`, and transformers' own: num_labels, id2label, ...

    Raises:
        ValueError: another name, or options that do not fit.
    """
    if name not in _RELEASED:
        raise ValueError(f"name: wants one of {sorted(_RELEASED)}, got {name!r}")
    return BiFormerConfig(**{**_RELEASED[name], **options})


class BiFormerPreTrainedModel(PreTrainedModel):
    """What the backbone and the classifier share: a network under the name `biformer`."""

    config: BiFormerConfig
    # Stated, since transformers would read the annotation, which is a string here.
    config_class = BiFormerConfig
    base_model_prefix = "biformer"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _no_split_modules = [  # noqa: RUF012
        Block.__name__,
        STLBlock.__name__,
        NchwSTLBlock.__name__,
    ]

    biformer: FourStageNet
    gradient_checkpointing = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the networks start, for weights that a checkpoint lacks."""
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.Conv2d, nn.Conv3d)):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] | None = None,
        every_n_layers: int = 1,
    ) -> None:
        if every_n_layers != 1:
            raise NotImplementedError(f"every_n_layers: wants 1, got {every_n_layers}")
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            # An image asks for no gradient, and so the stem would get none.
            raise ValueError("use_reentrant: wants False, got True")
        self.gradient_checkpointing = enable
        self.biformer.set_grad_checkpointing(enable, gradient_checkpointing_func)


class BiFormerBackbone(BackboneMixin, BiFormerPreTrainedModel):
    """Maps of a BiFormer at strides 4, 8, 16 and 32, for transformers' detectors and segmenters."""

    has_attentions = False
    # Of a classifier's checkpoint.
    _keys_to_ignore_on_load_unexpected = [r"^biformer\.(head|norm)\."]  # noqa: RUF012

    def __init__(self, config: BiFormerConfig) -> None:
        super().__init__(config)
        self.num_features = [config.dims[0], *config.dims]
        self.biformer = config.build(extra_norms=config.extra_norms)
        # Only a classifier's: a map has its own norm, or none.
        self.biformer.norm = nn.Identity()
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BackboneOutput | tuple[Any, ...]:
        """The maps that `config.out_features` names.

        Args:
            pixel_values: [B, num_channels, H, W].
            output_hidden_states: also all maps, not normed.

        Raises:
            ValueError: attention maps are asked for, which are never made.
        """
        if output_attentions:
            raise ValueError("output_attentions: wants False, the matrices are never made")
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        net = self.biformer
        x = net.downsample(pixel_values, 0)
        maps, normed = [x], [x]
        for stage in range(len(net.stages)):
            x = net.forward_blocks(x if stage == 0 else net.downsample(x, stage), stage)
            maps.append(x)
            normed.append(x if net.extra_norms is None else net.extra_norms[stage](x))
        chosen: Any = tuple(normed[self.stage_names.index(name)] for name in self.out_features)
        hidden = tuple(maps) if output_hidden_states else None
        if not return_dict:
            return (chosen,) if hidden is None else (chosen, hidden)
        return BackboneOutput(feature_maps=chosen, hidden_states=hidden)


class BiFormerForImageClassification(BiFormerPreTrainedModel):
    """A BiFormer with its head: logits of `config.num_labels` classes, and a loss."""

    # The loss is a mean over the batch, whatever the trainer accumulates.
    accepts_loss_kwargs = False
    # Of a backbone's checkpoint.
    _keys_to_ignore_on_load_unexpected = [r"^biformer\.extra_norms\."]  # noqa: RUF012

    def __init__(self, config: BiFormerConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels or 0
        self.biformer = config.build(num_classes=self.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutputWithNoAttention | tuple[Any, ...]:
        """Logits, and a loss where there are labels.

        Args:
            pixel_values: [B, num_channels, H, W].
            labels: int64 [B]; or what `config.problem_type` says.
            output_hidden_states: also the maps of the four stages.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        last, maps = self.biformer.forward_intermediates(pixel_values)
        logits = self.biformer.forward_head(last)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        hidden = tuple(maps) if output_hidden_states else None
        if not return_dict:
            return tuple(x for x in (loss, logits, hidden) if x is not None)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=hidden)


AutoConfig.register(MODEL_TYPE, BiFormerConfig, exist_ok=True)
AutoBackbone.register(BiFormerConfig, BiFormerBackbone, exist_ok=True)
AutoModelForImageClassification.register(
    BiFormerConfig, BiFormerForImageClassification, exist_ok=True
)
