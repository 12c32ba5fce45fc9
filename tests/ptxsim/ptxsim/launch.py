"""The way in: a kernel's PTX, its grid and its parameters."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import SimulationError
from .memory import GlobalMemory, Region
from .parse import Parameter, Program, parse
from .registers import PARAM_WINDOW, VIEWS, Registers
from .scheduler import Scheduler
from .steps import Step, compile_steps
from .tma import TensorMap
from .wave import Options, Wave, dynamic_start

# Vectors longer than this gain nothing from more blocks.
_THREADS_AT_ONCE = 1024
Size = int | Sequence[int]


@dataclass
class Report:
    """What a launch did.

    Args:
        steps: group steps that ran.
        statistics: counts by name, such as "ldmatrix bank conflicts".
        lines: of the PTX, that ran.
    """

    steps: int
    blocks: int
    statistics: dict[str, int] = field(default_factory=dict)
    lines: frozenset[int] = frozenset()


@dataclass
class Compiled:
    """A program that was read once, with its global and constant variables."""

    program: Program
    registers: Registers
    steps: list[Step]
    variables: dict[str, np.ndarray]


@functools.lru_cache(maxsize=32)
def compiled(ptx: str, entry: str | None = None) -> Compiled:
    """Reads a program and builds its steps; raises where an instruction is not known."""
    program = parse(ptx, entry)
    registers = Registers(program)
    variables = {}
    for v in program.variables.values():
        if v.space in ("global", "const"):
            # 16 more bytes, so that the base can be aligned.
            buffer = np.zeros(v.size + 16, np.uint8)
            start = -buffer.ctypes.data % 16
            variables[v.name] = buffer[start : start + v.size]
            variables[v.name][: len(v.data)] = np.frombuffer(v.data, np.uint8)
            registers.addresses[v.name] = variables[v.name].ctypes.data
        else:
            registers.addresses[v.name] = v.offset
    for name in program.dynamic:
        registers.addresses[name] = dynamic_start(program.shared_bytes)
    for p in program.parameters:
        registers.addresses[p.name] = PARAM_WINDOW + p.offset
    return Compiled(program, registers, compile_steps(registers), variables)


def launch(
    ptx: str,
    entry: str | None,
    grid: Size,
    block: Size,
    shared_bytes: int,
    params: bytes | Sequence[Any],
    memory: Sequence[Any] = (),
    tensor_maps: dict[int, TensorMap] | None = None,
    **options: Any,
) -> Report:
    """Executes a kernel.

    Args:
        ptx: a module.
        entry: the kernel's name; None where the module has one.
        grid, block: up to three sizes.
        shared_bytes: of dynamic shared memory.
        params: the bytes of all parameters as a launch would pass them, or a list of values:
            numbers, arrays and tensors (their pointer is passed), `TensorMap`, bytes.
        memory: what the kernel may touch: `Region`, or arrays and tensors, whose whole storage
            counts. Arrays among `params` are added by themselves.
        tensor_maps: records to put into the parameters, by byte offset.
        options: see `Options`.
    """
    made = compiled(ptx, entry)
    chosen = Options(**options)
    grid_, block_ = _three(grid), _three(block)
    threads = int(np.prod(block_))
    if made.program.threads is not None and made.program.threads != threads:
        raise SimulationError(f"the kernel wants {made.program.threads} threads, not {threads}")
    if not 0 < threads <= 1024:
        raise SimulationError(f"{threads} threads in a block")
    regions = [_region(x) for x in memory]
    if isinstance(params, (bytes, bytearray)):
        packed = bytearray(params)
        if len(packed) < made.program.parameter_bytes:
            wanted = made.program.parameter_bytes
            raise SimulationError(f"{len(packed)} bytes of parameters, {wanted} wanted")
    else:
        packed, pointers = _pack(made.program.parameters, params)
        known = {r.address for r in regions}
        regions += [r for r in pointers if r.address not in known]
    for offset, tensor in (tensor_maps or {}).items():
        packed[offset : offset + 128] = tensor.to_bytes()
    regions += [
        Region(name, array.ctypes.data, array.nbytes) for name, array in made.variables.items()
    ]
    buffer = np.zeros(-(-max(len(packed), 16) // 16) * 16, np.uint8)
    buffer[: len(packed)] = np.frombuffer(bytes(packed), np.uint8)
    return _run(made, grid_, block_, shared_bytes, buffer, GlobalMemory(regions), chosen)


def _run(made, grid, block, shared_bytes, parameters, memory, options: Options) -> Report:
    blocks = [(x, y, z) for z, y, x in itertools.product(*(range(n) for n in reversed(grid)))]
    at_once = options.blocks_at_once or _blocks_at_once(made, int(np.prod(block)))
    at_once = max(1, min(at_once, len(blocks)))
    facts = (block, shared_bytes, parameters, memory, at_once, options)
    scheduler = Scheduler(Wave(made.registers, made.steps, *facts))
    with np.errstate(all="ignore"):
        for first in range(0, len(blocks), at_once):
            scheduler.run(blocks[first : first + at_once], grid)
    ran = (s.instruction.line for s, was in zip(made.steps, scheduler.ran, strict=True) if was)
    statistics = dict(scheduler.wave.statistics)
    return Report(scheduler.steps_run, len(blocks), statistics, frozenset(ran))


def _blocks_at_once(made: Compiled, threads: int) -> int:
    """Warpgroups must not straddle blocks, and blocks that specialise their warps run alone."""
    uses = {p for s in made.steps for p in s.instruction.parts[:1]}
    if "mbarrier" in uses or ("wgmma" in uses and threads % 128):
        return 1
    return max(1, _THREADS_AT_ONCE // threads)


def _three(size: Size) -> tuple[int, int, int]:
    sizes = (size,) if isinstance(size, int) else tuple(int(n) for n in size)
    padded = (*sizes, 1, 1)
    return padded[0], padded[1], padded[2]


def _region(x: Any) -> Region:
    return x if isinstance(x, Region) else Region.of(x)


def _pack(parameters: list[Parameter], values: Sequence[Any]) -> tuple[bytearray, list[Region]]:
    """Bytes of the parameters; missing values at the end are zero."""
    packed = bytearray(max((p.offset + p.size for p in parameters), default=0))
    regions = []
    if len(values) > len(parameters):
        raise SimulationError(f"{len(values)} values for {len(parameters)} parameters")
    for parameter, value in zip(parameters, values, strict=False):
        if isinstance(value, (bytes, bytearray)):
            data = bytes(value)
        elif isinstance(value, TensorMap):
            data = value.to_bytes()
        elif hasattr(value, "data_ptr"):
            regions.append(Region.of(value, parameter.name))
            data = int(value.data_ptr()).to_bytes(8, "little")
        elif isinstance(value, np.ndarray):
            regions.append(Region.of(value, parameter.name))
            data = int(value.ctypes.data).to_bytes(8, "little")
        elif parameter.kind[0] == "f":
            data = VIEWS[parameter.kind](value).tobytes()
        else:
            data = (int(value) & ((1 << 8 * parameter.size) - 1)).to_bytes(parameter.size, "little")
        if len(data) > parameter.size:
            raise SimulationError(f"{len(data)} bytes for parameter {parameter.name}")
        packed[parameter.offset : parameter.offset + len(data)] = data
    return packed, regions
