"""Lists of blocks by the CUDA C++ kernels; see csrc/cuda/index/index.h."""

from __future__ import annotations

import torch
from torch import Tensor

from permattn.backends.cuda import device
from permattn.backends.cuda.rows import last_stride_one

MAX_DIM = 256
POOLED = (torch.float32, *device.DTYPES)
# A list is turned over through bits of all pairs of blocks: up to so many bytes for an entry.
SCRATCH_PER_ENTRY = 32


class CudaLists:
    """`core.list_kernels.ListKernels`. One launch or a few each, no wait for the device."""

    def takes(self, x: Tensor) -> bool:
        return device.takes(x.device.type) and device.why_not_here(x.device.type) is None

    def compact(self, mask: Tensor, full: bool, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
        heads, rows = mask.shape[:2], mask.shape[2]
        made = _lists(mask, heads, rows, capacity)
        torch.ops.permattn_native.cuda_compact.default(mask.contiguous(), full, *made)
        return made

    def transpose(
        self, kv_indices: Tensor, row_offsets: Tensor, kv_num_full: Tensor, num_kv_blocks: int
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        capacity, rows = kv_indices.shape[-1], kv_num_full.shape[-1]
        if 2 * -(-rows // 32) * 4 * num_kv_blocks > SCRATCH_PER_ENTRY * capacity:
            return None
        given = (x.contiguous() for x in (kv_indices, row_offsets, kv_num_full))
        made = _lists(kv_indices, kv_indices.shape[:2], num_kv_blocks, capacity)
        torch.ops.permattn_native.cuda_transpose.default(*given, *made)
        return made

    def pool(self, x: Tensor, block: int, token_of_slot: Tensor | None) -> Tensor | None:
        if x.dtype not in POOLED or not 1 <= x.shape[3] <= MAX_DIM:
            return None
        token = None if token_of_slot is None else last_stride_one(token_of_slot)
        slots = x.shape[2] if token is None else token.shape[-1]
        means = x.new_empty((*x.shape[:2], -(-slots // block), x.shape[3]), dtype=torch.float32)
        torch.ops.permattn_native.cuda_pool.default(
            last_stride_one(x.detach()), token, block, means
        )
        return means

    def scores(self, q_blocks: Tensor, k_blocks: Tensor, scale: float) -> Tensor:
        out = q_blocks.new_empty((*q_blocks.shape[:3], k_blocks.shape[2]))
        torch.ops.permattn_native.cuda_scores.default(
            q_blocks.contiguous(), k_blocks.contiguous(), scale, out
        )
        return out

    def strongest(
        self, score: Tensor, stop: Tensor, budget: Tensor | int, max_blocks: int
    ) -> Tensor:
        batch, heads, rows, columns = score.shape
        count = min(max_blocks, columns)
        of_head = None
        if isinstance(budget, int):
            count = min(count, max(budget, 0))
        else:
            of_head = budget.to(score.device, torch.int32).contiguous()
        stop = stop.to(torch.int32)
        is_shared = stop.shape[0] == 1 and stop.shape[1] == 1
        stop = stop.reshape(rows) if is_shared else stop.expand(batch, heads, rows)
        chosen = score.new_empty((batch, heads, rows, count), dtype=torch.int32)
        torch.ops.permattn_native.cuda_strongest.default(
            score.contiguous(), stop.contiguous(), of_head, chosen
        )
        return torch.nn.functional.pad(chosen, (0, max_blocks - count), value=-1)


def _lists(
    like: Tensor, heads: torch.Size, rows: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for indices, row_offsets and num_full."""
    sizes = (capacity, rows + 1, rows)
    indices, offsets, full = (
        torch.empty((*heads, n), dtype=torch.int32, device=like.device) for n in sizes
    )
    return indices, offsets, full
