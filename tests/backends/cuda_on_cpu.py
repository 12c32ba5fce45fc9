"""The CUDA operators for CPU tensors: the module of tests/cuda_shim as the backend loads it."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from permattn.backends.cuda import device
from permattn.core import native

SHIM_FOLDER = Path(__file__).parents[1] / "cuda_shim"


@pytest.fixture(scope="session")
def shim_path() -> str:
    """A module that was built before, or one built now."""
    if native.load() is not None:
        pytest.skip(str(native.load()))
    given = os.environ.get("PERMATTN_CUDA_SHIM")
    if given:
        return given
    sys.path.insert(0, str(SHIM_FOLDER))
    import build

    why = build.why_not()
    if why is not None:
        pytest.skip(why)
    build.module()
    return str(build.FOLDER / (build.NAME + sysconfig.get_config_var("EXT_SUFFIX")))


@pytest.fixture
def on_cpu(shim_path, monkeypatch):
    """The backend as PERMATTN_CUDA_SHIM makes it; call it with a compute capability to play."""
    monkeypatch.setattr(device, "SHIM", shim_path)
    why = device.load_kernels.__wrapped__()
    assert why is None, why
    if not torch._C._dispatch_has_kernel_for_dispatch_key("permattn_native::cuda_attend", "CPU"):
        pytest.skip("the module has no operators")
    monkeypatch.setattr(device, "load_kernels", lambda: None)

    def play(capability: int) -> None:
        monkeypatch.setattr(device, "shim_capability", capability)

    play(80)
    return play


@pytest.fixture
def one_thread():
    """What torch adds up here is small, and its threads would wait for those of other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
