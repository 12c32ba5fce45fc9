"""LTX-Video: text is seen by cross-attention alone."""

from __future__ import annotations

from typing import Any

from permattn.models.diffusion.family import DiffusionFamily, Inputs, Size, grid_of_latents


def _grid(model: Any, inputs: Inputs) -> Size:
    config = model.config
    patch = config.patch_size
    latents = (inputs["num_frames"], inputs["height"], inputs["width"])
    sizes = (config.patch_size_t, patch, patch)
    return grid_of_latents(latents, sizes)


FAMILY = DiffusionFamily(
    classes=("LTXVideoTransformer3DModel",),
    processors=("LTXVideoAttnProcessor",),
    blocks=("transformer_blocks",),
    attention="attn1",
    grid=_grid,
)
