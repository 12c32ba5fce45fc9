"""Attention masks of diffusion transformers, as which text tokens are seen."""

from __future__ import annotations

from torch import Tensor

from permattn.models.diffusion.call import TransformerCall
from permattn.models.diffusion.family import DiffusionFamily


class NotPadding(ValueError):
    """A mask that says more than which text tokens are padding."""


def text_visible_of(
    mask: Tensor | None, call: TransformerCall, family: DiffusionFamily
) -> Tensor | None:
    """bool [B, text tokens], or None where every token is seen.

    Args:
        mask: bool [B, S] or [B, 1, 1, S], True = seen, as HunyuanVideo and Qwen-Image make them:
            of padded text. Its vision part is not read.

    Raises:
        NotPadding: any other mask.
    """
    if mask is None:
        return None
    is_keys = mask.dim() == 2 or (mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1)
    if mask.dtype.is_floating_point or not is_keys or mask.shape[-1] != call.num_tokens:
        raise NotPadding(f"a mask {mask.dtype} {list(mask.shape)} that is not one of padded text")
    if call.num_text_tokens == 0:
        raise NotPadding("a mask where there is no text")
    keys = mask.flatten(1).bool()
    if family.text == "prefix":
        return keys[:, : call.num_text_tokens]
    return keys[:, call.num_vision_tokens :]
