"""Which axis order suits a head: two terms per order, measured on sampled query blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from permattn.block_mass import BlockMass, block_mass
from permattn.calibrate.paro.options import MeasureOptions
from permattn.core import TokenGrid
from permattn.core.axis_order import NATIVE_ORDER, candidate_orders
from permattn.core.plan import ceil_div
from permattn.patterns.paro import vision_tokens

_LEAST_Q_BLOCKS = 16
# Orders whose costs differ by less, relatively, cost the same: sums of floats differ by the order
# of summation.
_TIE = 1e-5


def orders_of(grid: TokenGrid, options: MeasureOptions) -> tuple[int, ...]:
    """The candidates on a grid, ascending."""
    orders = options.orders or candidate_orders((grid.frames, grid.height, grid.width))
    return orders if options.native_cells is None else (*orders, NATIVE_ORDER)


def sampled_blocks(num_tokens: int, options: MeasureOptions) -> Tensor:
    """int32 [n]: the query blocks that orders are compared on."""
    count = ceil_div(num_tokens, options.block[0])
    stride = max(1, min(options.order_stride, count // _LEAST_Q_BLOCKS))
    return torch.arange((stride - 1) // 2, count, stride, dtype=torch.int32)


def measure_orders(
    q: Tensor, k: Tensor, lse: Tensor, grid: TokenGrid, options: MeasureOptions
) -> Tensor:
    """Both terms of every candidate order for every head, mean over the batch.

    Args:
        q, k: [B, H, S, D], as attention sees them.
        lse: float32 [B, H, S], over all keys.

    Returns: float64 [orders, 2, H] on the CPU, less is better: see `order_terms`.
    """
    blocks = sampled_blocks(grid.num_tokens, options).to(q.device)
    real = _tokens_in(blocks, options.block[0], grid.num_tokens)
    terms = []
    for order in orders_of(grid, options):
        number = torch.tensor([order], device=q.device)
        token = vision_tokens(grid, number, options.native_cells)[None]
        mass = block_mass(
            *(q, k),
            token_of_q_slot=token,
            token_of_kv_slot=token,
            q_blocks=blocks,
            block=options.block,
            lse=lse,
            eps=options.eps,
            backend=options.backend,
        )
        pairs = real[:, None] * _tokens_in(
            torch.arange(mass.sums.shape[-1], device=q.device), options.block[1], grid.num_tokens
        )
        terms.append(order_terms(mass, pairs, int(real.sum()), options).mean(1))
    return torch.stack(terms).cpu()


def order_terms(mass: BlockMass, pairs: Tensor, num_rows: int, options: MeasureOptions) -> Tensor:
    """The two terms that orders are compared by; float64 [2, B, H], less is better.

    Source: PAROAttention (arXiv 2506.16054), equations 1 to 3. "paper" counts the blocks that are
    *not* sparse: as printed, the term rewards orders with few sparse blocks. In "mass" the blocks
    that will be skipped have no vote: shares are of mass, and incoherence is weighted by it.

    Args:
        mass: of the sampled query blocks, with maxima and small.
        pairs: int64 [n, nk], (query, key) pairs of every block.
        num_rows: sampled queries.
    """
    assert mass.maxima is not None and mass.small is not None
    sums, maxima = (x.double().flatten(-2) for x in (mass.sums, mass.maxima))
    size = pairs.flatten().double()
    if options.metric == "mass":
        kept = max(1, round(options.density * size.numel()))
        total = sums.sum(-1)
        lost = (total - sums.topk(kept, -1).values.sum(-1)).clamp_min(0.0) / num_rows
        # Sum of mass * max / mean, over the sum of mass; mean = mass / pairs.
        incoherence = (maxima * size).sum(-1) / total.clamp_min(torch.finfo(torch.double).tiny)
        return torch.stack((lost, incoherence))
    is_sparse = mass.small.double().flatten(-2) >= options.sparse_share * size
    # A block of nothing but zeros is even.
    ratio = torch.where(sums > 0.0, maxima * size / sums.clamp_min(1e-300), 1.0)
    return torch.stack((1.0 - is_sparse.double().mean(-1), ratio.mean(-1)))


def choose_orders(terms: Tensor, orders: tuple[int, ...], alpha: float) -> Tensor:
    """uint8 [...]: the order of least cost; of equals the one with the lowest number.

    Args:
        terms: float64 [orders, 2, ...], mean over all samples.
    """
    share = terms / terms.sum(0).clamp_min(torch.finfo(torch.double).tiny)
    cost = alpha * share[:, 0] + (1.0 - alpha) * share[:, 1]
    is_least = cost <= cost.amin(0) * (1.0 + _TIE)
    first = is_least.to(torch.uint8).argmax(0)
    return torch.tensor(orders, dtype=torch.uint8)[first]


def _tokens_in(block: Tensor, size: int, num_tokens: int) -> Tensor:
    """int64: how many tokens lie in each of these blocks."""
    return (num_tokens - block.long() * size).clamp(0, size)
