"""What a block mass is: the softmax of sampled query blocks, summed over every key block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from permattn.core.plan import ceil_div


@dataclass(frozen=True, eq=False)
class BlockMass:
    """Where the rows of n query blocks put their attention, block by block.

    p = exp(score - lse) of a (query, key) pair; pairs with a hole count nowhere.

    Args:
        sums: float32 [B, Hq, n, nk], sum of p over a block.
        maxima: float32 [B, Hq, n, nk], largest p of a block; None where no eps was given.
        small: float32 [B, Hq, n, nk], number of pairs with p < eps; None where no eps was given.
    """

    sums: Tensor
    maxima: Tensor | None
    small: Tensor | None


@dataclass(frozen=True)
class BlockMassProblem:
    """The static facts on which a backend decides whether it can measure block masses."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    block_q: int
    block_kv: int


@dataclass(frozen=True, eq=False)
class BlockMassArgs:
    """The checked arguments of one measurement; see `permattn.block_mass.block_mass`.

    q [B, Hq, Sq, D], k [B, Hkv, Skv, D], last stride 1; token_of_q_slot int32 [Bx, Hx, q slots],
    token_of_kv_slot int32 [Bx, Hx, kv slots], Hx is 1 or Hq for both; q_blocks int32 [n]; lse
    float32 [B, Hq, Sq] in token order, -inf where a row sees nothing; eps None: sums alone.
    """

    q: Tensor
    k: Tensor
    token_of_q_slot: Tensor
    token_of_kv_slot: Tensor
    q_blocks: Tensor
    block_q: int
    block_kv: int
    lse: Tensor
    scale: float
    eps: float | None

    @property
    def num_kv_blocks(self) -> int:
        return ceil_div(self.token_of_kv_slot.shape[-1], self.block_kv)


# sums, maxima, small; the last two have no element where eps is None.
Blocks = tuple[Tensor, Tensor, Tensor]


def empty_blocks(q: Tensor, num_q_blocks: int, num_kv_blocks: int, eps: float | None) -> Blocks:
    """Uninitialised results for q [B, Hq, Sq, D]."""
    shape = (*q.shape[:2], num_q_blocks, num_kv_blocks)
    rest = (0,) if eps is None else shape
    sums, maxima, small = (q.new_empty(s, dtype=torch.float32) for s in (shape, rest, rest))
    return sums, maxima, small
