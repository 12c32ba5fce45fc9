"""Wan 2.1 and 2.2 (text, image and control to video), SkyReels-V2."""

from __future__ import annotations

from typing import Any

from permattn.models.diffusion.family import DiffusionFamily, Inputs, Size, grid_of_latents


def _grid(model: Any, inputs: Inputs) -> Size:
    latents = inputs["hidden_states"].shape[2:]
    return grid_of_latents(latents, model.config.patch_size)


# Text is seen by cross-attention, which stays as it is; so do the control blocks of VACE.
FAMILY = DiffusionFamily(
    classes=(
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "SkyReelsV2Transformer3DModel",
    ),
    processors=("WanAttnProcessor", "SkyReelsV2AttnProcessor"),
    blocks=("blocks",),
    attention="attn1",
    grid=_grid,
)
