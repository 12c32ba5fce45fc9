"""MMInference: grid-pattern, permuted sparse prefill of long-context vision-language models.

Source: "MMInference: Accelerating Pre-filling for Long-Context VLMs via Modality-Aware Permutation
Sparse Attention" (arXiv 2504.16083). See docs/patterns/mminference.md.
"""

from permattn.patterns.mminference.config import HeadPattern
from permattn.patterns.mminference.planner import (
    plan_a_shape,
    plan_grid_prefill,
    plan_prefill,
    plan_tri_shape,
    plan_vertical_slash,
)

__all__ = [
    "HeadPattern",
    "plan_a_shape",
    "plan_grid_prefill",
    "plan_prefill",
    "plan_tri_shape",
    "plan_vertical_slash",
]
