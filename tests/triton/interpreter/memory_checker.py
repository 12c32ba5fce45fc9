"""Every load and store of a launch, held against the tensors that the launch was given.

Caught: an address outside every tensor argument (with the lanes and the tensor), a misaligned one,
    two
programs that store one element, a program that loads what another program of the same launch
stored, one store that writes an element twice. Programs of the interpreter run one after another,
so such races give no wrong number there; on a GPU they do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.utils.deterministic
import triton.runtime.interpreter as stock

Builder = stock.InterpreterBuilder


@contextlib.contextmanager
def untouched_memory() -> Iterator[None]:
    """Inside, `torch.empty` leaves new memory alone even where tests fill it with NaN."""
    settings = torch.utils.deterministic
    before = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = before


class KernelMemoryError(AssertionError):
    """A launch touched memory that it must not touch."""


@dataclass
class Region:
    """The bytes of one or several overlapping tensor arguments, and who stored which of them."""

    begin: int
    end: int
    name: str
    # Program number + 1 of the last store of an element, and the element size; made on the first
    # store.
    writer: np.ndarray | None = None
    size: int = 0


class Checker:
    """State of the launch under way. `enabled` and `races` may be switched off by a test."""

    def __init__(self) -> None:
        self.enabled = True
        self.races = True
        self.launches = 0
        self.regions: list[Region] = []
        self._begins = np.zeros(0, np.uint64)
        self._ends = np.zeros(0, np.uint64)

    def begin_launch(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        spans = []
        for name, x in tensors:
            if x.numel():
                last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
                begin = x.data_ptr()
                spans.append(Region(begin, begin + (last + 1) * x.element_size(), name))
        self.regions = []
        for span in sorted(spans, key=lambda s: s.begin):
            if self.regions and span.begin < self.regions[-1].end:
                before = self.regions[-1]
                before.end, before.name = max(before.end, span.end), f"{before.name}|{span.name}"
            else:
                self.regions.append(span)
        self._begins = np.array([r.begin for r in self.regions], np.uint64)
        self._ends = np.array([r.end for r in self.regions], np.uint64)
        self.launches += 1

    def check(self, pointers: Any, mask: np.ndarray, kind: str) -> None:
        """Raises KernelMemoryError unless every unmasked address of the access is in place."""
        if not self.enabled:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        shape = np.broadcast_shapes(pointers.data.shape, mask.shape)
        address = np.broadcast_to(pointers.data, shape)[np.broadcast_to(mask, shape)]
        if address.size == 0:
            return
        address = address.astype(np.uint64)
        which = self._region_of(address, size, kind)
        if (address % np.uint64(size)).any():
            raise KernelMemoryError(f"{kind} misaligned in program {_program()}")
        if self.races:
            for i in np.unique(which):
                region = self.regions[i]
                element = (address[which == i] - np.uint64(region.begin)).astype(np.int64) // size
                self._check_races(region, element, size, kind)

    def _region_of(self, address: np.ndarray, size: int, kind: str) -> np.ndarray:
        which = np.searchsorted(self._begins, address, side="right").astype(np.int64) - 1
        inside = np.zeros(address.shape, bool)
        if self.regions:
            known = np.maximum(which, 0)
            inside = (which >= 0) & (address + np.uint64(size) <= self._ends[known])
        if not inside.all():
            bad = int(address[~inside][0])
            near = "no tensor at all"
            if self.regions:
                region = self.regions[max(int(which[~inside][0]), 0)]
                near = f"'{region.name}' of {region.end - region.begin} bytes"
                near = f"{bad - region.begin} bytes into {near}"
            raise KernelMemoryError(
                f"{kind} out of bounds in program {_program()}: "
                f"{int((~inside).sum())}/{address.size} lanes, the first one {near}"
            )
        return which

    def _check_races(self, region: Region, element: np.ndarray, size: int, kind: str) -> None:
        me = _program_number() + 1
        if region.writer is None:
            if kind == "load":
                return
            region.writer = np.zeros((region.end - region.begin) // size + 1, np.int32)
            region.size = size
        if region.size != size:
            return
        last = region.writer[element]
        # Stores leave +program, atomics -program: only atomics may meet atomics.
        foreign = (last != 0) & (np.abs(last) != me)
        if kind == "atomic":
            foreign &= last > 0
        if foreign.any():
            other, where = abs(int(last[foreign][0])) - 1, int(element[foreign][0])
            raise KernelMemoryError(
                f"race: program {_program()} does a {kind} of element {where} of '{region.name}', "
                f"which program number {other} of this launch stored"
            )
        if kind == "load":
            return
        if kind == "store" and np.unique(element).size != element.size:
            raise KernelMemoryError(
                f"program {_program()} stores an element of '{region.name}' twice in one store"
            )
        region.writer[element] = me if kind == "store" else -me


def _program() -> tuple[int, ...]:
    return tuple(stock.interpreter_builder.grid_idx)


def _program_number() -> int:
    x, y, z = stock.interpreter_builder.grid_idx
    _, ny, nz = stock.interpreter_builder.grid_dim
    return (x * ny + y) * nz + z


def install() -> Checker:
    """Hooks a Checker into every memory operation of the interpreter."""
    checker = Checker()
    for method, kind, mask in (
        ("create_masked_load", "load", 1),
        ("create_masked_store", "store", 2),
        ("create_atomic_rmw", "atomic", 3),
        ("create_atomic_cas", "atomic", None),
    ):
        _hook(checker, method, kind, mask)
    _hook_launch(checker)
    return checker


def _hook(checker: Checker, method: str, kind: str, mask: int | None) -> None:
    """Checks before every call of a method; `mask` is the place of the mask among its arguments."""
    original = getattr(Builder, method)

    def checked(self, *args):
        pointers = args[1] if method == "create_atomic_rmw" else args[0]
        lanes = args[mask].data if mask else np.ones(pointers.data.shape, bool)
        checker.check(pointers, lanes, kind)
        return original(self, *args)

    setattr(Builder, method, checked)


def _hook_launch(checker: Checker) -> None:
    """Takes note of a launch's tensors, and patches the language once a launch, not once a call."""
    stock_init = stock.GridExecutor._init_args_hst
    patched: set[int] = set()

    def init_args(self, args_dev, kwargs):
        args, named = stock_init(self, args_dev, kwargs)
        tensors: list[tuple[str, torch.Tensor]] = []
        for name, value in (*zip(self.arg_names, args, strict=False), *named.items()):
            _collect(name, value, tensors)
        checker.begin_launch(tensors)
        patched.clear()
        return args, named

    def call(self, *args, **kwargs):
        key = id(self.fn.__globals__)
        if key not in patched:
            stock._patch_lang(self.fn)
            patched.add(key)
        try:
            return self.rewrite()(*args, **kwargs)
        except stock.InterpreterError:
            raise
        except Exception as e:
            raise stock.InterpreterError(repr(e)) from e

    stock.GridExecutor._init_args_hst = init_args
    stock.InterpretedFunction.__call__ = call


def _collect(name: str, value: Any, found: list[tuple[str, torch.Tensor]]) -> None:
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            _collect(f"{name}[{i}]", item, found)
    elif isinstance(value, torch.Tensor):
        found.append((name, value))
    elif isinstance(getattr(value, "base", None), torch.Tensor):
        found.append((name, value.base))
