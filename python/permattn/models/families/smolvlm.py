"""SmolVLM and Idefics3: every frame is written as an image with a timestamp before it.

The tiles of one large image form a series of the same kind: `handle.layout(rows)` says it exactly.
"""

from __future__ import annotations

from typing import Any

from permattn.models.frames import FixedFrames
from permattn.models.layout import Family

MODEL_TYPES = ("smolvlm", "idefics3")


def family(config: Any) -> Family:
    """What a config of these model types says about its tokens."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size // config.scale_factor
    return Family(
        image_token=config.image_token_id,
        frames=FixedFrames(side, side, as_images=True),
    )
