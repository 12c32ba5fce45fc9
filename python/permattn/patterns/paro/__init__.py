"""PAROAttention: token reordering, static block masks, quantised attention for diffusion."""

from permattn.patterns.paro.bits import pack_bits, unpack_bits
from permattn.patterns.paro.offline import TEXT_PLACES, ParoOrigin, ParoPlan, TextPlace
from permattn.patterns.paro.plan import plan_paro, vision_tokens

__all__ = [
    "TEXT_PLACES",
    "ParoOrigin",
    "ParoPlan",
    "TextPlace",
    "pack_bits",
    "plan_paro",
    "unpack_bits",
    "vision_tokens",
]
