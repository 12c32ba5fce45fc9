"""Qwen-Image: text, padded and masked, in front of one image."""

from __future__ import annotations

from typing import Any

from permattn.models.diffusion.family import DiffusionFamily, Inputs, NotOneGrid, Size


def _grid(model: Any, inputs: Inputs) -> Size:
    shapes = {
        tuple(map(tuple, s)) if isinstance(s, list) else (tuple(s),) for s in _samples(inputs)
    }
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise NotOneGrid(f"img_shapes: wants one image a sample, alike in all, got {shapes}")
    frames, height, width = next(iter(shapes))[0]
    return int(frames), int(height), int(width)


def _samples(inputs: Inputs) -> list:
    shapes = inputs["img_shapes"]
    if not shapes:
        raise NotOneGrid("img_shapes: wants a shape, got none")
    return list(shapes)


FAMILY = DiffusionFamily(
    classes=("QwenImageTransformer2DModel",),
    processors=("QwenDoubleStreamAttnProcessor2_0",),
    blocks=("transformer_blocks",),
    attention="attn",
    grid=_grid,
    text="prefix",
    timesteps_per_sigma=1.0,
)
