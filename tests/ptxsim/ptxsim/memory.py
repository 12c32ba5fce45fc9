"""Global memory: named regions of real host memory; and where an operand points."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import SimulationError, fault
from .parse import Instruction
from .registers import UNSIGNED, Registers

_ALIGN = 16


@dataclass(frozen=True)
class Region:
    """Host memory that a kernel may touch; `read_only` regions must not be stored to."""

    name: str
    address: int
    size: int
    read_only: bool = False

    @classmethod
    def of(cls, array: Any, name: str = "", *, read_only: bool = False) -> Region:
        """The memory of a numpy array or of a torch tensor's whole storage."""
        if isinstance(array, np.ndarray):
            return cls(name or "array", array.ctypes.data, array.nbytes, read_only)
        storage = array.untyped_storage()
        return cls(name or "tensor", storage.data_ptr(), storage.nbytes(), read_only)


class GlobalMemory:
    """Loads and stores by address, inside regions only."""

    def __init__(self, regions: Sequence[Region]) -> None:
        merged: dict[int, Region] = {}
        for region in sorted(regions, key=lambda r: (r.address, r.size)):
            known = merged.get(region.address)
            read_only = region.read_only and (known is None or known.read_only)
            merged[region.address] = Region(region.name, region.address, region.size, read_only)
        self.regions = [r for r in merged.values() if r.size]
        for one, next_ in zip(self.regions, self.regions[1:], strict=False):
            if one.address + one.size > next_.address:
                raise SimulationError(f"regions {one.name!r} and {next_.name!r} overlap")
        self.bases = np.array([r.address for r in self.regions], np.int64)
        self.ends = np.array([r.address + r.size for r in self.regions], np.int64)
        self._views = [self._view(r) for r in self.regions]

    @staticmethod
    def _view(region: Region) -> dict[int, np.ndarray]:
        # From an aligned address on, so that every width has a view; bounds are checked apart.
        start = region.address // _ALIGN * _ALIGN
        end = -(-(region.address + region.size) // _ALIGN) * _ALIGN
        buffer = np.ctypeslib.as_array((ctypes.c_uint8 * (end - start)).from_address(start))
        return {n: buffer.view(dtype) for n, dtype in UNSIGNED.items()}

    def find(self, address: int) -> int:
        """Number of the region that begins at or before an address; -1: none."""
        return int(np.searchsorted(self.bases, address, "right")) - 1

    def _locate(
        self, instruction: Instruction, address: np.ndarray, size: int, is_store: bool
    ) -> int | np.ndarray:
        """Region of every address, one number where all share it; raises outside of all."""
        low, high = int(address.min()), int(address.max())
        number = self.find(low)
        what = "store" if is_store else "load"
        if number >= 0 and high + size <= self.ends[number]:
            where: int | np.ndarray = number
        else:
            where = np.searchsorted(self.bases, address, "right") - 1
            outside = (where < 0) | (address + size > self.ends[np.maximum(where, 0)])
            if outside.any():
                first = int(address[outside][0])
                raise fault(
                    instruction,
                    f"global {what} out of bounds: {int(outside.sum())} threads, first at "
                    f"{self.describe(first)}",
                )
        if size > 1 and (address % size).any():
            raise fault(instruction, f"misaligned global {what} of {size} bytes")
        if is_store:
            for k in np.unique(where):
                if self.regions[k].read_only:
                    raise fault(instruction, f"store to input {self.regions[k].name!r}")
        return where

    def check(self, instruction: Instruction, address: np.ndarray, size: int) -> None:
        """Raises where a load would, without loading."""
        if address.size:
            self._locate(instruction, address, size, False)

    def describe(self, address: int) -> str:
        number = self.find(address)
        if number < 0:
            return f"address {address:#x}, below all regions"
        region = self.regions[number]
        return f"byte {address - region.address} of {region.name!r} ({region.size} bytes)"

    def _index(self, number: int, address: np.ndarray, element: int, count: int) -> np.ndarray:
        start = self.regions[number].address // _ALIGN * _ALIGN
        index = (address - start) // element
        return index[:, None] + np.arange(count)

    def load(
        self, instruction: Instruction, address: np.ndarray, element: int, count: int
    ) -> np.ndarray:
        """[n, count] elements of `element` bytes; an access is aligned as a whole."""
        if not address.size:
            return np.zeros((0, count), UNSIGNED[element])
        where = self._locate(instruction, address, element * count, False)
        if isinstance(where, int):
            return self._views[where][element][self._index(where, address, element, count)]
        out = np.zeros((len(address), count), UNSIGNED[element])
        for k in np.unique(where):
            chosen = where == k
            index = self._index(k, address[chosen], element, count)
            out[chosen] = self._views[k][element][index]
        return out

    def store(self, instruction: Instruction, address: np.ndarray, values: np.ndarray) -> None:
        """values [n, count] of unsigned elements."""
        if not address.size:
            return
        element, count = values.itemsize, values.shape[1]
        where = self._locate(instruction, address, element * count, True)
        for k in np.unique(where):
            chosen = np.broadcast_to(where == k, address.shape)
            index = self._index(k, address[chosen], element, count)
            self._views[k][element][index] = values[chosen]

    def element(self, instruction: Instruction, address: int, dtype: type) -> np.ndarray:
        """A view of the one element at an address, for atomics."""
        size = dtype().itemsize
        number = self._locate(instruction, np.array([address], np.int64), size, True)
        assert isinstance(number, int)
        index = self._index(number, np.array([address], np.int64), size, 1)[0, 0]
        return self._views[number][size][index : index + 1].view(dtype)


_ADDRESS = re.compile(r"\[\s*([^\]+\-\s]+)\s*(?:([+-])\s*(-?)\s*(\w+))?\s*\]$")


@dataclass(frozen=True)
class Address:
    """Operand "[base + offset]": a register or a symbol, 32 or 64 bits wide."""

    row: int
    view: str
    offset: int

    @classmethod
    def parse(cls, text: str, registers: Registers) -> Address:
        match = _ADDRESS.match(text.strip())
        if match is None:
            raise SimulationError(f"address {text!r} is not understood")
        base, sign, minus, number = match.groups()
        offset = int(number, 0) if number else 0
        if (sign == "-") != (minus == "-"):
            offset = -offset
        found = registers.find(base)
        if found is None:
            return cls(registers.read(base, "u64"), "s64", offset)
        if found[0] not in (32, 64):
            raise SimulationError(f"address register {base} of {found[0]} bits")
        return cls(found[1], "u32" if found[0] == 32 else "s64", offset)

    def of(self, bank: Any, lanes: Any = slice(None)) -> np.ndarray:
        """Addresses of some threads of a bank, as int64."""
        base = bank.rows[self.view][self.row][lanes]
        address = base.astype(np.int64)
        return address + self.offset if self.offset else address


def lanes_of(mask: np.ndarray | None) -> Any:
    """What picks the active threads out of a row."""
    return slice(None) if mask is None else mask.nonzero()[0]
