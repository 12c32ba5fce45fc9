"""Networks of four stages: classification, feature maps, and the protocol that timm expects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from permattn.models.vision.layers import LayerNorm2d

GlobalPool = Literal["avg", "max", ""]
# Strides of the four maps.
STRIDES = (4, 8, 16, 32)


class FourStageNet(nn.Module):
    """A stem and three downsamplings, each before a stage of blocks; then a norm, a mean, a head.

    The protocol of timm's models without timm: `feature_info`, `forward_features`, `forward_head`,
    `forward_intermediates`, `prune_intermediate_layers`, `reset_classifier`, and so on.

    Args:
        dims: channels of the stages.
        in_chans: channels of the image.
        num_classes: classes; 0 = no head.
        global_pool: "avg", "max", or "" (a map in place of a vector; wants num_classes 0).
        drop_rate: dropout before the head.
        extra_norms: as detectors and segmenters have it: a LayerNorm2d for each of the four maps,
            no final norm and no head, whatever num_classes says.

    Attributes:
        num_features, head_hidden_size: channels of the last map.
        feature_info: a dict num_chs, reduction, module for each map.
    """

    downsample_layers: nn.ModuleList
    stages: nn.ModuleList
    global_pool: GlobalPool

    def __init__(
        self,
        dims: Sequence[int],
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: GlobalPool = "avg",
        drop_rate: float = 0.0,
        extra_norms: bool = False,
    ) -> None:
        super().__init__()
        _check_dims(dims)
        if in_chans < 1:
            raise ValueError(f"in_chans: wants at least 1, got {in_chans}")
        if not 0.0 <= drop_rate < 1.0:
            raise ValueError(f"drop_rate: wants 0 <= rate < 1, got {drop_rate}")
        self.dims, self.in_chans = tuple(dims), in_chans
        self.num_features = self.head_hidden_size = self.dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": stride, "module": f"stages.{i}"}
            for i, (dim, stride) in enumerate(zip(self.dims, STRIDES, strict=True))
        ]
        self.set_grad_checkpointing(False)
        self.downsample_layers, self.stages = nn.ModuleList(), nn.ModuleList()
        self.norm: nn.Module = nn.Identity() if extra_norms else nn.BatchNorm2d(self.dims[-1])
        self.extra_norms = nn.ModuleList(LayerNorm2d(d) for d in self.dims) if extra_norms else None
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(0 if extra_norms else num_classes, global_pool)

    def blocks(self, stage: int) -> Iterator[nn.Module]:
        """The blocks of a stage, in order."""
        raise NotImplementedError

    def forward_stage(self, x: Tensor, stage: int) -> Tensor:
        """Downsamples and runs the blocks of a stage: the next [B, C, H, W] map."""
        return self.forward_blocks(self.downsample(x, stage), stage)

    def downsample(self, x: Tensor, stage: int) -> Tensor:
        """The map that the blocks of a stage begin with; stage 0 takes the image."""
        return self._run(self.downsample_layers[stage], self._image(x) if stage == 0 else x)

    def forward_blocks(self, x: Tensor, stage: int) -> Tensor:
        """Runs the blocks of a stage."""
        for block in self.blocks(stage):
            x = self._run(block, x)
        return x

    def _run(self, module: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return self._checkpoint(module, x)
        return module(x)

    def _image(self, x: Tensor) -> Tensor:
        """The image, checked, channels last in memory: so every map of the network is."""
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"x: wants [B, {self.in_chans}, H, W], got shape {list(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"x: wants a floating dtype, got {x.dtype}")
        return x.contiguous(memory_format=torch.channels_last)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> the last map [B, C, H / 32, W / 32], normed."""
        for stage in range(len(self.stages)):
            x = self.forward_stage(x, stage)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map -> logits [B, num_classes], or what the head sees."""
        if self.global_pool == "avg":
            x = x.mean((2, 3))
        elif self.global_pool == "max":
            x = x.amax((2, 3))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def features(self, x: Tensor) -> tuple[Tensor, ...]:
        """The maps of all stages, strides 4, 8, 16 and 32, for a detector or a segmenter.

        Each is [B, C, H, W], normed by its `extra_norms` where the network has them.
        """
        normed = self.extra_norms is not None
        return tuple(self.forward_intermediates(x, norm=normed, intermediates_only=True))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The last map beside the maps of chosen stages.

        Args:
            x: [B, in_chans, H, W].
            indices: stages, from the end where negative; a number = the last so many; None = all.
            norm: maps normed by `extra_norms`, or the last one by the final norm.
            stop_early: do not run stages behind the last chosen one.
            output_fmt: "NCHW", or "NHWC" for views with the channels last.
            intermediates_only: only the list of maps.

        Returns: (the last map that ran, normed where it is the network's last; maps by stage), or
        the maps.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt: wants 'NCHW' or 'NHWC', got {output_fmt!r}")
        chosen = take_indices(len(self.stages), indices)
        count = max(chosen) + 1 if stop_early or intermediates_only else len(self.stages)
        maps = []
        for stage in range(count):
            x = self.forward_stage(x, stage)
            if stage in chosen:
                maps.append(self._normed(x, stage) if norm else x)
        if output_fmt == "NHWC":
            maps = [m.permute(0, 2, 3, 1) for m in maps]
        if intermediates_only:
            return maps
        return (self.norm(x) if count == len(STRIDES) else x), maps

    def _normed(self, x: Tensor, stage: int) -> Tensor:
        if self.extra_norms is not None:
            return self.extra_norms[stage](x)
        return self.norm(x) if stage == len(STRIDES) - 1 else x

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Removes what the maps of the chosen stages do not need; returns the stages kept."""
        chosen = take_indices(len(self.stages), indices)
        count = max(chosen) + 1
        cut = count < len(self.stages)
        self.stages, self.downsample_layers = self.stages[:count], self.downsample_layers[:count]
        if self.extra_norms is not None:
            self.extra_norms = None if prune_norm else self.extra_norms[:count]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if cut:
            self.num_features = self.head_hidden_size = self.dims[count - 1]
        if prune_head or cut:
            self.reset_classifier(0, "")
        return chosen

    def get_classifier(self) -> nn.Module:
        """The head: Linear, or Identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: GlobalPool | None = None) -> None:
        """Puts a new head; 0 classes = none. None keeps the pooling."""
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in ("avg", "max", ""):
            raise ValueError(f"global_pool: wants 'avg', 'max' or '', got {pool!r}")
        if num_classes < 0:
            raise ValueError(f"num_classes: wants at least 0, got {num_classes}")
        if num_classes and not pool:
            raise ValueError(f"global_pool: '' gives a map, a head of {num_classes} wants a vector")
        self.num_classes, self.global_pool = num_classes, pool
        old = next(self.parameters(), torch.empty(0))
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.num_features, num_classes).to(old.device, old.dtype)
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def set_grad_checkpointing(
        self, enable: bool = True, function: Callable[..., Tensor] | None = None
    ) -> None:
        """Trades time for memory: blocks run again in the backward pass.

        Args:
            function: called as function(module, x); None = torch's checkpoint, not reentrant.
        """
        self.grad_checkpointing = enable
        self._checkpoint = function or partial(checkpoint, use_reentrant=False)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How timm's optimisers group parameters by depth."""
        fine = [
            (r"^stages\.(\d+)\.(?:blocks\.)?(\d+)", None),
            (r"^downsample_layers\.(\d+)", (0,)),
            (r"^(?:norm|extra_norms)", (99999,)),
        ]
        whole = r"^(?:stages|downsample_layers)\.(\d+)"
        return {"stem": r"^downsample_layers\.0", "blocks": whole if coarse else fine}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters, beside biases and norms, without weight decay: none."""
        return set()


def take_indices(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Stages from 0, in the order given: see `FourStageNet.forward_intermediates`.

    Raises:
        ValueError: a stage that is not there.
    """
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        if not 0 < indices <= count:
            raise ValueError(f"indices: wants the last 1 to {count} stages, got {indices}")
        return list(range(count - indices, count))
    chosen = [i + count if i < 0 else i for i in indices]
    if not chosen or min(chosen) < 0 or max(chosen) >= count:
        raise ValueError(f"indices: wants stages {-count} to {count - 1}, got {list(indices)}")
    return chosen


def check_four(**values: Sequence[Any]) -> None:
    """Raises ValueError where an option of the stages does not have four values."""
    for name, value in values.items():
        if len(value) != len(STRIDES):
            raise ValueError(f"{name}: wants 4 values, one per stage, got {tuple(value)}")


def _check_dims(dims: Sequence[int]) -> None:
    check_four(dims=dims)
    if min(dims) < 1:
        raise ValueError(f"dims: wants channels >= 1, got {tuple(dims)}")
