"""An axis order and a block mask per head, as an AttnPlan."""

from __future__ import annotations

import torch
from torch import Tensor

from permattn.core import AttnPart, AttnPlan, BlockIndex, Permutation, TokenBand, TokenGrid
from permattn.core.axis_order import NATIVE_ORDER, ORDER_NAMES, cells_in_order
from permattn.core.plan import ceil_div
from permattn.core.quant import QuantSpec


def plan_paro(
    grid: TokenGrid,
    axis_orders: Tensor,
    block_mask: Tensor,
    *,
    num_tokens: int,
    block: tuple[int, int] = (64, 64),
    text_visible: Tensor | None = None,
    native_cells: Tensor | None = None,
    quant: QuantSpec = QuantSpec(),
    capacity: int | None = None,
) -> AttnPlan:
    """Reordered block-sparse attention: bidirectional, text dense.

    Vision tokens are read in the order of their head, text tokens in blocks of their own, and only
    pairs of vision blocks can be left out. Rows go back to their tokens when they are written.

    Source: PAROAttention (arXiv 2506.16054), section 3. Deviations: text has blocks of its own in
    place of one that it shares with the first vision tokens; it is not permuted, wherever it
    stands (before the grid, behind it, or both).

    Args:
        grid: the vision tokens; every other token is text.
        axis_orders: integer [H], numbers of `ORDER_NAMES`, on the device of the plan.
        block_mask: bool [H or 1, ceil(N / block_q), ceil(N / block_kv)] over vision blocks in the
            order of their head, N = grid.num_tokens; True = computed.
        num_tokens: S, vision and text.
        block: (block_q, block_kv), slots.
        text_visible: bool [B, S - N], text keys that are seen (False = padding), in token order.
        native_cells: int [N], the raster cell of every vision token where tokens do not come in
            raster order (merge-major vision towers); order 6 leaves them as they come.
        quant: numerics.
        capacity: at least the vision blocks that the fullest head lists, the dense rows of text
            among them; None = all.

    Returns: a plan of one part, or of two under one softmax where there is text.

    Raises:
        ValueError: sizes that do not fit; names the argument.

    Invariants: nothing waits for the device.
    """
    count, text = grid.num_tokens, num_tokens - grid.num_tokens
    block_q, block_kv = block
    _check(grid, axis_orders, block_mask, num_tokens, block, text_visible)
    device = axis_orders.device
    place = torch.arange(num_tokens, dtype=torch.int32, device=device)
    vision_token = vision_tokens(grid, axis_orders, native_cells)
    if text == 0:
        perm = Permutation.from_token_of_slot(vision_token[None], num_tokens, validate=False)
        index = BlockIndex.from_block_mask(
            block_mask, block_q, block_kv, full=True, capacity=capacity
        )
        return AttnPlan((AttnPart(perm, perm, index, TokenBand()),), quant, validate=False)
    text_token = torch.cat((place[: grid.start], place[grid.stop :]))
    text_rows = ceil_div(text, block_q)
    padded = torch.nn.functional.pad(text_token, (0, text_rows * block_q - text), value=-1)
    q_token = torch.cat((padded.expand(vision_token.shape[0], -1), vision_token), -1)
    q_perm = Permutation.from_token_of_slot(q_token[None], num_tokens, validate=False)
    kv_perm = Permutation.from_token_of_slot(vision_token[None], num_tokens, validate=False)
    # Text queries see everything.
    mask = torch.nn.functional.pad(block_mask, (0, 0, text_rows, 0), value=True)
    index = BlockIndex.from_block_mask(mask, block_q, block_kv, full=True, capacity=capacity)
    vision = AttnPart(q_perm, kv_perm, index, TokenBand())
    text_part = _text_part(q_perm, text_token, num_tokens, block, text_visible)
    assert q_perm.num_slots == text_rows * block_q + count
    return AttnPlan((vision, text_part), quant, validate=False)


def _text_part(
    q_perm: Permutation,
    text_token: Tensor,
    num_tokens: int,
    block: tuple[int, int],
    visible: Tensor | None,
) -> AttnPart:
    """Every query against every text key that is there."""
    rows, columns = ceil_div(q_perm.num_slots, block[0]), ceil_div(len(text_token), block[1])
    everything = torch.ones(rows, columns, dtype=torch.bool, device=text_token.device)
    index = BlockIndex.from_block_mask(everything, *block, full=visible is None)
    if visible is not None:
        text_token = torch.where(visible, text_token, -1)[:, None]
    kv_perm = Permutation.from_token_of_slot(text_token, num_tokens, validate=False)
    return AttnPart(q_perm, kv_perm, index, TokenBand())


def vision_tokens(grid: TokenGrid, axis_orders: Tensor, native_cells: Tensor | None) -> Tensor:
    """int32 [H, N]: the token of every place of every head's order; see `plan_paro`."""
    device = axis_orders.device
    sizes = (grid.frames, grid.height, grid.width)
    native = axis_orders == NATIVE_ORDER
    rank = cells_in_order(sizes, torch.where(native, 0, axis_orders))
    if native_cells is not None:
        ranks = torch.arange(grid.num_tokens, dtype=torch.int32, device=device)
        rank_of_cell = torch.empty_like(ranks)
        rank_of_cell[native_cells.to(device).long()] = ranks
        rank = torch.where(native[:, None], ranks, rank_of_cell[rank.long()])
    return rank + grid.start


def _check(
    grid: TokenGrid,
    axis_orders: Tensor,
    block_mask: Tensor,
    num_tokens: int,
    block: tuple[int, int],
    text_visible: Tensor | None,
) -> None:
    if min(block) < 1:
        raise ValueError(f"block: wants two sizes >= 1, got {block}")
    if grid.frame_starts is not None:
        raise ValueError("grid: wants frames without text between them, got frame_starts")
    if num_tokens < grid.stop:
        raise ValueError(f"num_tokens: wants at least the grid's end {grid.stop}, got {num_tokens}")
    if axis_orders.dim() != 1 or axis_orders.is_floating_point() or axis_orders.dtype == torch.bool:
        raise ValueError(
            "axis_orders: wants integer [H], numbers of "
            f"{ORDER_NAMES}, got {axis_orders.dtype} {list(axis_orders.shape)}"
        )
    heads = axis_orders.shape[0]
    want = tuple(ceil_div(grid.num_tokens, size) for size in block)
    shape = tuple(block_mask.shape)
    if block_mask.dtype != torch.bool or len(shape) != 3 or shape[1:] != want:
        raise ValueError(
            f"block_mask: wants bool [H or 1, {want[0]}, {want[1]}] for {grid.num_tokens} vision "
            f"tokens in blocks of {block}, got {block_mask.dtype} {list(shape)}"
        )
    if shape[0] not in (1, heads):
        raise ValueError(f"block_mask: wants 1 or {heads} heads, got {shape[0]}")
    if block_mask.device != axis_orders.device:
        raise ValueError(
            f"block_mask: lies on {block_mask.device}, axis_orders on {axis_orders.device}"
        )
    text = num_tokens - grid.num_tokens
    if text_visible is not None and (
        text_visible.dtype != torch.bool
        or text_visible.dim() != 2
        or text_visible.shape[1] != text
        or text == 0
    ):
        raise ValueError(
            f"text_visible: wants bool [B, {text}], one per text token, got "
            f"{text_visible.dtype} {list(text_visible.shape)}"
        )
