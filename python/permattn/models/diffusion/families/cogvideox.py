"""CogVideoX: text in front of the video, in one self-attention."""

from __future__ import annotations

from typing import Any

from permattn.models.diffusion.family import DiffusionFamily, Inputs, Size


def _grid(model: Any, inputs: Inputs) -> Size:
    _, frames, _, height, width = inputs["hidden_states"].shape
    config = model.config
    patch, frames_per_patch = config.patch_size, config.patch_size_t or 1
    return -(-frames // frames_per_patch), height // patch, width // patch


FAMILY = DiffusionFamily(
    classes=("CogVideoXTransformer3DModel",),
    processors=("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"),
    blocks=("transformer_blocks",),
    attention="attn1",
    grid=_grid,
    text="prefix",
)
