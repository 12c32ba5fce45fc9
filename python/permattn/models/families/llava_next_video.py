"""LLaVA-NeXT-Video: frames pooled by `spatial_pool_stride`, nothing between or after them."""

from __future__ import annotations

from typing import Any

from permattn.models.frames import FixedFrames
from permattn.models.layout import Family

MODEL_TYPES = ("llava_next_video",)


def family(config: Any) -> Family:
    """What a config of these model types says about its tokens."""
    patches = config.vision_config.image_size // config.vision_config.patch_size
    side = patches // config.spatial_pool_stride
    return Family(
        image_token=config.image_token_id,
        video_token=config.video_token_id,
        frames=FixedFrames(side, side),
    )
