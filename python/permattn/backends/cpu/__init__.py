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
from permattn.backends.cpu.regions import (
    attend_regions,
    attend_regions_backward,
    why_not_regions,
)
from permattn.backends.cpu.routing import route, why_not_route

__all__ = [
    "ISAS",
    "NAME",
    "attend_regions",
    "attend_regions_backward",
    "available_isas",
    "backward",
    "forward",
    "isa",
    "load",
    "prepare",
    "probe",
    "route",
    "smoothing_of",
    "why_not",
    "why_not_probe",
    "why_not_regions",
    "why_not_route",
]
