"""permattn: fast sparse attention for long visual prompts. See README.md and docs/."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from permattn._version import __version__
from permattn.api import (
    permute_tokens,
    scaled_dot_product_attention,
    sparse_attention,
    sparse_attention_with_lse,
)
from permattn.bilevel import (
    bilevel_routing_attention,
    regional_routing_attention,
    route_regions,
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
from permattn.core.prologue import Prologue, RowTransform
from permattn.patterns.bilevel import plan_bilevel
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
from permattn.patterns.paro import ParoPlan, plan_paro
from permattn.patterns.xattention import plan_xattention
from permattn.plan_file import load_plan, save_plan

if TYPE_CHECKING:
    from permattn import paro
    from permattn.models import patch, unpatch
    from permattn.models.diffusion import apply_paro

__all__ = [
    "AttnPart",
    "AttnPlan",
    "BlockIndex",
    "HeadPattern",
    "ParoPlan",
    "Permutation",
    "Prologue",
    "QuantSpec",
    "RowTransform",
    "TokenBand",
    "TokenGrid",
    "TokenRun",
    "__version__",
    "apply_paro",
    "bilevel_routing_attention",
    "load_plan",
    "paro",
    "patch",
    "permute_tokens",
    "plan_a_shape",
    "plan_bilevel",
    "plan_dense",
    "plan_flexprefill",
    "plan_grid_prefill",
    "plan_paro",
    "plan_prefill",
    "plan_tri_shape",
    "plan_vertical_slash",
    "plan_xattention",
    "regional_routing_attention",
    "route_regions",
    "save_plan",
    "scaled_dot_product_attention",
    "sparse_attention",
    "sparse_attention_with_lse",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    """What imports a model library, which costs seconds, on first use."""
    if name in ("patch", "unpatch"):
        from permattn import models

        return getattr(models, name)
    if name == "apply_paro":
        from permattn.models import diffusion

        return diffusion.apply_paro
    if name == "paro":
        return import_module("permattn.paro")
    raise AttributeError(f"module 'permattn' has no attribute {name!r}")
