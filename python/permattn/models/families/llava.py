"""LLaVA-1.5: frames written as images."""

from __future__ import annotations

from typing import Any

from permattn.models.frames import FixedFrames
from permattn.models.layout import Family

MODEL_TYPES = ("llava",)


def family(config: Any) -> Family:
    """What a config of these model types says about its tokens."""
    vision = config.vision_config
    # Pixtral towers take images of any size: nothing here is fixed.
    if "pixtral" in vision.model_type:
        return Family(image_token=config.image_token_id)
    side = vision.image_size // vision.patch_size
    has_class_token = (
        config.vision_feature_select_strategy == "full" and "clip" in vision.model_type
    )
    return Family(
        image_token=config.image_token_id,
        frames=FixedFrames(side, side, head=int(has_class_token), as_images=True),
    )
