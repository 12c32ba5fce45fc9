"""permattn: fast sparse attention for long visual prompts. See README.md and docs/."""

from typing import TYPE_CHECKING, Any

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
    TokenBand,
    TokenGrid,
    TokenRun,
)
from permattn.patterns.dense import plan_dense
from permattn.patterns.flexprefill import plan_flexprefill
from permattn.patterns.mminference import (
    HeadPattern,
    plan_a_shape,
    plan_grid_prefill,
    plan_prefill,
    plan_tri_shape,
    plan_vertical_slash,
)
from permattn.patterns.xattention import plan_xattention
from permattn.plan_file import load_plan, save_plan

if TYPE_CHECKING:
    from permattn.models import patch, unpatch

__all__ = [
    "AttnPart",
    "AttnPlan",
    "BlockIndex",
    "HeadPattern",
    "Permutation",
    "QuantSpec",
    "TokenBand",
    "TokenGrid",
    "TokenRun",
    "__version__",
    "load_plan",
    "patch",
    "permute_tokens",
    "plan_a_shape",
    "plan_dense",
    "plan_flexprefill",
    "plan_grid_prefill",
    "plan_prefill",
    "plan_tri_shape",
    "plan_vertical_slash",
    "plan_xattention",
    "save_plan",
    "scaled_dot_product_attention",
    "sparse_attention",
    "sparse_attention_with_lse",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    """`patch` and `unpatch` on first use: they import transformers, which costs seconds."""
    if name in ("patch", "unpatch"):
        from permattn import models

        return getattr(models, name)
    raise AttributeError(f"module 'permattn' has no attribute {name!r}")
