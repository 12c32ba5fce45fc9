"""Qwen2.5-Omni and Qwen3-Omni: audio beside video, or cut in between its frames.

The thinker alone is patched, in a whole model too: the talker speaks what the thinker has said.
"""

from __future__ import annotations

from typing import Any

from permattn.models.frames import GridPerVideo
from permattn.models.layout import Family

MODEL_TYPES = (
    "qwen2_5_omni",
    "qwen2_5_omni_thinker",
    "qwen3_omni_moe",
    "qwen3_omni_moe_thinker",
)


def family(config: Any) -> Family:
    """What a config of these model types says about its tokens."""
    thinker = getattr(config, "thinker_config", None)
    tokens = config if thinker is None else thinker
    return Family(
        image_token=tokens.image_token_id,
        video_token=tokens.video_token_id,
        audio_token=tokens.audio_token_id,
        frames=GridPerVideo(merge=tokens.vision_config.spatial_merge_size),
        decoder=None if thinker is None else "thinker",
    )
