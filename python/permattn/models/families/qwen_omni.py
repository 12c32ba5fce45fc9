"""The thinkers of Qwen2.5-Omni and Qwen3-Omni: audio beside video, or cut in between its frames."""

from __future__ import annotations

from typing import Any

from permattn.models.frames import GridPerVideo
from permattn.models.layout import Family

MODEL_TYPES = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")


def family(config: Any) -> Family:
    """What a config of these model types says about its tokens."""
    return Family(
        image_token=config.image_token_id,
        video_token=config.video_token_id,
        audio_token=config.audio_token_id,
        frames=GridPerVideo(merge=config.vision_config.spatial_merge_size),
    )
