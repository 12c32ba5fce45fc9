"""CUDA C++ kernels of the native library: forward, also over small numbers, and the probe; no
gradients."""

from permattn.backends.cuda.attention import (
    backward,
    forward,
    kernel_name,
    prepare,
    why_not,
)
from permattn.backends.cuda.device import NAME, describe
from permattn.backends.cuda.lists import CudaLists
from permattn.backends.cuda.probe import probe, why_not_probe
from permattn.core import list_kernels

list_kernels.register(CudaLists())

__all__ = [
    "NAME",
    "backward",
    "describe",
    "forward",
    "kernel_name",
    "prepare",
    "probe",
    "why_not",
    "why_not_probe",
]
