"""Ovis2: every frame is written as an image between two indicator tokens."""

from __future__ import annotations

from typing import Any

from permattn.models.frames import FixedFrames
from permattn.models.layout import Family

MODEL_TYPES = ("ovis2",)


def family(config: Any) -> Family:
    """What a config of these model types says about its tokens."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size // vision.hidden_stride
    return Family(
        image_token=config.image_token_id,
        frames=FixedFrames(side, side, as_images=True),
    )
