"""Block masses: one fused operator that sums attention over blocks, under any order."""

from __future__ import annotations

import torch
from torch import Tensor

from permattn.backends import measures_blocks, resolve
from permattn.core.block_mass import (
    BlockMass,
    BlockMassArgs,
    BlockMassProblem,
    Blocks,
    empty_blocks,
)
from permattn.core.plan import ceil_div

__all__ = ["BlockMass", "block_mass"]


def block_mass(
    q: Tensor,
    k: Tensor,
    *,
    token_of_q_slot: Tensor,
    token_of_kv_slot: Tensor,
    q_blocks: Tensor,
    block: tuple[int, int],
    lse: Tensor,
    scale: float | None = None,
    eps: float | None = None,
    backend: str = "auto",
) -> BlockMass:
    """Sums, maxima and small entries of the softmax over every block of sampled query blocks.

    Source: PAROAttention (arXiv 2506.16054), section 3.1, as a streaming pass: p = exp(score - lse)
    exists for one tile at a time.

    Args:
        q: [B, Hq, Sq, D].
        k: [B, Hkv, Skv, D], q's dtype and device, Hq % Hkv == 0; any strides, last one 1.
        token_of_q_slot: int32 [1 or B, 1 or Hq, q slots], -1 = hole: `Permutation.token_of_slot`.
        token_of_kv_slot: int32 [1 or B, 1 or Hq, kv slots], likewise.
        q_blocks: int32 [n], numbers of query blocks, alike for all heads.
        block: (block_q, block_kv), slots.
        lse: float32 [B, Hq, Sq] in token order, natural log, over all keys that a row sees, listed
            here or not; -inf = the row sees nothing.
        scale: None = D ** -0.5.
        eps: entries below it are counted; None = sums alone.
        backend: "auto" or the name of a backend. A named backend never falls back.

    Returns: a `BlockMass`.

    Raises:
        ValueError: shapes, devices or numbers that do not fit; names what it got and wants.
        TypeError: a dtype that does not fit.
        NotImplementedError: the named backend cannot run it; says why.

    Invariants: sums are in float32 (float64 inside for float64 inputs). Inputs are never modified,
    nothing waits for a GPU, and two runs are bit-identical. Without gradients.
    """
    _check_rows(q, k, lse)
    _check_slots(q, k, token_of_q_slot, token_of_kv_slot, block)
    _check_blocks(q, q_blocks, ceil_div(token_of_q_slot.shape[-1], block[0]))
    if eps is not None and not 0.0 < eps < float("inf"):
        raise ValueError(f"eps: wants a number > 0, got {eps}")
    problem = BlockMassProblem(q.device.type, q.dtype, q.shape[3], *block)
    sums, maxima, small = block_mass_op(
        *(q.detach(), k.detach(), token_of_q_slot, token_of_kv_slot, q_blocks, *block),
        *(lse, q.shape[3] ** -0.5 if scale is None else scale, eps, resolve(problem, backend)),
    )
    return BlockMass(sums, *((None, None) if eps is None else (maxima, small)))


@torch.library.custom_op("permattn::block_mass", mutates_args=())
def block_mass_op(
    q: Tensor,
    k: Tensor,
    token_of_q_slot: Tensor,
    token_of_kv_slot: Tensor,
    q_blocks: Tensor,
    block_q: int,
    block_kv: int,
    lse: Tensor,
    scale: float,
    eps: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    args = BlockMassArgs(
        *(q, k, token_of_q_slot, token_of_kv_slot, q_blocks, block_q, block_kv, lse, scale, eps)
    )
    return measures_blocks(backend).block_mass(args)


@block_mass_op.register_fake
def _(q, k, q_slot, kv_slot, q_blocks, block_q, block_kv, lse, scale, eps, backend) -> Blocks:
    return empty_blocks(q, q_blocks.shape[0], ceil_div(kv_slot.shape[-1], block_kv), eps)


def _check_rows(q: Tensor, k: Tensor, lse: Tensor) -> None:
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 4:
            raise ValueError(f"{name}: wants 4 axes [B, H, S, D], got shape {list(x.shape)}")
        if not x.dtype.is_floating_point:
            raise TypeError(f"{name}: wants a floating dtype, got {x.dtype}")
        if x.stride(3) != 1 and x.shape[3] > 1 and x.numel() > 0:
            raise ValueError(f"{name}: the last stride must be 1, got {x.stride(3)}")
    if k.dtype != q.dtype:
        raise TypeError(f"k: wants q's dtype {q.dtype}, got {k.dtype}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or q.shape[3] < 1:
        raise ValueError(
            f"k: wants q's batch size and head dim, {q.shape[0]} and {q.shape[3]} (at least 1), "
            f"got {k.shape[0]} and {k.shape[3]}"
        )
    hq, hkv = q.shape[1], k.shape[1]
    if hkv == 0 or hq == 0 or hq % hkv:
        raise ValueError(f"k: Hq % Hkv must be 0, got Hq = {hq}, Hkv = {hkv}")
    if lse.dtype != torch.float32:
        raise TypeError(f"lse: wants torch.float32, got {lse.dtype}")
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse: wants shape {list(q.shape[:3])}, got {list(lse.shape)}")
    for name, x in (("k", k), ("lse", lse)):
        if x.device != q.device:
            raise ValueError(f"{name}: wants q's device {q.device}, got {x.device}")


def _check_slots(
    q: Tensor, k: Tensor, q_slot: Tensor, kv_slot: Tensor, block: tuple[int, int]
) -> None:
    if len(block) != 2 or min(block) < 1:
        raise ValueError(f"block: wants two sizes >= 1, got {block}")
    batch, heads = q.shape[:2]
    for name, x, tokens in (
        ("token_of_q_slot", q_slot, q.shape[2]),
        ("token_of_kv_slot", kv_slot, k.shape[2]),
    ):
        if x.dtype != torch.int32:
            raise TypeError(f"{name}: wants torch.int32, got {x.dtype}")
        if x.dim() != 3 or x.shape[0] not in (1, batch) or x.shape[1] not in (1, heads):
            raise ValueError(
                f"{name}: wants [1 or {batch}, 1 or {heads}, slots], got {list(x.shape)}"
            )
        if x.device != q.device:
            raise ValueError(f"{name}: wants q's device {q.device}, got {x.device}")
        # Values on a GPU are not looked at: that would wait for it.
        if x.device.type == "cpu" and x.numel() and not _in_range(x, -1, tokens):
            raise ValueError(f"{name}: wants tokens from -1 to {tokens - 1}")


def _check_blocks(q: Tensor, q_blocks: Tensor, count: int) -> None:
    if q_blocks.dtype != torch.int32:
        raise TypeError(f"q_blocks: wants torch.int32, got {q_blocks.dtype}")
    if q_blocks.dim() != 1:
        raise ValueError(f"q_blocks: wants [n], got {list(q_blocks.shape)}")
    if q_blocks.device != q.device:
        raise ValueError(f"q_blocks: wants q's device {q.device}, got {q_blocks.device}")
    if q_blocks.device.type == "cpu" and q_blocks.numel() and not _in_range(q_blocks, 0, count):
        raise ValueError(f"q_blocks: wants numbers from 0 to {count - 1}, the query blocks")


def _in_range(x: Tensor, low: int, stop: int) -> bool:
    return int(x.min()) >= low and int(x.max()) < stop
