"""What a plan must compute, from bits and orders token by token, without permattn's planner."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import torch
from permattn.core.axis_order import AXIS_ORDERS
from permattn.patterns.paro import ParoPlan
from torch import Tensor

from .tiny import Case


def visible_pairs(plan: ParoPlan, layer: int, bin: int, num_text: int) -> Tensor:
    """bool [H, S, S]: which key every query sees."""
    count = plan.num_vision_tokens
    heads = []
    for head in range(plan.num_heads):
        name = AXIS_ORDERS[int(plan.axis_orders[layer, head])]
        cells = list(product(*(range(n) for n in plan.grid)))
        axes = ["FHW".index(axis) for axis in name]
        order = sorted(range(count), key=lambda c: [cells[c][axis] for axis in axes])
        block = np.empty(count, dtype=int)
        block[order] = np.arange(count) // plan.block[0]
        columns = plan.mask_shape[1]
        bits = np.unpackbits(plan.packed_masks[bin, layer, head].numpy(), bitorder="little")
        vision = bits[block[:, None] * columns + block[None]].astype(bool)
        seen = np.ones((count + num_text,) * 2, dtype=bool)
        start = num_text if plan.text == "prefix" else 0
        seen[start : start + count, start : start + count] = vision
        heads.append(torch.from_numpy(seen))
    return torch.stack(heads)


def masked_sdpa(
    case: Case, plan: ParoPlan, bin: int, *, exact: bool
) -> tuple[Callable[..., Tensor], list[int]]:
    """A stand-in for torch's SDPA that masks self-attention as a plan does, layer after layer.

    Args:
        exact: compute in float64.

    Returns: (the function, the layers that it has seen).
    """
    real = torch.nn.functional.scaled_dot_product_attention
    tokens = plan.num_vision_tokens + case.num_text
    layers: list[int] = []

    def sdpa(query: Tensor, key: Tensor, value: Tensor, attn_mask=None, **rest) -> Tensor:
        if query.shape[2] != tokens or key.shape[2] != tokens:
            return real(query, key, value, attn_mask=attn_mask, **rest)
        seen = visible_pairs(plan, len(layers), bin, case.num_text)[None]
        layers.append(len(layers))
        if attn_mask is not None:
            seen = seen & attn_mask
        if not exact:
            return real(query, key, value, attn_mask=seen, **rest)
        q, k, v = query.double(), key.double(), value.double()
        return real(q, k, v, attn_mask=seen, **rest).to(query.dtype)

    return sdpa, layers
