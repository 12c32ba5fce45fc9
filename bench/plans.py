"""Plans of a stated density for the cases: exact counts, seeded, parts disjoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from permattn import plan_paro
from permattn.core import (
    AttnPart,
    AttnPlan,
    BlockIndex,
    Permutation,
    QuantSpec,
    TokenBand,
    TokenGrid,
)
from permattn.core.plan import block_token_range
from permattn.patterns.dense import plan_dense
from torch import Tensor

from bench.local_heads import block_mask, grid_of


@dataclass(frozen=True)
class Dense:
    """Every block, or every block up to the diagonal: our own dense list."""

    causal: bool = False
    block_q: int = 128
    block_kv: int = 128

    def __call__(self, num_tokens: int, heads: int) -> AttnPlan:
        return plan_dense(
            num_tokens,
            num_tokens,
            causal=self.causal,
            block_q=self.block_q,
            block_kv=self.block_kv,
        )


@dataclass(frozen=True)
class RandomBlocks:
    """`density` of every row's blocks, a list for every head; a causal row keeps its diagonal.

    Random lists are the hard case for a cache and the fair one for a ratio: no row is shorter.
    """

    density: float
    causal: bool = False
    block_q: int = 128
    block_kv: int = 128
    seed: int = 0

    def __call__(self, num_tokens: int, heads: int) -> AttnPlan:
        token = Permutation.identity(num_tokens)
        band = TokenBand(min_lag=0) if self.causal else TokenBand()
        index = random_blocks(token, token, band, self.density, heads, self, self.seed)
        return AttnPlan((AttnPart(token, token, index, band),), validate=False)


@dataclass(frozen=True)
class TwoParts:
    """A local window in token order and phase-major grid lines outside it, causal, one softmax.

    Both parts together list as many blocks as `RandomBlocks(density, causal=True)` does.

    Args:
        density: share of the causal blocks of one part in token order.
        window: tokens that the first part sees.
        phases: tokens of equal position modulo `phases` lie side by side in the second part.
    """

    density: float
    window: int = 512
    phases: int = 16
    block_q: int = 128
    block_kv: int = 128
    seed: int = 0

    def __call__(self, num_tokens: int, heads: int) -> AttnPlan:
        token = Permutation.identity(num_tokens)
        order = torch.arange(num_tokens)
        order = order[torch.argsort(order % self.phases, stable=True)]
        lines = Permutation.from_token_of_slot(order, num_tokens)
        inner, outer = TokenBand(0, self.window), TokenBand(self.window)
        near = random_blocks(token, token, inner, 1.0, heads, self, self.seed)
        one = RandomBlocks(self.density, True, self.block_q, self.block_kv, self.seed)
        budget = int(one(num_tokens, heads).parts[0].index.num_entries()[0, 0])
        rest = max(budget - int(near.num_entries()[0, 0]), 0)
        far = random_blocks(lines, lines, outer, rest, heads, self, self.seed)
        parts = (AttnPart(token, token, near, inner), AttnPart(lines, lines, far, outer))
        return AttnPlan(parts, validate=False)


@dataclass(frozen=True)
class Paro:
    """PAROAttention over a video of all tokens: an order for every head, its nearest blocks.

    Args:
        density: share of every row's blocks.
        precision: a name of `QuantSpec.named`.
    """

    density: float
    precision: str = "none"
    block: int = 64

    def __call__(self, num_tokens: int, heads: int) -> AttnPlan:
        grid, orders = grid_of(num_tokens), head_orders(heads)
        block = (self.block, self.block)
        masks = {o: block_mask(grid, o, self.density, block) for o in set(orders)}
        return plan_paro(
            TokenGrid(0, *grid),
            torch.tensor(orders),
            torch.stack([masks[o] for o in orders]),
            num_tokens=num_tokens,
            block=block,
            quant=QuantSpec.named(self.precision),
        )


def head_orders(heads: int) -> list[int]:
    """All six in turn."""
    return [h % 6 for h in range(heads)]


PlanBuilder = Dense | RandomBlocks | TwoParts | Paro


def random_blocks(
    q_perm: Permutation,
    kv_perm: Permutation,
    band: TokenBand,
    keep: float,
    heads: int,
    blocks: RandomBlocks | TwoParts,
    seed: int,
) -> BlockIndex:
    """Random rows out of the blocks that a band leaves visible; full blocks marked, listed first.

    Args:
        keep: a float is the share of every row's visible blocks (at least one); an int is the
            number of entries of a head, spread over rows in proportion to what they see.
    """
    generator = torch.Generator().manual_seed(seed)
    seen, full = _classify(q_perm, kv_perm, band, blocks.block_q, blocks.block_kv)
    visible = seen.sum(-1)
    share = keep / max(int(visible.sum()), 1) if isinstance(keep, int) else keep
    # Rounding the running sum keeps the total exact: 10 % of 64 blocks is 6 in some rows, else 7.
    want = (visible.double() * share).cumsum(-1).round().diff(prepend=torch.zeros(1)).long()
    want = want.clamp(min=1).minimum(visible)
    order = torch.rand(heads, *seen.shape, generator=generator)
    if band.min_lag is not None:
        # A row's last visible block (the diagonal) always wins, as every real pattern keeps it.
        last = seen.shape[-1] - 1 - seen.flip(-1).int().argmax(-1)
        order.scatter_(-1, last.expand(heads, -1)[..., None], -1.0)
    rank = order.masked_fill(~seen, 2.0).argsort(-1).argsort(-1)
    taken = (rank < want[:, None]) & seen
    return _listed(taken, full, blocks.block_q, blocks.block_kv)


def _classify(
    q_perm: Permutation, kv_perm: Permutation, band: TokenBand, block_q: int, block_kv: int
) -> tuple[Tensor, Tensor]:
    """bool [nQ, nKV] twice: blocks with a pair that may be visible, blocks where every pair is."""
    q_low, q_high, _ = (x[0, 0].long() for x in block_token_range(q_perm.token_of_slot, block_q))
    kv_low, kv_high, _ = (
        x[0, 0].long() for x in block_token_range(kv_perm.token_of_slot, block_kv)
    )
    least, most = q_low[:, None] - kv_high, q_high[:, None] - kv_low
    seen, full = torch.ones_like(least, dtype=torch.bool), torch.ones_like(least, dtype=torch.bool)
    if band.min_lag is not None:
        seen &= most >= band.min_lag
        full &= least >= band.min_lag
    if band.max_lag is not None:
        seen &= least < band.max_lag
        full &= most < band.max_lag
    return seen, full


def _listed(taken: Tensor, full: Tensor, block_q: int, block_kv: int) -> BlockIndex:
    """Lists of the taken blocks (bool [H, nQ, nKV]): full ones first, ascending in each kind."""
    column = torch.arange(taken.shape[-1])
    kind = torch.where(taken, torch.where(full, 0, 1), 2)
    key = kind * taken.shape[-1] + column
    kv = key.sort(-1).indices
    count, num_full = taken.sum(-1), (taken & full).sum(-1)
    width = int(count.max()) if count.numel() else 0
    return BlockIndex.from_padded(
        kv[None, ..., :width], count[None], num_full[None], block_q, block_kv
    )


def num_pairs(plan: AttnPlan, batch: int, heads: int) -> float:
    """(query slot, key slot) pairs in listed blocks over all heads: what a kernel computes."""
    return float(plan.num_block_pairs().double().mean()) * batch * heads
