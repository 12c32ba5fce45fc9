"""Launches through the CUDA driver, against a driver that the simulator plays."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.gpu_driver import Driver, Map

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "cuda" / "conformance"), str(ROOT / "tests" / "ptxsim")]
import conformance_engines as engines  # noqa: E402
import ptxsim  # noqa: E402
from conformance_probes import Box, probes  # noqa: E402


class Played:
    """libcuda, as far as a launch needs it: the simulator runs what is launched."""

    def __init__(self, memory: list, fails: str = "") -> None:
        self.memory, self.fails = memory, fails
        self.asked: list[int] = []
        self.names: list[bytes] = []

    def __getattr__(self, name: str):
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments):
            if name == self.fails:
                if name == "cuModuleLoadDataEx":
                    address = arguments[4][0]
                    ctypes.memmove(address, b"ptxas: no such opcode\0", 22)
                return 218
            return getattr(self, f"_{name}", lambda *x: 0)(*arguments)

        # ctypes' functions have a place for the type of their result.
        return type("Function", (), {"__call__": lambda self, *x: call(*x)})()

    def _cuGetErrorName(self, code, text) -> int:
        text._obj.value = b"CUDA_ERROR_INVALID_PTX"
        return 0

    def _cuModuleLoadDataEx(self, module, image, count, keys, values) -> int:
        assert list(keys) == [5, 6] and values[1] == 8192
        self.ptx = image.value.decode()
        module._obj.value = 7
        return 0

    def _cuModuleGetFunction(self, function, module, name) -> int:
        assert module.value == 7
        self.names.append(name.value)
        function._obj.value = len(self.names)
        return 0

    def _cuFuncSetAttribute(self, function, attribute, value) -> int:
        assert attribute.value == 8
        self.asked.append(value.value)
        return 0

    def _cuTensorMapEncodeTiled(self, to, kind, rank, address, dims, strides, box, steps, *how):
        assert to.value % 64 == 0 and kind.value == 1 and list(steps) == [1] * rank.value
        swizzle = {1: 32, 2: 64, 3: 128}[how[1].value]
        facts = (address.value, 2, tuple(dims), tuple(strides)[: rank.value - 1], tuple(box))
        ctypes.memmove(to.value, ptxsim.TensorMap(*facts, swizzle).to_bytes(), 128)
        return 0

    def _cuLaunchKernel(self, function, *facts) -> int:
        *_, threads, _, _, shared, _, pointers, _ = facts
        name = self.names[function.value - 1].decode()
        sizes = [128 if name.startswith("tma") and i == 0 else 8 for i in range(len(pointers))]
        params = b"".join(ctypes.string_at(p, n) for p, n in zip(pointers, sizes, strict=True))
        ptxsim.launch(self.ptx, name, 1, threads.value, shared.value, params, self.memory)
        return 0


@pytest.mark.skipif(engines.nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize("name", ["mma_s8", "wgmma_bf16_ss", "tma_64"])
def test_a_launch_gives_what_the_kernel_is_to_have(name: str):
    probe = next(p for p in probes() if p.name == name)
    out = np.zeros(probe.words, np.uint32)
    arrays = [x.tensor if isinstance(x, Box) else x for x in probe.inputs]
    given = [
        Map(x.tensor.ctypes.data, x.tensor.shape, x.tensor.strides, x.box, x.row_bytes)
        if isinstance(x, Box)
        else x.ctypes.data
        for x in probe.inputs
    ]
    cuda = Played([ptxsim.Region.of(x, f"array {i}") for i, x in enumerate([*arrays, out])])
    driver = Driver(cuda)
    ptx = engines.ptx_of(probe.source, engines.ARCHS[probe.source])
    for _ in range(2):
        driver.launch(ptx, name, probe.threads, probe.shared_bytes, [*given, out.ctypes.data])
    assert np.array_equal(out, engines.simulated(probe))
    assert len(cuda.names) == 1, "a module is loaded once"


def test_more_shared_memory_than_usual_is_asked_for(monkeypatch):
    cuda = Played([])
    monkeypatch.setattr(Played, "_cuLaunchKernel", lambda *x: 0)
    driver = Driver(cuda)
    driver.launch("ptx", "small", 32, 48 * 1024, [1])
    driver.launch("ptx", "large", 32, 100_000, [1])
    assert cuda.asked == [100_000]


def test_a_refusal_names_the_call_and_what_the_compiler_said():
    driver = Driver(Played([], fails="cuModuleLoadDataEx"))
    wanted = r"cuModuleLoadDataEx returned CUDA_ERROR_INVALID_PTX \(218\): ptxas: no such opcode"
    with pytest.raises(RuntimeError, match=wanted):
        driver.launch("ptx", "x", 32, 0, [])
