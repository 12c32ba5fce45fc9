"""Kernels that make lists of blocks where tensors lie. Without them torch makes the same lists."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class ListKernels(Protocol):
    """What a backend may register: the same numbers as the torch code that asks for them."""

    def takes(self, x: Tensor) -> bool:
        """Whether they run where x lies, in its dtype."""

    def compact(self, mask: Tensor, full: bool, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
        """kv_indices, row_offsets and kv_num_full of `BlockIndex.from_block_mask`; the mask has all
        four axes.
        """

    def transpose(
        self, kv_indices: Tensor, row_offsets: Tensor, kv_num_full: Tensor, num_kv_blocks: int
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Those of `BlockIndex.transpose`; None where its scratch would be too large."""

    def pool(self, x: Tensor, block: int, token_of_slot: Tensor | None) -> Tensor | None:
        """`core.selection.pooled_blocks`; None where x does not fit."""

    def scores(self, q_blocks: Tensor, k_blocks: Tensor, scale: float) -> Tensor:
        """scale * q . k of float32 [B, Hq, n, D] and [B, Hkv, nK, D]: float32 [B, Hq, n, nK]."""

    def strongest(
        self, score: Tensor, stop: Tensor, budget: Tensor | int, max_blocks: int
    ) -> Tensor:
        """`core.selection.strongest_of` without a coverage and forced blocks."""


_registered: list[ListKernels] = []


def register(kernels: ListKernels) -> None:
    _registered.append(kernels)


def kernels_for(x: Tensor) -> ListKernels | None:
    """The kernels for a tensor; None for traced ones and for subclasses, which torch knows."""
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return None
    return next((k for k in _registered if k.takes(x)), None)
