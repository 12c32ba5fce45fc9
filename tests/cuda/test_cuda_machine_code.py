"""Kernels compiled for GPUs that are not here: no spills, and their matrix instructions."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import machine_code
import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="nvcc is not installed"),
    pytest.mark.skipif(machine_code.tools() is None, reason="triton (its tools) is not installed"),
]
# (dtype, Q K^T, P V, head dim, rows of a tile) of every kind of kernel.
KERNELS = (
    ("kBFloat16", "kNone", "kNone", 64, 128),
    ("kFloat16", "kNone", "kNone", 128, 64),
    ("kBFloat16", "kNone", "kNone", 128, 128),
    ("kBFloat16", "kInt8", "kNone", 128, 128),
    ("kFloat32", "kInt8", "kInt8", 96, 64),
    ("kFloat32", "kInt8", "kInt4", 128, 64),
    ("kFloat32", "kInt4", "kInt4", 64, 64),
    ("kFloat32", "kInt8", "kFp8", 128, 64),
)
ARCHS = (80, 89, 90, 120)
FP8_ARCHS = (89, 120)
FIRST_WITHOUT_INT4 = 90
WORDS = {"kNone": "16", "kInt8": "int8", "kInt4": "int4", "kFp8": "fp8"}
CASES = [
    (*kernel, arch)
    for kernel in KERNELS
    for arch in ARCHS
    if not ("kFp8" in kernel and arch not in FP8_ARCHS)
    and not ("kInt4" in kernel and arch >= FIRST_WITHOUT_INT4)
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_compiles_without_spills_to_matrix_instructions(tmp_path, case):
    dtype, qk, pv, dim, rows, arch = case
    source, cubin = tmp_path / "kernel.cu", tmp_path / f"kernel.sm_{arch}.cubin"
    traits = f"Traits<Dtype::{dtype}, Format::{qk}, Format::{pv}, {dim}, {rows}>"
    source.write_text(
        '#include "cuda/sm80/kernel.cuh"\n'
        "namespace permattn::sm80 {\n"
        f"template __global__ void attention_kernel<{traits}>(const __grid_constant__ "
        "AttentionArgs);\n}\n"
    )
    command = [
        NVCC,
        "-std=c++20",
        "-O3",
        f"-I{CSRC}",
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
    ]
    done = subprocess.run(
        [*command, "-Xptxas", "-warn-spills,-Werror", "-cubin", "-o", cubin, source],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (row,) = machine_code.rows_of_cubin(machine_code.tools(), cubin)
    assert row["kernel"].startswith("sm80::attention_kernel<")
    assert (row["spills"], row["stack"]) == (0, 0)
    assert row["registers"] <= machine_code.REGISTER_LIMIT
    wanted = {machine_code.MMA_OPCODE[WORDS[x]] for x in (qk, pv)}
    assert wanted <= set(row["matrix"]), row
    assert row["copies"]["LDGSTS"] > 0
