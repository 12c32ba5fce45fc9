"""LLaVA-OneVision: frames pooled by two (rounded up), one newline token after the last frame.

Images are tiled into grids of many resolutions with newlines inside; they count as text.
"""

from __future__ import annotations

from typing import Any

from permattn.models.frames import FixedFrames
from permattn.models.layout import Family

MODEL_TYPES = ("llava_onevision",)


def family(config: Any) -> Family:
    """What a config of these model types says about its tokens."""
    patches = config.vision_config.image_size // config.vision_config.patch_size
    side = -(-patches // 2)
    return Family(
        image_token=config.image_token_id,
        video_token=config.video_token_id,
        frames=FixedFrames(side, side, tail=1),
    )
