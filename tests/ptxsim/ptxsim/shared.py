"""Shared memory of the blocks that run together, one after the other in one array."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import fault
from .hazards import Hazards
from .parse import FIRST_SHARED_BYTE, Instruction
from .registers import UNSIGNED

DYNAMIC_ALIGN = 1024


class SharedMemory:
    """Bytes, bounds and hazards.

    Args:
        size: end of a block's shared memory; its first `FIRST_SHARED_BYTE` bytes do not exist.
    """

    def __init__(self, blocks: int, size: int, hazards: Hazards | None, poison: int = 0xFF) -> None:
        self.size, self.poison, self.hazards = size, poison, hazards
        self.stride = stride_of(size)
        self.bytes = np.full(blocks * self.stride, poison, np.uint8)
        self.views = {n: self.bytes.view(dtype) for n, dtype in UNSIGNED.items()}

    def reset(self) -> None:
        self.bytes[:] = self.poison
        if self.hazards:
            self.hazards.reset()

    def flat(
        self, instruction: Instruction, address: np.ndarray, base: np.ndarray | int, size: int
    ) -> np.ndarray:
        """Places in the array of accesses of `size` bytes; raises out of bounds."""
        if address.size:
            low, high = int(address.min()), int(address.max())
            if low < FIRST_SHARED_BYTE or high + size > self.size:
                worst = low if low < FIRST_SHARED_BYTE else high
                raise fault(
                    instruction,
                    f"shared access out of bounds: byte {worst - FIRST_SHARED_BYTE} (+{size}) of "
                    f"{self.size - FIRST_SHARED_BYTE}",
                )
            if size > 1 and (address % size).any():
                raise fault(instruction, f"misaligned shared access of {size} bytes")
        return address + base

    def load(
        self, instruction: Instruction, bank: Any, lanes: Any, address: np.ndarray, element: int,
        count: int,
    ) -> np.ndarray:  # fmt: skip
        """[n, count] elements for the active threads of a bank."""
        size = element * count
        flat = self.flat(instruction, address, bank.shared_base[lanes], size)
        if self.hazards:
            self.hazards.read(instruction, flat, size, bank.agent[lanes])
        return self.views[element][flat[:, None] // element + np.arange(count)]

    def store(
        self, instruction: Instruction, bank: Any, lanes: Any, address: np.ndarray,
        values: np.ndarray,
    ) -> None:  # fmt: skip
        """values [n, count] of unsigned elements."""
        element, count = values.itemsize, values.shape[1]
        flat = self.flat(instruction, address, bank.shared_base[lanes], element * count)
        if self.hazards:
            self.hazards.write(instruction, flat, element * count, bank.agent[lanes])
        index = flat[:, None] // element + np.arange(count)
        self.views[element][index] = values
        if self.hazards and (self.views[element][index] != values).any():
            raise fault(instruction, "two threads store different values to one shared address")


def stride_of(size: int) -> int:
    return -(-size // DYNAMIC_ALIGN) * DYNAMIC_ALIGN
