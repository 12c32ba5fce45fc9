"""Executes the PTX of nvcc and Triton on the CPU, and finds what a GPU would not define."""

from . import (  # noqa: F401  (importing a module registers its opcodes)
    arithmetic,
    async_copy,
    atomics,
    barriers,
    bits,
    compare,
    convert,
    load_store,
    matrix,
    mbarrier,
    tma,
    warp_ops,
    wgmma,
)
from .errors import SimulationError, UnknownOpcode
from .launch import Report, compiled, launch
from .memory import Region
from .parse import entries_of
from .tma import TensorMap
from .wave import Options

__all__ = [
    "Options",
    "Region",
    "Report",
    "SimulationError",
    "TensorMap",
    "UnknownOpcode",
    "compiled",
    "entries_of",
    "launch",
]
