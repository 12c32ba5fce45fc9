"""Video-LLaVA: eight frames, each with a class token before its grid."""

from __future__ import annotations

from typing import Any

from permattn.models.frames import FixedFrames
from permattn.models.layout import Family

MODEL_TYPES = ("video_llava",)


def family(config: Any) -> Family:
    """What a config of these model types says about its tokens."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return Family(
        image_token=config.image_token_id,
        video_token=config.video_token_id,
        frames=FixedFrames(side, side, head=1),
    )
