"""GLM-4V: every frame of a video is written with image tokens, a timestamp behind it.

Only `mm_token_type_ids` tell videos and images apart, and the models ask for them themselves.
"""

from __future__ import annotations

from typing import Any

from permattn.models.frames import GridPerVideo
from permattn.models.layout import Family

MODEL_TYPES = ("glm4v", "glm4v_moe", "glm46v", "glm_ocr")


def family(config: Any) -> Family:
    """What a config of these model types says about its tokens."""
    return Family(
        image_token=config.image_token_id,
        video_token=config.video_token_id,
        frames=GridPerVideo(merge=config.vision_config.spatial_merge_size),
    )
