"""HunyuanVideo: the video in front of the text, which is padded and masked."""

from __future__ import annotations

from typing import Any

from permattn.models.diffusion.family import DiffusionFamily, Inputs, Size, grid_of_latents


def _grid(model: Any, inputs: Inputs) -> Size:
    config = model.config
    patch = config.patch_size
    sizes = (config.patch_size_t, patch, patch)
    return grid_of_latents(inputs["hidden_states"].shape[2:], sizes)


FAMILY = DiffusionFamily(
    classes=("HunyuanVideoTransformer3DModel",),
    processors=("HunyuanVideoAttnProcessor2_0",),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    attention="attn",
    grid=_grid,
    text="suffix",
)
