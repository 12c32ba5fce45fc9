"""The committed table of what every shipped kernel compiles to; a change must edit it.

python tests/triton/aot/sass_table.py --write     compile everything, rewrite machine_code.json
python tests/triton/aot/sass_table.py             compile everything, compare (minutes)
python tests/triton/aot/sass_table.py --core      the part that CI compiles
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TABLE = HERE / "machine_code.json"
# CI's share: forward and backward, rows in order and gathered, three sets of instructions.
CORE_CASES = (
    r"^(fwd|bwd)-(dense|gather)-bfloat16-d128$|^fwd-dense-bfloat16-d64$"
    r"|^probe-order-r64-bfloat16-d128$|^quant-orders-int8-(int8-r64-pairs|fp8-r64-none)-bfloat16-d128$"
    r"|^mass-b64-bfloat16-d128$|^region-(fwd|bwd)-n4-plain-bfloat16-d32$"
    r"|^region-route-n64-plain-bfloat16-d32$"
)
CORE_ARCHS = (80, 90, 120)
# Bytes of shared memory that one block may use.
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
# What multiplies matrices: one word per family. float32 in full precision has no such instruction.
MATRIX_OPCODE = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
# The same of bytes; of float8 where a GPU has it (elsewhere its numbers are float16).
INT8_OPCODE = {arch: name.replace("HMMA", "IMMA") for arch, name in MATRIX_OPCODE.items()}
INT8_OPCODE[90] = "IGMMA"
FLOAT8_OPCODE = {89: "QMMA", 90: "QGMMA", 100: "UTCQMMA", 120: "QMMA"}
# The instructions of whole warp groups multiply tiles of at least as many rows.
WARP_GROUP_ROWS = 64
MULTIPLYING = (
    *("fwd_kernel", "dq_kernel", "dkdv_kernel"),
    *("probe_total_kernel", "probe_mass_kernel", "block_mass_kernel"),
    *("region_fwd_kernel", "region_dq_kernel", "region_dkdv_kernel"),
)
MAY_SPILL = re.compile(r"^(fwd|bwd)-.*-float32-d256$|^mass-.*-float32-")

Row = dict[str, Any]


def environment() -> dict[str, str]:
    """Of a process that compiles: the interpreter would not."""
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def compile_rows(cases: str = "", archs: tuple[int, ...] = tuple(SHARED_LIMIT)) -> list[Row]:
    """Rows of all matching cases, compiled in one process per core."""
    jobs = min(os.cpu_count() or 1, 8)
    command = [sys.executable, str(HERE / "compile_launches.py"), "--case", cases]
    command += ["--arch", *map(str, archs)]
    running = [
        subprocess.Popen(
            [*command, "--share", f"{i}/{jobs}"],
            env=environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(jobs)
    ]
    rows = []
    for process in running:
        output, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"compilation failed:\n{errors[-3000:]}")
        rows += [json.loads(line) for line in output.splitlines()]
    return sorted(rows, key=key_of)


def key_of(row: Row) -> str:
    return f"{row['case']}/{row['kernel']}/{row['number']}/sm_{row['arch']}"


def faults_of(row: Row) -> list[str]:
    """What must hold for every row, whatever the version of Triton."""
    faults = []
    if (row["spills"] or row["stack"]) and not MAY_SPILL.search(row["case"]):
        faults.append(f"spills: {row['spills']} instructions, {row['stack']} bytes of stack")
    if row["shared"] > SHARED_LIMIT[row["arch"]]:
        faults.append(f"{row['shared']} bytes of shared memory")
    multiplies = row["kernel"] in MULTIPLYING
    if multiplies and row["case"].startswith("quant-"):
        faults += _small_number_faults(row)
    elif multiplies and "-float32-" not in row["case"]:
        wanted = {MATRIX_OPCODE[row["arch"]]}
        if row["tile"][0] < WARP_GROUP_ROWS:
            wanted.add("HMMA")
        if not wanted & set(row["matrix"]):
            faults.append(f"matrix opcodes {row['matrix']}, wants one of {sorted(wanted)}")
    return [f"{key_of(row)}: {fault}" for fault in faults]


def _small_number_faults(row: Row) -> list[str]:
    """Q K^T must be products of bytes; P V of whatever its format is."""
    arch, half = row["arch"], MATRIX_OPCODE[row["arch"]]
    pv = row["case"].split("-")[3]
    wanted = {INT8_OPCODE[arch]}
    if pv == "fp8":
        wanted.add(FLOAT8_OPCODE.get(arch, half))
    elif pv == "none" and "-float32-" not in row["case"]:
        wanted.add(half)
    if row["tile"][0] < WARP_GROUP_ROWS:
        wanted = {re.sub(r"^UTC|(?<=^.)G", "", name) for name in wanted}
    missing = sorted(wanted - set(row["matrix"]))
    return [f"matrix opcodes {row['matrix']}, wants {missing} too"] if missing else []


def differences(rows: list[Row], table: dict[str, Row]) -> list[str]:
    """Rows that are not as the table has them."""
    return [
        f"{key_of(row)}: compiled {row}, the table has {table.get(key_of(row))}"
        for row in rows
        if table.get(key_of(row)) != row
    ]


def read_table() -> tuple[str, dict[str, Row]]:
    """Triton's version, and the rows by key."""
    stored = json.loads(TABLE.read_text(encoding="utf-8"))
    columns = stored["columns"]
    rows = [dict(zip(columns, row, strict=True)) for row in stored["rows"]]
    return stored["triton"], {key_of(row): row for row in rows}


def write_table(rows: list[Row], version: str) -> None:
    columns = list(rows[0])
    lines = [json.dumps([row[c] for c in columns]) for row in rows]
    head = f'{{"triton": "{version}", "columns": {json.dumps(columns)}, "rows": [\n'
    TABLE.write_text(head + ",\n".join(lines) + "\n]}\n", encoding="utf-8")


def main() -> int:
    """Compiles, checks what must hold, and writes or compares the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--write", action="store_true", help="rewrite the table")
    parser.add_argument("--core", action="store_true", help="only what CI compiles")
    args = parser.parse_args()
    import triton

    rows = compile_rows(CORE_CASES, CORE_ARCHS) if args.core else compile_rows()
    faults = [fault for row in rows for fault in faults_of(row)]
    if args.write and not faults:
        write_table(rows, triton.__version__)
    elif not args.write:
        version, table = read_table()
        if version == triton.__version__:
            faults += differences(rows, table)
    print("\n".join(faults) or f"{len(rows)} kernels, no fault")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
