"""VideoLLaMA3: a timestamp before every frame; sizes come with a merge size per image and video.

Where the processor drops tokens of still frames (`video_compression_mask`), no grid is left and the
prompt runs dense.
"""

from __future__ import annotations

from typing import Any

from permattn.models.frames import GridPerVideo
from permattn.models.layout import Family

MODEL_TYPES = ("video_llama_3",)


def family(config: Any) -> Family:
    """What a config of these model types says about its tokens."""
    return Family(
        image_token=config.image_token_id,
        video_token=config.video_token_id,
        # The hooks divide every size by its own merge size.
        frames=GridPerVideo(merge=1),
    )
