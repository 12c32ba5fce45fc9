"""permattn: fast sparse attention for long visual prompts. See README.md and docs/."""

from permattn._version import __version__
from permattn.api import (
    permute_tokens,
    scaled_dot_product_attention,
    sparse_attention,
    sparse_attention_with_lse,
)
from permattn.core import (
    AttnPart,
    AttnPlan,
    BlockIndex,
    Permutation,
    QuantSpec,
    TextRun,
    TokenBand,
    TokenGrid,
)

__all__ = [
    "AttnPart",
    "AttnPlan",
    "BlockIndex",
    "Permutation",
    "QuantSpec",
    "TextRun",
    "TokenBand",
    "TokenGrid",
    "__version__",
    "permute_tokens",
    "scaled_dot_product_attention",
    "sparse_attention",
    "sparse_attention_with_lse",
]
