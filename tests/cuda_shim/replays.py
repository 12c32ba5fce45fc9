"""Launches of kernels recorded with their memory, and run again in code compiled with checks.

A recording runs as ever in the module of `build.module()`; what it leaves in memory is what every
other way of running it must leave, to the last bit.
"""

from __future__ import annotations

import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import build
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel; its parameters are bytes with host pointers inside."""

    kernel: str
    blocks: int
    threads: int
    shared_bytes: int
    parameters: bytes


@dataclass(frozen=True, eq=False)
class Region:
    """Memory of a tensor, whole, before and after the launches.

    Args:
        is_scratch: what it held before means nothing.
    """

    tensor: Tensor
    before: bytes
    is_scratch: bool = False

    @property
    def address(self) -> int:
        return self.tensor.untyped_storage().data_ptr()

    def bytes_now(self) -> bytes:
        storage = self.tensor.untyped_storage()
        return bytes(torch.tensor([], dtype=torch.uint8).set_(storage).numpy())


@dataclass(frozen=True, eq=False)
class Recording:
    """Launches in their order, the memory they were given, and what they left in it."""

    launches: tuple[Launch, ...]
    regions: tuple[Region, ...]
    after: tuple[bytes, ...]

    def to_bytes(self) -> bytes:
        """As replay/file.h reads it."""
        parts = [struct.pack("<Q", len(self.regions))]
        for r in self.regions:
            parts += [struct.pack("<QQQ", r.address, len(r.before), not r.is_scratch), r.before]
        parts.append(struct.pack("<Q", len(self.launches)))
        for x in self.launches:
            facts = struct.pack("<QQQ", x.blocks, x.threads, x.shared_bytes)
            parts += [_text(x.kernel.encode()), facts, _text(x.parameters)]
        return b"".join(parts)


def _text(x: bytes) -> bytes:
    return struct.pack("<Q", len(x)) + x


def _regions(tensors: Iterable[Tensor], is_scratch: bool = False) -> dict[int, Region]:
    found: dict[int, Region] = {}
    for x in tensors:
        if x.numel():
            region = Region(x, b"", is_scratch)
            found[region.address] = Region(x, region.bytes_now(), is_scratch)
    return found


def record(shim: ModuleType, run: Callable[[], object], tensors: Iterable[Tensor]) -> Recording:
    """Runs `run`, whose launches touch `tensors` alone, and remembers it."""
    regions = _regions(tensors)
    launches = _launches_of(shim, run)
    kept = tuple(regions.values())
    return Recording(launches, kept, tuple(r.bytes_now() for r in kept))


def record_operator(shim: ModuleType, name: str, *args: Any) -> Recording:
    """A CUDA operator of the module on tensors of the CPU, with what scratch it asks for."""
    operator = getattr(torch.ops.permattn_native, name).default
    mode = _Scratch(operator)
    regions = _regions(_tensors_in(args))

    def run() -> None:
        with mode:
            operator(*args)

    launches = _launches_of(shim, run)
    regions |= _regions(mode.made, is_scratch=True)
    kept = tuple(regions.values())
    return Recording(launches, kept, tuple(r.bytes_now() for r in kept))


def _launches_of(shim: ModuleType, run: Callable[[], object]) -> tuple[Launch, ...]:
    shim.take_recorded()
    shim.set_recording(True, True)
    try:
        run()
    finally:
        shim.set_recording(False, True)
    return tuple(Launch(*facts) for facts in shim.take_recorded())


def _tensors_in(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    return [t for y in x for t in _tensors_in(y)] if isinstance(x, list | tuple) else []


class _Scratch(TorchDispatchMode):
    """Keeps what an operator allocates while it runs."""

    def __init__(self, operator: Any) -> None:
        super().__init__()
        self.operator = operator
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is self.operator:
            keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
            with self:
                return func.redispatch(keys, *args, **(kwargs or {}))
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.made.append(made)
        return made


@dataclass(frozen=True)
class Outcome:
    """How a checked run ended: 0, or what replay/replay.cpp says; and what it told."""

    status: int
    told: str
    memory: tuple[bytes, ...] = ()


def replay(checks: str, recording: Recording, *options: str) -> Outcome:
    """Runs a recording in the program of some checks: "memory" or "races"."""
    with tempfile.TemporaryDirectory() as folder:
        given, left = Path(folder, "given"), Path(folder, "left")
        given.write_bytes(recording.to_bytes())
        done = _run(checks, *options, str(given), str(left))
        memory, rest = [], left.read_bytes() if left.exists() else b""
    for region in recording.regions if rest else ():
        size = len(region.before)
        memory.append(rest[:size])
        rest = rest[size:]
    return Outcome(done.returncode, done.stderr, tuple(memory))


def replay_planted(checks: str, name: str, *options: str) -> Outcome:
    """Runs a kernel of replay/planted.cpp."""
    done = _run(checks, *options, "--planted", name)
    return Outcome(done.returncode, done.stderr)


def _run(checks: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([build.program(checks), *words], capture_output=True, text=True)
