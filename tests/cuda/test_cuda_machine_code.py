"""Kernels compiled for GPUs that are not here: the committed table, and what compiles now."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess

import machine_code
import machine_code_page
import machine_code_table as table
import pytest
from permattn.core import native

CSRC = table.ROOT / "csrc"
CUDA = CSRC / "cuda"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
NEEDS_TOOLS = pytest.mark.skipif(
    machine_code.tools() is None, reason="triton (its tools) is not installed"
)
NEEDS_GXX = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
NEEDS_NVCC = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
# (family, dtype, Q K^T, P V, head dim, rows of queries or keys of a tile): of what the tests build,
# their files are taken apart; of all others resources are compared, at no cost.
TAKEN_APART = (
    ("sm80", "bfloat16", "none", "none", 256, 64),
    ("sm80", "float32", "int8", "int8", 128, 64),
    ("sm80", "float32", "int4", "int4", 64, 64),
    ("sm90", "bfloat16", "none", "none", 128, 128),
    ("sm90", "float32", "int8", "fp8", 128, 64),
    ("sm90", "float32", "int8", "int8", 64, 64),
)
# Likewise, with a device that the tests' own build leaves out.
AFRESH = (
    ("sm80", "bfloat16", "int8", "none", 256, 64, "86"),
    ("sm80", "float32", "int8", "int4", 64, 64, "89"),
    ("sm80", "float32", "int8", "fp8", 128, 64, "120a"),
)
# Why a build may have no CUDA kernels; any other reason is a fault.
HARMLESS = re.compile(r"PERMATTN_CUDA_ARCHS is empty|nvcc was not found|Linux only")

RELEASE, TABLE = table.read_table()
KERNELS = {row["kernel"] for row in TABLE.values()}


def template_name(family: str, dtype: str, qk: str, pv: str, dim: int, block: int) -> str:
    """As the table has it."""
    return f"{family}::attention_kernel<{dtype}, {qk}, {pv}, {dim}, {block}>"


def symbol_part(family: str, dtype: str, qk: str, pv: str, dim: int, block: int) -> str:
    """What is unlike in symbols of kernels."""
    numbers = machine_code.DTYPES.index(dtype), *map(machine_code.FORMATS.index, (qk, pv))
    return (
        f"{family}16attention_kernelINS0_6TraitsILNS_5DtypeE{numbers[0]}ELNS_6FormatE{numbers[1]}"
        f"ELS4_{numbers[2]}ELi{dim}ELi{block}E"
    )


# The table by itself


@pytest.mark.parametrize("arch", table.ARCHS)
def test_every_row_holds(arch):
    rows = [row for row in TABLE.values() if row["arch"] == arch]
    assert len(rows) > 80
    faults = [fault for row in rows for fault in table.faults_of(row)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("kernel", "change", "fault"),
    [
        (("sm80", "bfloat16", "none", "none", 128, 128, "80"), {"spills": 2}, "spills: 2"),
        (("sm80", "bfloat16", "none", "none", 128, 128, "80"), {"stack": 8}, "8 bytes of stack"),
        (
            ("sm80", "bfloat16", "none", "none", 256, 64, "86"),
            {"dynamic_shared": 99 * 1024 + 1},
            "at most 99 KiB",
        ),
        (("sm80", "float32", "int4", "int4", 64, 64, "86"), {"matrix": {}}, "IMMA.16864.U4.S4"),
        (("sm90", "bfloat16", "none", "none", 64, 64, "90a"), {"copies": {}}, "wants UTMALDG"),
        (
            ("sm90", "float32", "int8", "fp8", 64, 64, "90a"),
            {"matrix": {"IGMMA.64x64x32.S8.S8": 4, "HGMMA.64x64x16.F32": 4}},
            "QGMMA.64x72x32.F32.E4M3.E4M3",
        ),
    ],
    ids=["spills", "stack", "shared", "no-int4", "no-bulk-copies", "no-fp8"],
)
def test_a_fault_is_seen(kernel, change, fault):
    row = {"arch": kernel[-1], "kernel": template_name(*kernel[:-1])}
    row = TABLE[table.key_of(row)]
    assert not table.faults_of(row)
    (found,) = table.faults_of({**row, **change})
    assert fault in found


def test_every_kernel_of_the_sources_is_in_the_table():
    """Of every `__global__` function, and of every line that instantiates one."""
    sources = {p: p.read_text() for p in CUDA.rglob("*") if p.suffix in {".cu", ".cuh"}}
    declared = {
        name
        for text in sources.values()
        for name in re.findall(
            r"PERMATTN_GLOBAL void\s+(?:__launch_bounds__\([^;{]*?\)\s+)?(\w+)\(", text
        )
    }
    assert {re.search(r"::(\w+?)(<|$)", kernel)[1] for kernel in KERNELS} == declared
    lines = [
        (path, found)
        for path, text in sources.items()
        if path.parent.name == "instantiations"
        for found in re.findall(r"^PERMATTN_\w*INSTANTIATE\w*\((.*)\)", text, re.M)
    ]
    assert len({path for path, _ in lines}) >= len(list(CUDA.glob("sm*/instantiations/*.cu")))
    for path, found in lines:
        words = [re.sub(r"^.*\bk(?=[A-Z])", "", word).lower() for word in found.split(", ")]
        family = path.relative_to(CUDA).parts[0]
        prefix = (
            f"{family}::attention_kernel<" if family != "permute" else "permute::prepare_kernel<"
        )
        wanted = prefix + ", ".join(words)
        assert [k for k in KERNELS if re.match(re.escape(wanted) + "[,>]", k)], (path, wanted)


@NEEDS_GXX
def test_threads_and_shared_memory_are_those_of_the_sources():
    facts = table.facts()
    assert facts.keys() == KERNELS
    for row in TABLE.values():
        known = facts[row["kernel"]]
        assert known == {name: row[name] for name in known}, row
    for arch in table.ARCHS:
        wanted = {k for k in KERNELS if arch == "90a" or not k.startswith("sm90::")}
        assert {row["kernel"] for row in TABLE.values() if row["arch"] == arch} == wanted


@pytest.mark.parametrize("arch", table.ARCHS)
def test_every_kernel_that_the_tile_choice_can_name_has_code(shim, arch):
    named = set()
    for dtype, qk, pv, dim, unit, block_kv in itertools.product(
        (shim.Dtype.bfloat16, shim.Dtype.float16),
        ("none", "int8", "int4"),
        machine_code.FORMATS,
        (64, 96, 128, 256),
        (64, 128),
        (64, 128),
    ):
        shape = shim.Shape(
            capability=int(arch.strip("a")),
            dtype=dtype,
            qk=getattr(shim.Format, qk),
            pv=getattr(shim.Format, pv),
            head_dim=dim,
            head_dim_v=dim,
            unit=unit,
            block_kv=block_kv,
            q_rows=64,
            kv_rows=64,
        )
        if shim.why_not(shape) is not None:
            continue
        config = shim.select_config(shape)
        family = "sm90" if config.is_sm90 else "sm80"
        written = dtype.name if config.pv == shim.Format.none else "float32"
        block = config.block_n if config.is_sm90 else config.block_m
        formats = config.qk.name, config.pv.name
        named.add(template_name(family, written, *formats, config.dim, block))
    assert len(named) > 20
    for kernel in named:
        row = TABLE[table.key_of({"arch": arch, "kernel": kernel})]
        assert row["matrix"], row


def test_the_page_is_the_tables():
    wanted = machine_code_page.page(RELEASE, list(TABLE.values()))
    assert (table.ROOT / machine_code_page.PAGE).read_text(encoding="utf-8") == wanted


# What compiles now


@NEEDS_TOOLS
@NEEDS_GXX
def test_the_library_that_was_built_is_the_tables():
    """Resources of every kernel; instructions of some."""
    cuda = native.build_report().get("cuda", {"built": False, "reason": "nvcc was not found"})
    if not cuda["built"]:
        assert HARMLESS.search(cuda["reason"]), cuda["reason"]
        pytest.skip(f"the library has no CUDA kernels: {cuda['reason']}")
    parts = [symbol_part(*kernel).encode() for kernel in TAKEN_APART]

    def is_wanted(arch: str, cubin: bytes) -> bool:
        return arch in ("80", "90a") and any(part in cubin for part in parts)

    rows = table.rows_of_library(native.PACKAGE / "_native.so", is_wanted)
    apart = [row for row in rows if "matrix" in row]
    names = {row["kernel"] for row in apart}
    archs = set(cuda["archs"])
    taken = {template_name(*k) for k in TAKEN_APART if k[0] == "sm80" or "90a" in archs}
    assert taken <= names or not archs & {"80", "90a"}
    faults = [fault for row in rows for fault in table.faults_of(row)]
    assert not faults, "\n".join(faults)
    keys = {table.key_of(row) for row in rows}
    assert keys == {key for key, row in TABLE.items() if row["arch"] in archs}
    if cuda["version"] != RELEASE:
        pytest.skip(f"the table is of nvcc {RELEASE}, the library of {cuda['version']}")
    found = table.differences(rows, TABLE)
    assert not found, "\n".join([*found, f"rewrite the table: {table.__doc__}"])


@NEEDS_TOOLS
@NEEDS_GXX
@NEEDS_NVCC
@pytest.mark.parametrize("kernel", AFRESH, ids=lambda k: "-".join(map(str, k)))
def test_kernels_compiled_for_other_devices_are_the_tables(tmp_path, kernel):
    family, dtype, qk, pv, dim, block, arch = kernel
    source, cubin = tmp_path / "kernel.cu", tmp_path / f"kernel.sm_{arch}.cubin"
    words = {"bfloat16": "kBFloat16", "float32": "kFloat32"}
    formats = ", ".join(f"Format::k{name.title()}" for name in (qk, pv))
    traits = f"Traits<Dtype::{words[dtype]}, {formats}, {dim}, {block}>"
    source.write_text(
        f'#include "cuda/{family}/kernel.cuh"\n'
        f"namespace permattn::{family} {{\n"
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
    rows = table.rows_of_cubin(machine_code.tools(), cubin)
    (row,) = (table.complete(row, table.facts()) for row in rows)
    assert row["kernel"] == template_name(*kernel[:-1])
    assert not table.faults_of(row)
    said = subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout
    if f"release {RELEASE}," not in said:
        pytest.skip(f"the table is of nvcc {RELEASE}")
    assert not table.differences([row], TABLE)
