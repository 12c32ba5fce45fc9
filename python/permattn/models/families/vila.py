"""VILA, LongVILA and NVILA: the decoder is `model.llm`; every frame ends with a newline.

`llava_llama` is also the type of LLaVA-NeXT code over a Llama; only VILA's config has `llm_cfg`.
"""

from __future__ import annotations

from typing import Any

from permattn.models.layout import Family
from permattn.models.splice import LlavaSplice, VilaSplice, newlines_of

MODEL_TYPES = ("llava_llama", "vila")


def family(config: Any) -> Family:
    """What a config of these model types says about its tokens."""
    if getattr(config, "llm_cfg", None) is None:
        return Family(splice=LlavaSplice(newlines_of(config)))
    return Family(decoder="llm", splice=VilaSplice())
