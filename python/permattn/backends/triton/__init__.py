"""Triton kernels on CUDA devices; Triton itself is imported inside functions."""

from permattn.backends.triton.attention import (
    backward,
    backward_kernels,
    block_mass,
    block_mass_kernels,
    forward,
    forward_kernels,
    kernel_parts,
    prepare,
    probe,
    probe_kernels,
    why_not,
    why_not_block_mass,
    why_not_probe,
)
from permattn.backends.triton.device import INTERPRETED, NAME
from permattn.backends.triton.regions import (
    attend_regions,
    attend_regions_backward,
    region_backward_kernels,
    region_forward_kernels,
    route,
    route_kernels,
    why_not_regions,
    why_not_route,
)

__all__ = [
    "INTERPRETED",
    "NAME",
    "attend_regions",
    "attend_regions_backward",
    "backward",
    "backward_kernels",
    "block_mass",
    "block_mass_kernels",
    "forward",
    "forward_kernels",
    "kernel_parts",
    "prepare",
    "probe",
    "probe_kernels",
    "region_backward_kernels",
    "region_forward_kernels",
    "route",
    "route_kernels",
    "why_not",
    "why_not_block_mass",
    "why_not_probe",
    "why_not_regions",
    "why_not_route",
]
