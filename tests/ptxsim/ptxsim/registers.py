"""Registers, constants and special values as rows of arrays that every thread has a column of."""

from __future__ import annotations

import re
import struct

import numpy as np

from .errors import SimulationError
from .parse import TYPE_BYTES, Program

# Generic addresses: host memory lies far below, every other space is a window of its own.
SHARED_WINDOW = 1 << 56
PARAM_WINDOW = 1 << 57
LOCAL_WINDOW = 1 << 58

VIEWS = {
    "b8": np.uint8,
    "u8": np.uint8,
    "s8": np.int8,
    "b16": np.uint16,
    "u16": np.uint16,
    "s16": np.int16,
    "f16": np.float16,
    "bf16": np.uint16,
    "b32": np.uint32,
    "u32": np.uint32,
    "s32": np.int32,
    "f32": np.float32,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "tf32": np.uint32,
    "b64": np.uint64,
    "u64": np.uint64,
    "s64": np.int64,
    "f64": np.float64,
    "f32x2": np.uint64,
}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_FILE_TYPE = {1: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_SPECIAL = {
    **{f"%{name}.{axis}": 32 for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"},
    **{f"%cluster_{name}.{axis}": 32 for name in ("ctaid", "nctaid") for axis in "xyz"},
    **{f"%clusterid.{axis}": 32 for axis in "xyz"},
    **{f"%nclusterid.{axis}": 32 for axis in "xyz"},
    **{f"%{name}": 32 for name in ("laneid", "warpid", "nwarpid", "smid", "nsmid", "clock")},
    **{f"%lanemask_{name}": 32 for name in ("eq", "lt", "le", "gt", "ge")},
    **{f"%cluster_{name}": 32 for name in ("ctarank", "nctarank")},
    **{f"%{name}": 32 for name in ("dynamic_smem_size", "total_smem_size")},
    "%clock64": 64,
    "%globaltimer": 64,
    "%gridid": 64,
}
_NUMBER = re.compile(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$")


def bits_of(kind: str) -> int:
    """Width of a register of a type; bytes live in registers of 16 bits."""
    return 1 if kind == "pred" else max(16, 8 * TYPE_BYTES["b64" if kind == "f32x2" else kind])


class Registers:
    """Gives every register, constant and special value of a program a row.

    Rows are numbered inside the file of their width (1, 16, 32 or 64 bits).
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.count = dict.fromkeys(_FILE_TYPE, 0)
        self.constants: dict[tuple[int, int], int] = {}
        self.special: dict[str, tuple[int, int]] = {}
        self._known: dict[str, tuple[int, int]] = {}
        # Filled by the launch: addresses of .global and .const variables, and of shared memory.
        self.addresses: dict[str, int] = {}
        # Rows that the instruction in hand names, and those that it writes: {(bits, row)}.
        self.touched: set[tuple[int, int]] = set()
        self.written: set[tuple[int, int]] = set()

    def _row(self, bits: int) -> int:
        self.count[bits] += 1
        return self.count[bits] - 1

    def find(self, name: str) -> tuple[int, int] | None:
        """(bits, row) of a register or a special value; None for anything else."""
        if name not in self._known:
            declared = self.program.registers
            kind = declared.get(name)
            if kind is None and (match := re.match(r"(%?[A-Za-z_$]+[A-Za-z_$0-9]*?)\d+$", name)):
                kind = declared.get(match.group(1))
            if kind is not None:
                bits = bits_of(kind)
            elif name in _SPECIAL:
                bits = _SPECIAL[name]
            else:
                return None
            self._known[name] = (bits, self._row(bits))
            if kind is None:
                self.special[name] = self._known[name]
        self.touched.add(self._known[name])
        return self._known[name]

    def read(self, text: str, kind: str) -> int:
        """Row of an operand that is read as a type: a register of its width or a constant."""
        bits = bits_of(kind)
        found = self.find(text)
        if found is None:
            return self.constant(bits, self._value(text, kind))
        if found[0] != bits:
            raise SimulationError(f"{text} has {found[0]} bits, {kind} has {bits}")
        return found[1]

    def write(self, text: str, kind: str) -> int:
        """Row of a destination; "_" is a row that nobody reads."""
        if text == "_":
            return self.constant(bits_of(kind), -1)
        found = self.find(text)
        if found is None or found[0] != bits_of(kind):
            raise SimulationError(f"{text} cannot hold {kind}")
        self.written.add(found)
        return found[1]

    def loose(self, text: str, kind: str, *, writes: bool = False) -> tuple[int, int]:
        """(bits, row) where the register may be wider than the type, as in loads and cvt."""
        if text == "_":
            return bits_of(kind), self.constant(bits_of(kind), -1)
        found = self.find(text)
        if found is None:
            return bits_of(kind), self.read(text, kind)
        if found[0] < 8 * VIEWS[kind]().itemsize:
            raise SimulationError(f"{text} has {found[0]} bits, too few for {kind}")
        if writes:
            self.written.add(found)
        return found

    def constant(self, bits: int, value: int) -> int:
        # -1 is the row for results that nobody wants; values themselves are not negative.
        key = (bits, value)
        if key not in self.constants:
            self.constants[key] = self._row(bits)
        return self.constants[key]

    def _value(self, text: str, kind: str) -> int:
        """Bit pattern of a literal or the address of a symbol."""
        bits = bits_of(kind)
        if text in self.addresses:
            return self.addresses[text]
        if kind == "pred":
            return int(text in ("true", "1", "-1"))
        if match := re.match(r"(-?)0[fF]([0-9a-fA-F]{8})$", text):
            pattern = int(match.group(2), 16) ^ (0x80000000 if match.group(1) else 0)
            if bits != 32:
                value = struct.unpack("<f", struct.pack("<I", pattern))[0]
                return struct.unpack("<Q", struct.pack("<d", value))[0]
            return pattern
        if match := re.match(r"0[dD]([0-9a-fA-F]{16})$", text):
            pattern = int(match.group(1), 16)
            if bits == 32:
                value = struct.unpack("<d", struct.pack("<Q", pattern))[0]
                return struct.unpack("<I", struct.pack("<f", value))[0]
            return pattern
        if match := _NUMBER.match(text):
            number = int(match.group(2), 0) * (-1 if match.group(1) else 1)
            if kind in ("f32", "f64"):
                form = "<fI" if kind == "f32" else "<dQ"
                packed = struct.pack(form[:2], number)
                return struct.unpack(form[0] + form[2], packed)[0]
            return number & ((1 << bits) - 1)
        raise SimulationError(f"operand {text!r} is not understood")


class Files:
    """The rows of all registers for `threads` threads."""

    def __init__(self, registers: Registers, threads: int) -> None:
        self.registers = registers
        self.arrays = {
            bits: np.zeros((max(1, n), threads), _FILE_TYPE[bits])
            for bits, n in registers.count.items()
        }
        for (bits, value), row in registers.constants.items():
            self.arrays[bits][row] = max(value, 0)

    def set_special(self, name: str, value: np.ndarray | int) -> None:
        if name in self.registers.special:
            bits, row = self.registers.special[name]
            self.arrays[bits][row] = value

    def rows(self, first: int, last: int) -> dict[str, list[np.ndarray]]:
        """By type, the rows of its width cut to a range of threads."""
        views = {"pred": list(self.arrays[1][:, first:last])}
        for kind, dtype in VIEWS.items():
            if dtype().itemsize == 1:
                continue  # bytes are taken out of wider registers
            array = self.arrays[8 * dtype().itemsize]
            views[kind] = list(array.view(dtype)[:, first:last])
        return views


def put(row: np.ndarray, value: np.ndarray, mask: np.ndarray | None) -> None:
    """Writes a result where the mask holds."""
    if mask is None:
        row[...] = value
    else:
        np.copyto(row, value, where=mask)
