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

__all__ = [
    "INTERPRETED",
    "NAME",
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
    "why_not",
    "why_not_block_mass",
    "why_not_probe",
]
