"""VideoChat-Flash: merged visual tokens without a grid, most of which the decoder drops on its way.

Source: OpenGVLab/VideoChat-Flash, `modeling_qwen2_flash.py`. From the first layer of
`llm_compress_layer_list` on, the tokens are not the prompt's any more: these layers run dense.
Copies of its attention that bypass transformers' interface are refused like any other.
"""

from __future__ import annotations

from typing import Any

from permattn.models.layout import Family
from permattn.models.splice import LlavaSplice

MODEL_TYPES = ("videochat_flash_qwen",)


def family(config: Any) -> Family:
    """What a config of these model types says about its tokens."""
    compresses = getattr(config, "mm_llm_compress", True)
    layers = getattr(config, "llm_compress_layer_list", None) or ()
    first = min(layers) if compresses and layers else None
    return Family(splice=LlavaSplice(frames=None), whole_layers=first)
