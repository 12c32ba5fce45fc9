"""The committed table of what every kernel of the wheel compiles to; a change must edit it.

python tests/cuda/machine_code_table.py --write LIBRARY     rewrite the table and its pages
python tests/cuda/machine_code_table.py --write FILE.cu...  rewrite what these sources compile to
python tests/cuda/machine_code_table.py LIBRARY             compare, and check what must hold

LIBRARY: a _native.so or a wheel with all five devices (`make wheel`).
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import machine_code
import machine_code_page
import main_loop
import sm80_estimate
import sm90_estimate
from machine_code import Row

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent / "cuda_shim"), str(HERE.parent / "build")]

import build  # noqa: E402
import fake_tools  # noqa: E402

TABLE = HERE / "machine_code.json"
ARCHS = ("80", "86", "89", "90a", "120a")
COLUMNS = (
    *("arch", "kernel", "threads", "registers", "stack", "spills"),
    *("static_shared", "dynamic_shared", "matrix", "copies", "loop"),
)
# Shared memory of a block (CUDA's programming guide, compute capabilities). From 9.0 on a kernel's
# own number counts the kilobyte that the system takes, which the limit does not.
SHARED_LIMIT = {"80": 163, "86": 99, "89": 99, "90a": 227, "120a": 99}
SYSTEM_SHARED = {"90a": 1024, "120a": 1024}
NATIVE_INT4 = ("80", "86", "89")
FP8_BY_MMA = ("89", "120a")
PROBE = re.compile(r"index::probe_(?:totals|masses)_kernel<(\w+), \d+>$")
ATTENTION = re.compile(r"(sm\d+)::attention_kernel<(\w+), (\w+), (\w+), (\d+), (\d+)>$")


@functools.cache
def facts() -> dict[str, Row]:
    """Kernel -> threads and dynamic shared memory, by the sources (kernel_facts.cpp)."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "facts"
        include = [f"-I{ROOT / 'csrc'}", f"-I{HERE.parent / 'cuda_shim'}"]
        source = str(HERE / "kernel_facts.cpp")
        subprocess.run(["g++", "-std=c++20", *include, source, "-o", str(program)], check=True)
        done = subprocess.run([str(program)], check=True, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {row.pop("kernel"): row for row in rows}


def complete(row: Row, facts: dict[str, Row]) -> Row:
    """A row of the table: what was compiled, and what the sources say of it."""
    whole = {**row, **facts[row["kernel"]]}
    return {column: whole[column] for column in COLUMNS if column in whole}


def rows_of_cubin(folder: Path, cubin: Path) -> list[Row]:
    """One row per kernel of a cubin, resources and instructions; sm_90a's attention has a loop."""
    listings = machine_code.listings_of_cubin(folder, cubin)
    return [
        {
            **row,
            **machine_code.instructions_of_listing(listings[symbol]),
            "loop": main_loop.spans_of_listing(listings[symbol])
            if row["kernel"].startswith("sm90::")
            else None,
        }
        for symbol, row in machine_code.resources_of_cubin(folder, cubin).items()
    ]


def rows_of_library(
    library: Path, wanted: Callable[[str, bytes], bool] = lambda arch, cubin: True
) -> list[Row]:
    """Rows of all kernels of a library. Of cubins that are not `wanted` only the resources.

    Args:
        wanted: whether to disassemble a cubin, by its architecture and bytes.
    """
    folder = machine_code.tools()
    assert folder is not None
    sources = facts()

    def read(cubin: Path) -> list[Row]:
        if wanted(machine_code.arch_of(cubin), cubin.read_bytes()):
            return rows_of_cubin(folder, cubin)
        return list(machine_code.resources_of_cubin(folder, cubin).values())

    with tempfile.TemporaryDirectory() as target, ThreadPoolExecutor() as pool:
        cubins = machine_code.cubins_of_library(folder, library, Path(target))
        rows = [complete(row, sources) for found in pool.map(read, cubins) for row in found]
    return sorted(rows, key=key_of)


def rows_of_sources(sources: Iterable[Path]) -> tuple[str, list[Row]]:
    """The release of nvcc, and rows of what .cu files compile to for every device of theirs."""
    folder = machine_code.tools()
    assert folder is not None
    setup = fake_tools.load_setup()
    nvcc = setup.find_nvcc()

    def compile_for(source: Path, arch: str) -> list[Row]:
        with tempfile.TemporaryDirectory() as target:
            cubin = Path(target) / f"kernels.sm_{arch}.cubin"
            code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
            command = [nvcc.path, *setup.NVCC_FLAGS, code, "-cubin", str(source), "-o", str(cubin)]
            subprocess.run(command, check=True)
            return [complete(row, facts()) for row in rows_of_cubin(folder, cubin)]

    jobs = [(source, arch) for source in sources for arch in nvcc.archs_of(source.resolve())]
    with ThreadPoolExecutor() as pool:
        rows = [row for found in pool.map(compile_for, *zip(*jobs, strict=True)) for row in found]
    return ".".join(map(str, nvcc.version)), rows


def name_of(row: Row) -> str:
    """As messages name it."""
    return f"{row['kernel']} on {row['arch']}"


def key_of(row: Row) -> str:
    """Kernels in the order of their numbers, devices in theirs."""
    name = re.sub(r"\d+", lambda m: m[0].zfill(4), row["kernel"])
    return f"{name} sm_{row['arch'].zfill(4)}"


def matrix_of(kernel: str, arch: str) -> set[str] | None:
    """Matrix instructions that a kernel must have on a device, and no others.

    None: there is no such kernel on the device, which the backend refuses; its code is empty.
    """
    probe = PROBE.match(kernel)
    if probe is not None:
        return {"HMMA.16816.F32.BF16" if probe[1] == "bfloat16" else "HMMA.16816.F32"}
    found = ATTENTION.match(kernel)
    if found is None:
        return set()
    family, dtype, qk, pv, dim, block = found.groups()
    sixteen = ".BF16" if dtype == "bfloat16" else ""
    if family == "sm90":
        columns = int(dim)
        ones = columns + 8
        scores = {
            "none": f"HGMMA.64x{block}x16.F32{sixteen}",
            "int8": f"IGMMA.64x{block}x32.S8.S8",
        }
        values = {
            "none": f"HGMMA.64x{columns}x16.F32{sixteen}",
            "int8": f"IGMMA.64x{columns}x32.U8.S8",
            "fp8": f"QGMMA.64x{ones}x32.F32.E4M3.E4M3",
        }
        return {scores[qk], values[pv]}
    if "int4" in (qk, pv) and arch not in NATIVE_INT4:
        return None
    if pv == "fp8" and arch not in FP8_BY_MMA:
        return None
    sixteen = f"HMMA.16816.F32{sixteen}"
    scores = {"none": sixteen, "int8": "IMMA.16832.S8.S8", "int4": "IMMA.16864.S4.S4"}
    values = {
        "none": sixteen,
        "int8": "IMMA.16832.U8.S8",
        "int4": "IMMA.16864.U4.S4",
        "fp8": "QMMA.16832.F32.E4M3.E4M3",
    }
    return {scores[qk], values[pv]}


def faults_of(row: Row) -> list[str]:
    """What must hold for every row, whatever compiled it."""
    arch, faults = row["arch"], []
    if row["stack"] or row.get("spills", 0):
        faults.append(f"spills: {row.get('spills')} instructions, {row['stack']} bytes of stack")
    if row["registers"] > machine_code.REGISTER_LIMIT:
        faults.append(f"{row['registers']} registers")
    shared = row["static_shared"] - SYSTEM_SHARED.get(arch, 0) + row["dynamic_shared"]
    if shared > SHARED_LIMIT[arch] * 1024:
        faults.append(f"{shared} bytes of shared memory, at most {SHARED_LIMIT[arch]} KiB")
    if "matrix" in row:
        wanted = matrix_of(row["kernel"], arch)
        if set(row["matrix"]) != (wanted or set()):
            faults.append(f"matrix instructions {row['matrix']}, wants {wanted}")
        copy = "UTMALDG" if row["kernel"].startswith("sm90::") else "LDGSTS"
        if wanted and not row["copies"].get(copy):
            faults.append(f"copies {row['copies']}, wants {copy}")
    return [f"{name_of(row)}: {fault}" for fault in faults]


def differences(rows: Iterable[Row], table: dict[str, Row]) -> list[str]:
    """Rows that are not as the table has them, by the columns that they have."""
    faults = []
    for row in rows:
        stored = table.get(key_of(row))
        if stored is None:
            faults.append(f"{name_of(row)}: not in the table")
        else:
            faults += [
                f"{name_of(row)}: {column} {value}, the table has {stored[column]}"
                for column, value in row.items()
                if stored[column] != value
            ]
    return faults


def read_table() -> tuple[str, dict[str, Row]]:
    """The release of nvcc, and the rows by key."""
    stored = json.loads(TABLE.read_text(encoding="utf-8"))
    rows = [dict(zip(stored["columns"], row, strict=True)) for row in stored["rows"]]
    return stored["nvcc"], {key_of(row): row for row in rows}


def write_table(rows: list[Row], release: str) -> None:
    lines = [json.dumps([row[column] for column in COLUMNS]) for row in rows]
    head = f'{{"nvcc": "{release}", "columns": {json.dumps(COLUMNS)}, "rows": [\n'
    TABLE.write_text(head + ",\n".join(lines) + "\n]}\n", encoding="utf-8")
    machine_code_page.write(ROOT, release, rows)
    sm80_estimate.write(ROOT, build.module())
    sm90_estimate.write(ROOT, build.module(), rows)


def report_and_library(given: Path, folder: Path) -> tuple[Row, Path]:
    """What a build says of itself, and its library: of a wheel, or of a file beside its report."""
    if given.suffix == ".whl":
        with zipfile.ZipFile(given) as wheel:
            names = ("permattn/_native.so", "permattn/_native_build.json")
            given, _ = (Path(wheel.extract(name, folder)) for name in names)
    return json.loads(given.with_name("_native_build.json").read_text()), given


def rows_of(given: list[Path], error: Callable[[str], NoReturn]) -> tuple[str, list[Row]]:
    """The release of nvcc, and rows of all kernels: of a library, or of the table with sources
    compiled anew."""
    if all(path.suffix == ".cu" for path in given):
        release, rows = rows_of_sources(given)
        stored, table = read_table()
        if stored != release:
            error(f"sources: the table is of nvcc {stored}, this one is {release}: wants a library")
        merged = {**table, **{key_of(row): row for row in rows}}
        return release, [merged[key] for key in sorted(merged)]
    if len(given) != 1:
        error(f"given: wants one library, or sources alone, got {[str(path) for path in given]}")
    with tempfile.TemporaryDirectory() as folder:
        report, library = report_and_library(given[0], Path(folder))
        cuda = report["cuda"]
        if not cuda["built"] or tuple(cuda["archs"]) != ARCHS:
            error(f"library: wants kernels for {' '.join(ARCHS)}, got {cuda}")
        return cuda["version"], rows_of_library(library)


def main() -> int:
    """Checks what must hold, and compares or writes the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("given", type=Path, nargs="+", help="a _native.so, a wheel, or sources")
    parser.add_argument("--write", action="store_true", help="rewrite the table and docs")
    args = parser.parse_args()
    version, rows = rows_of(args.given, parser.error)
    faults = [fault for row in rows for fault in faults_of(row)]
    if args.write and not faults:
        write_table(rows, version)
    elif not args.write:
        release, table = read_table()
        if release == version:
            faults += differences(rows, table)
            missing = table.keys() - {key_of(row) for row in rows}
            faults += [f"{key}: in the table only" for key in sorted(missing)]
        else:
            print(f"the table is of nvcc {release}: numbers of {version} not compared")
    print("\n".join(faults) or f"{len(rows)} kernels, no fault")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
