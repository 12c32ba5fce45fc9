"""Pure data: what the tokens are, how they are permuted, which key blocks a query block sees."""

from permattn.core.block_index import BlockIndex
from permattn.core.geometry import Segment, TokenGrid, TokenRun, rank_of_visual_token
from permattn.core.permutation import Permutation
from permattn.core.plan import AttnPart, AttnPlan, TokenBand
from permattn.core.problem import BwdArgs, FwdArgs, Problem
from permattn.core.quant import QuantSpec

__all__ = [
    "AttnPart",
    "AttnPlan",
    "BlockIndex",
    "BwdArgs",
    "FwdArgs",
    "Permutation",
    "Problem",
    "QuantSpec",
    "Segment",
    "TokenBand",
    "TokenGrid",
    "TokenRun",
    "rank_of_visual_token",
]
