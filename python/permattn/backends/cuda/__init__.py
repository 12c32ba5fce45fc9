"""CUDA C++ kernels of the native library: forward, also over small numbers; no gradients."""

from permattn.backends.cuda.attention import (
    backward,
    forward,
    kernel_name,
    prepare,
    probe,
    why_not,
    why_not_probe,
)
from permattn.backends.cuda.device import NAME, describe

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
