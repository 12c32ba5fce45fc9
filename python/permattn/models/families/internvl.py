"""InternVL: every video frame is written as an image ("Frame3: <img>...</img>").

A video and a series of single-tile images look alike in the prompt; both form a grid. Two videos
side by side become one: `handle.layout(rows)` says it exactly.
"""

from __future__ import annotations

from typing import Any

from permattn.models.frames import FixedFrames
from permattn.models.layout import Family

MODEL_TYPES = ("internvl",)


def family(config: Any) -> Family:
    """What a config of these model types says about its tokens."""
    vision = config.vision_config
    height, width = (
        int(size // patch * config.downsample_ratio)
        for size, patch in zip(vision.image_size, vision.patch_size, strict=True)
    )
    return Family(
        image_token=config.image_token_id,
        frames=FixedFrames(height, width, as_images=True),
    )
