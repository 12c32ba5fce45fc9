"""Which key blocks every query block reads, as compressed rows of static capacity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from permattn.core.list_kernels import kernels_for


@dataclass(frozen=True, eq=False)
class BlockIndex:
    """Key-block lists in compressed rows: an unequal row costs what it holds.

    Row i of batch row b and head h lists `kv_indices[b, h, row_offsets[b, h, i] : row_offsets[b, h,
    i + 1]]`; its first `kv_num_full[b, h, i]` entries are full blocks (every query of the block
    sees every key of it: no token rule needed), the rest are partial.

    Args:
        kv_indices: int32 [Bx, Hx, capacity]. The capacity is static: a bound known before the data,
            so that building an index never waits for the device. Entries past the last row are
            unread.
        row_offsets: int32 [Bx, Hx, num_q_blocks + 1], ascending from 0.
        kv_num_full: int32 [Bx, Hx, num_q_blocks].
        block_q, block_kv: slots per block. Pattern blocks (meaning), not kernel tiles (speed).
    """

    kv_indices: Tensor
    row_offsets: Tensor
    kv_num_full: Tensor
    block_q: int
    block_kv: int

    def __post_init__(self) -> None:
        for name in ("kv_indices", "row_offsets", "kv_num_full"):
            x = getattr(self, name)
            if x.dtype != torch.int32 or x.dim() != 3:
                raise ValueError(
                    f"BlockIndex.{name}: wants int32 [Bx, Hx, n], got {x.dtype} {list(x.shape)}"
                )
        if self.row_offsets.shape[-1] != self.kv_num_full.shape[-1] + 1:
            raise ValueError(
                "BlockIndex.row_offsets: wants num_q_blocks + 1 columns, got "
                f"{self.row_offsets.shape[-1]} for {self.kv_num_full.shape[-1]} rows"
            )
        if self.block_q < 1 or self.block_kv < 1:
            raise ValueError(
                "BlockIndex: block_q and block_kv must be >= 1, got "
                f"{self.block_q}, {self.block_kv}"
            )

    @property
    def num_q_blocks(self) -> int:
        return self.kv_num_full.shape[-1]

    @property
    def capacity(self) -> int:
        return self.kv_indices.shape[-1]

    @classmethod
    def from_padded(
        cls,
        kv_indices: Tensor,
        kv_num_blocks: Tensor,
        kv_num_full: Tensor,
        block_q: int,
        block_kv: int,
    ) -> BlockIndex:
        """From FlexAttention's form of list: one padded row per query block.

        Args:
            kv_indices: integer [Bx, Hx, nQ, max_blocks]; full blocks first in every row.
            kv_num_blocks: integer [Bx, Hx, nQ], entries in use.
            kv_num_full: integer [Bx, Hx, nQ], how many of them are full.
        """
        max_blocks = kv_indices.shape[-1]
        column = torch.arange(max_blocks, device=kv_indices.device)
        used = column < kv_num_blocks[..., None]
        return _compact(kv_indices, used, kv_num_full, block_q, block_kv)

    @classmethod
    def from_block_mask(
        cls,
        mask: Tensor,
        block_q: int,
        block_kv: int,
        *,
        full: bool = False,
        capacity: int | None = None,
    ) -> BlockIndex:
        """From a mask of blocks.

        Args:
            mask: bool [Bx, Hx, nQ, nKV], or fewer leading axes.
            full: all blocks are full, not partial: nobody needs the token rule.
            capacity: at least the listed blocks of the fullest head, where the host knows it;
                None = nQ * nKV.
        """
        while mask.dim() < 4:
            mask = mask[None]
        mask = mask.bool()
        kernels = kernels_for(mask)
        if kernels is not None:
            most = mask.shape[2] * mask.shape[3]
            most = most if capacity is None else min(capacity, most)
            return cls(*kernels.compact(mask, full, most), block_q, block_kv)
        column = torch.arange(mask.shape[-1], device=mask.device, dtype=torch.int32)
        num_full = mask.sum(-1, dtype=torch.int32)
        if not full:
            num_full = torch.zeros_like(num_full)
        index = _compact(column.expand(mask.shape), mask, num_full, block_q, block_kv)
        if capacity is None:
            return index
        kept = index.kv_indices[..., :capacity].clone()
        return cls(kept, index.row_offsets, index.kv_num_full, block_q, block_kv)

    @classmethod
    def from_ranges(
        cls,
        starts: Tensor,
        stops: Tensor,
        *,
        num_full_ranges: int,
        capacity: int,
        block_q: int,
        block_kv: int,
    ) -> BlockIndex:
        """Every row lists the key blocks of a few ranges; nothing of size nQ x nKV is made.

        Args:
            starts, stops: integer [Bx, Hx, nQ, R]: range r of a row holds blocks [start, stop);
                stop <= start is an empty range. The ranges of one row must not overlap.
            num_full_ranges: the first that many ranges hold full blocks, the rest partial ones.
            capacity: at least the entries of the longest head.
        """
        length = (stops - starts).clamp_min(0)
        per_row = length.sum(-1)
        row_offsets = torch.nn.functional.pad(per_row.cumsum(-1), (1, 0))
        # Blocks count up by one inside a range and jump where the next one begins: a running sum
        # of steps, and nothing to look up per entry. An empty range adds its jump to the next.
        start, flat = starts.flatten(-2), length.flatten(-2)
        begin = flat.cumsum(-1) - flat
        jump = start - torch.nn.functional.pad((start + flat)[..., :-1], (1, 0), value=1)
        kv = torch.ones(*begin.shape[:-1], capacity, dtype=torch.int32, device=start.device)
        if capacity:
            jump = torch.where(begin < capacity, jump, 0).to(torch.int32)
            kv.scatter_add_(-1, begin.clamp_max(capacity - 1), jump)
        torch.cumsum(kv, -1, dtype=torch.int32, out=kv)
        entry = torch.arange(capacity, device=start.device, dtype=torch.int32)
        kv.masked_fill_(entry >= row_offsets[..., -1:], 0)
        num_full = length[..., :num_full_ranges].sum(-1)
        return cls(
            kv,
            row_offsets.to(torch.int32),
            num_full.to(torch.int32),
            block_q,
            block_kv,
        )

    def without_blocks(self, dropped: Tensor) -> BlockIndex:
        """The same rows without some key blocks.

        Args:
            dropped: bool [Bx or 1, Hx or 1, num_kv_blocks].
        """
        row = self.entry_row()
        dropped = dropped.expand(*row.shape[:2], -1)
        kept = row < self.num_q_blocks
        kept = kept & ~dropped.gather(-1, self.kv_indices.long())
        before = torch.nn.functional.pad(kept.cumsum(-1), (1, 0))
        offsets = self.row_offsets.long()
        place = torch.where(kept, before[..., :-1], self.capacity)
        flat = self.kv_indices.new_zeros(*row.shape[:2], self.capacity + 1)
        flat.scatter_(-1, place, self.kv_indices)
        new_offsets = before.gather(-1, offsets)
        new_full = before.gather(-1, offsets[..., :-1] + self.kv_num_full) - new_offsets[..., :-1]
        return BlockIndex(
            flat[..., :-1].contiguous(),
            new_offsets.to(torch.int32),
            new_full.to(torch.int32),
            self.block_q,
            self.block_kv,
        )

    def entry_row(self) -> Tensor:
        """int64 [Bx, Hx, capacity]: the query block of every entry; num_q_blocks where unused."""
        entry = torch.arange(self.capacity, device=self.kv_indices.device, dtype=torch.int32)
        entry = entry.expand(self.kv_indices.shape).contiguous()
        row = torch.searchsorted(self.row_offsets.contiguous(), entry, right=True) - 1
        return torch.where(entry < self.row_offsets[..., -1:], row, self.num_q_blocks)

    def entry_is_full(self) -> Tensor:
        """bool [Bx, Hx, capacity]: whether the entry is a full block."""
        row = self.entry_row()
        inside = row.clamp_max(max(self.num_q_blocks - 1, 0))
        entry = torch.arange(self.capacity, device=row.device)
        limit = self.row_offsets.gather(-1, inside) + self.kv_num_full.gather(-1, inside)
        return (row < self.num_q_blocks) & (entry < limit)

    def transpose(self, num_kv_blocks: int) -> BlockIndex:
        """Key block -> query blocks, for the backward: static size, stable ascending order.

        Args:
            num_kv_blocks: rows of the result, ceil(kv_perm.num_slots / block_kv).

        Returns: an index whose rows are key blocks and whose `kv_indices` hold query blocks.
        """
        if self.capacity == 0 or self.num_q_blocks == 0:
            shape = self.kv_indices.shape[:2]
            zeros = self.kv_indices.new_zeros(*shape, num_kv_blocks + 1)
            return BlockIndex(self.kv_indices, zeros, zeros[..., 1:], self.block_kv, self.block_q)
        kernels = kernels_for(self.kv_indices)
        if kernels is not None:
            given = self.kv_indices, self.row_offsets, self.kv_num_full
            made = kernels.transpose(*given, num_kv_blocks)
            if made is not None:
                return BlockIndex(*made, self.block_kv, self.block_q)
        row = self.entry_row()
        full = self.entry_is_full()
        used = row < self.num_q_blocks
        # A stable sort by (key block, partial) keeps query blocks ascending inside each.
        key = self.kv_indices.long() * 2 + (~full).long()
        key = torch.where(used, key, 2 * num_kv_blocks)
        key, order = key.sort(dim=-1, stable=True)
        edges = torch.arange(2 * num_kv_blocks + 1, device=key.device)
        edges = edges.expand(*key.shape[:-1], -1).contiguous()
        begin = torch.searchsorted(key.contiguous(), edges)
        row_offsets = begin[..., ::2]
        num_full = begin[..., 1::2] - begin[..., :-1:2]
        q_block = row.gather(-1, order).clamp_max(self.num_q_blocks - 1)
        return BlockIndex(
            q_block.to(torch.int32),
            row_offsets.to(torch.int32).contiguous(),
            num_full.to(torch.int32).contiguous(),
            self.block_kv,
            self.block_q,
        )

    def num_entries(self) -> Tensor:
        """int64 [Bx, Hx]: listed blocks per head."""
        return self.row_offsets[..., -1].long()

    def to_block_mask(self, num_kv_blocks: int) -> Tensor:
        """bool [Bx, Hx, nQ, num_kv_blocks], for pictures and tests."""
        shape = (*self.kv_indices.shape[:2], self.num_q_blocks + 1, num_kv_blocks)
        mask = torch.zeros(shape, dtype=torch.bool, device=self.kv_indices.device)
        if self.capacity:
            flat = self.entry_row() * num_kv_blocks + self.kv_indices.long()
            flat = flat.clamp_max(shape[2] * shape[3] - 1)
            used = self.entry_row() < self.num_q_blocks
            flat = torch.where(used, flat, self.num_q_blocks * num_kv_blocks)
            mask.flatten(-2).scatter_(-1, flat, True)
        return mask[:, :, :-1]

    def validate(self, num_kv_blocks: int) -> None:
        """Checks every value (a few device syncs). Raises ValueError naming what is wrong."""
        offsets = self.row_offsets
        length = offsets[..., 1:] - offsets[..., :-1]
        if bool((offsets[..., 0] != 0).any()) or bool((length < 0).any()):
            raise ValueError("BlockIndex.row_offsets: must start at 0 and never descend")
        if bool((offsets[..., -1] > self.capacity).any()):
            raise ValueError(
                f"BlockIndex.row_offsets: the last offset must be <= capacity {self.capacity}, "
                f"got {int(offsets[..., -1].max())}"
            )
        if bool((self.kv_num_full < 0).any()) or bool((self.kv_num_full > length).any()):
            raise ValueError("BlockIndex.kv_num_full: must lie in [0, length of its row]")
        if self.capacity == 0 or self.num_q_blocks == 0:
            return
        row = self.entry_row()
        used = row < self.num_q_blocks
        kv = self.kv_indices.long()
        bad = used & ((kv < 0) | (kv >= num_kv_blocks))
        if bool(bad.any()):
            raise ValueError(
                f"BlockIndex.kv_indices: values must lie in [0, {num_kv_blocks}), "
                f"got {int(kv[bad][0])}"
            )
        key = torch.where(
            used, row * num_kv_blocks + kv, -1 - torch.arange(self.capacity, device=kv.device)
        )
        ordered = key.sort(dim=-1).values
        if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
            raise ValueError("BlockIndex.kv_indices: a row lists the same key block twice")


def _compact(
    kv_indices: Tensor, used: Tensor, num_full: Tensor, block_q: int, block_kv: int
) -> BlockIndex:
    """Rows of [Bx, Hx, nQ, n] squeezed together, entries where `used`; order is kept."""
    counts = used.sum(-1)
    row_offsets = torch.nn.functional.pad(counts.cumsum(-1), (1, 0))
    place = row_offsets[..., :-1, None] + used.cumsum(-1) - 1
    capacity = used.shape[-2] * used.shape[-1]
    place = torch.where(used, place, capacity).flatten(-2)
    flat = torch.zeros((*used.shape[:2], capacity + 1), dtype=torch.int32, device=used.device)
    flat.scatter_(-1, place, kv_indices.to(torch.int32).expand(used.shape).flatten(-2))
    return BlockIndex(
        flat[..., :capacity].contiguous(),
        row_offsets.to(torch.int32),
        num_full.to(torch.int32).contiguous(),
        block_q,
        block_kv,
    )
