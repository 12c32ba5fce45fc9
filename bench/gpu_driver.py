"""Kernels in PTX on a device, through the CUDA driver alone: no compiler and no library of ours."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_SUCCESS = 0
_LOG_BYTES = 8192
# CUjit_option: CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES.
_ERROR_LOG, _ERROR_LOG_BYTES = 5, 6
# CUfunction_attribute: CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES.
_MOST_SHARED = 8
_UNASKED_SHARED = 48 * 1024
# Of cuTensorMapEncodeTiled.
_UINT16, _NO_INTERLEAVE, _L2_256, _ZEROS = 1, 0, 3, 0
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}


@dataclass(frozen=True)
class Map:
    """A tensor of 16-bit numbers on the device, and the boxes that are copied out of it.

    Args:
        shape, strides, box: as the tensor's axes, the innermost last; strides in bytes.
        swizzle: 0, 32, 64 or 128 bytes.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int


class Driver:
    """The calls that a launch needs, each checked.

    Args:
        library: libcuda; None loads it.
    """

    def __init__(self, library: Any = None) -> None:
        self.cuda = ctypes.CDLL("libcuda.so.1") if library is None else library
        self.functions: dict[tuple[str, str], ctypes.c_void_p] = {}
        self._check("cuInit", ctypes.c_uint(0))

    def launch(
        self,
        ptx: str,
        name: str,
        threads: int,
        shared_bytes: int,
        arguments: Sequence[int | Map],
    ) -> None:
        """One block of a kernel, in the context of this thread, and waits for it.

        Args:
            arguments: addresses on the device, and tensor maps.

        Raises:
            RuntimeError: the driver refuses something; names the call, its error and its log.
        """
        function = self._function(ptx, name)
        if shared_bytes > _UNASKED_SHARED:
            self._check(
                "cuFuncSetAttribute",
                function,
                ctypes.c_int(_MOST_SHARED),
                ctypes.c_int(shared_bytes),
            )
        held = [self._encode(x) if isinstance(x, Map) else ctypes.c_uint64(x) for x in arguments]
        pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(x) for x in held))
        one = ctypes.c_uint(1)
        self._check(
            "cuLaunchKernel",
            *(function, one, one, one, ctypes.c_uint(threads), one, one),
            *(ctypes.c_uint(shared_bytes), ctypes.c_void_p(None), pointers, ctypes.c_void_p(None)),
        )
        self._check("cuCtxSynchronize")

    def _function(self, ptx: str, name: str) -> ctypes.c_void_p:
        if (ptx, name) not in self.functions:
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            log = ctypes.create_string_buffer(_LOG_BYTES)
            keys = (ctypes.c_int * 2)(_ERROR_LOG, _ERROR_LOG_BYTES)
            values = (ctypes.c_void_p * 2)(ctypes.addressof(log), _LOG_BYTES)
            image = ctypes.c_char_p(ptx.encode())
            facts = (ctypes.c_uint(2), keys, values)
            self._check("cuModuleLoadDataEx", ctypes.byref(module), image, *facts, log=log)
            named = ctypes.c_char_p(name.encode())
            self._check("cuModuleGetFunction", ctypes.byref(function), module, named)
            self.functions[ptx, name] = function
        return self.functions[ptx, name]

    def _encode(self, x: Map) -> Any:
        """128 bytes at a multiple of 64."""
        rank = len(x.shape)
        buffer = ctypes.create_string_buffer(128 + 64)
        aligned = -(-ctypes.addressof(buffer) // 64) * 64
        made = (ctypes.c_char * 128).from_address(aligned)
        made.keeps = buffer  # type: ignore[attr-defined]
        dims = (ctypes.c_uint64 * rank)(*reversed(x.shape))
        strides = (ctypes.c_uint64 * rank)(*reversed(x.strides[:-1]))
        box = (ctypes.c_uint32 * rank)(*reversed(x.box))
        steps = (ctypes.c_uint32 * rank)(*([1] * rank))
        self._check(
            "cuTensorMapEncodeTiled",
            *(ctypes.c_void_p(aligned), ctypes.c_int(_UINT16), ctypes.c_uint32(rank)),
            *(ctypes.c_void_p(x.address), dims, strides, box, steps),
            *(ctypes.c_int(_NO_INTERLEAVE), ctypes.c_int(_SWIZZLES[x.swizzle])),
            *(ctypes.c_int(_L2_256), ctypes.c_int(_ZEROS)),
        )
        return made

    def _check(self, name: str, *arguments: Any, log: Any = None) -> None:
        call = getattr(self.cuda, name)
        call.restype = ctypes.c_int
        code = call(*arguments)
        if code == _SUCCESS:
            return
        text = ctypes.c_char_p()
        self.cuda.cuGetErrorName(ctypes.c_int(code), ctypes.byref(text))
        said = "" if log is None else ": " + log.value.decode(errors="replace").strip()
        error = (text.value or b"unknown").decode()
        raise RuntimeError(f"CUDA error: {name} returned {error} ({code}){said}")
