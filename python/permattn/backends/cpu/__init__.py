"""Native C++ kernels: AMX, AVX-512, AVX2 or portable vectors, chosen at run time."""

from permattn.backends.cpu.attention import (
    backward,
    forward,
    prepare,
    probe,
    smoothing_of,
    why_not,
    why_not_probe,
)
from permattn.backends.cpu.library import ISAS, NAME, available_isas, isa, load

__all__ = [
    "ISAS",
    "NAME",
    "available_isas",
    "backward",
    "forward",
    "isa",
    "load",
    "prepare",
    "probe",
    "smoothing_of",
    "why_not",
    "why_not_probe",
]
