"""Gemma 3: image tokens see each other both ways, which no causal plan says: prompts with images
run dense, and `handle.stats` counts why. Text alone is sparse in the layers without a window.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

from permattn.models.frames import FixedFrames
from permattn.models.layout import Family

MODEL_TYPES = ("gemma3",)


def family(config: Any) -> Family:
    """What a config of these model types says about its tokens."""
    side = isqrt(config.mm_tokens_per_image)
    return Family(
        image_token=config.image_token_id,
        frames=FixedFrames(side, side, as_images=True),
    )
