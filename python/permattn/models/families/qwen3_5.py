"""Qwen3.5, dense and mixture-of-experts: timestamps stand between the frames of a video.

Linear-attention layers have no softmax and stay as they are.
"""

from __future__ import annotations

from typing import Any

from permattn.models.frames import GridPerVideo
from permattn.models.layout import Family

MODEL_TYPES = ("qwen3_5", "qwen3_5_moe")


def family(config: Any) -> Family:
    """What a config of these model types says about its tokens."""
    return Family(
        image_token=config.image_token_id,
        video_token=config.video_token_id,
        frames=GridPerVideo(merge=config.vision_config.spatial_merge_size),
    )
