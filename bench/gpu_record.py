"""What a run of the GPU suite leaves behind: one JSON file a run, written by the suite alone.

Plain dataclasses, because a GPU machine need not have pydantic; `load` checks a file against them
with pydantic, where documents are made of it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "bench" / "results" / "gpu"
PASSED, FAILED, SKIPPED, TIMED_OUT = "passed", "failed", "skipped", "timed out"
# Why a section did not begin.
NO_TIME = "the time of the whole run was over"


@dataclass
class Library:
    """The native library that ran.

    Args:
        so_sha256: of `_native.so`; empty = there was none.
        sources: whether it was built from the csrc of the tree: "same", "other" or "unknown".
        archs: compute capabilities with machine code.
        why_not: why its CUDA kernels do not run; empty = they do.
    """

    so_sha256: str = ""
    sources: str = "unknown"
    archs: list[str] = field(default_factory=list)
    why_not: str = ""


@dataclass
class Section:
    """One part of a run.

    Args:
        status: "passed", "failed", "skipped" or "timed out".
        why: of everything but "passed".
        data: what the section returned.
    """

    name: str
    backend: str
    status: str
    why: str
    seconds: float
    budget_s: float
    data: Any = None

    @property
    def key(self) -> str:
        return f"{self.backend} {self.name}".strip()


@dataclass
class Case:
    """One comparison: `error` must be at most `tolerance`. `seed` is that of the inputs."""

    section: str
    id: str
    error: float
    tolerance: float
    ok: bool
    seed: int = 0


@dataclass
class Run:
    """One timed call.

    Args:
        shape: name of a shape of bench.gpu_shapes, with its size.
        contender: who ran: a backend of ours, or another package.
        what: "total", or the item of it: "mask", "plan", "permute", "prepare", "statistics",
            "kernel".
        format: of the operands: "bf16", "int8+fp8", ...
        ms: median of `reps` samples; p10 and p90 of them.
        first_ms: the first call by the wall, compiling counted.
        tflops: of listed blocks, over this time; None = not attention.
        of_best_dense: rate over the best dense rate of this run and shape.
        of_nominal, of_measured: rate over the datasheet's, and over this run's matrix product.
        why_not: why there is no time; empty = there is one.
    """

    section: str
    shape: str
    contender: str
    what: str = "total"
    format: str = "bf16"
    density: float | None = None
    block: int | None = None
    ms: float | None = None
    p10: float | None = None
    p90: float | None = None
    reps: int = 0
    first_ms: float | None = None
    tflops: float | None = None
    of_best_dense: float | None = None
    of_nominal: float | None = None
    of_measured: float | None = None
    why_not: str = ""


@dataclass
class Goal:
    """What was aimed at. `status`: "met", "not met" or "not measured"."""

    id: str
    title: str
    backend: str
    target: float
    at_most: bool
    status: str
    value: float | None = None


@dataclass
class Counts:
    """Sections of a run, by how they ended."""

    collected: int
    passed: int
    failed: list[str]
    skipped: list[str]


@dataclass
class Record:
    """One run.

    Args:
        utc: when it began, ISO 8601.
        cc: compute capability, [major, minor].
        kernels: hash of the sources of every group of bench.kernel_groups; without those of the
            native library where that was not built from the tree's.
        clocks: what nvidia-smi said "before" and "after".
        ceilings: "matmul_tflops", "copy_tb_s" as measured, and "nominal": the datasheet's.
        sanitizer: tool -> its summary, or why it did not run.
        ncu: what was read of the hot kernels, or why not.
        rehearsal: made without a GPU, to show that the suite runs; proves nothing.
    """

    rehearsal: bool
    commit: str
    dirty: bool
    utc: str
    device: str
    cc: list[int]
    driver: str
    cuda_runtime: str
    torch: str
    triton: str
    python: str
    argv: str
    schema: int = SCHEMA
    library: Library = field(default_factory=Library)
    kernels: dict[str, str] = field(default_factory=dict)
    clocks: dict[str, str] = field(default_factory=dict)
    suite: Counts = field(default_factory=lambda: Counts(0, 0, [], []))
    sections: list[Section] = field(default_factory=list)
    cases: list[Case] = field(default_factory=list)
    bench: list[Run] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    ceilings: dict[str, Any] = field(default_factory=dict)
    sanitizer: dict[str, str] = field(default_factory=dict)
    ncu: dict[str, Any] = field(default_factory=dict)
    log_tail: str = ""

    @property
    def name(self) -> str:
        """<utc>-<device>-<commit8>, of letters, digits and '-'."""
        when = re.sub(r"[^0-9T]", "", self.utc[:19])
        return f"{when}Z-{slug(self.device)}-{self.commit[:8]}"

    def count(self) -> None:
        """Fills `suite` from the sections."""
        wrong = [s.key for s in self.sections if s.status in (FAILED, TIMED_OUT)]
        left_out = [s.key for s in self.sections if s.status == SKIPPED]
        passed = len(self.sections) - len(wrong) - len(left_out)
        self.suite = Counts(len(self.sections), passed, wrong, left_out)

    def section(self, key: str) -> Section | None:
        return next((s for s in self.sections if s.key == key), None)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write(record: Record, folder: Path) -> Path:
    """Writes the record into a folder, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record.name}.json"
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(_rounded(asdict(record)), indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
    return path


def read(path: Path) -> Record:
    """A record of that file as the suite wrote it, to go on with: its types are not checked.

    Raises:
        ValueError: the schema is another one.
    """
    data = _data(path)
    parts = {"sections": Section, "cases": Case, "bench": Run, "goals": Goal}
    for name, part in parts.items():
        data[name] = [part(**x) for x in data[name]]
    library, suite = Library(**data.pop("library")), Counts(**data.pop("suite"))
    return Record(**data, library=library, suite=suite)


def _data(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_text(encoding="utf-8"))
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{path.name}: wants schema {SCHEMA}, got {data.get('schema')!r}")
    return data


def load(path: Path) -> Record:
    """A record of that file.

    Raises:
        ValueError: a field is missing, unknown or of another type, or the schema is another one.
    """
    from pydantic import ConfigDict, TypeAdapter

    data = _data(path)
    for part in (Record, Library, Section, Case, Run, Goal, Counts):
        # Where pydantic looks for a dataclass's rules.
        setattr(part, "__pydantic_config__", ConfigDict(extra="forbid"))  # noqa: B010
    return TypeAdapter(Record).validate_python(data)


def records(folder: Path = RECORDS) -> list[Record]:
    """Runs on hardware, oldest first; a rehearsal is none."""
    found = [load(path) for path in sorted(folder.glob("*.json"))]
    return sorted((r for r in found if not r.rehearsal), key=lambda r: r.utc)


def newest_by_device(found: Sequence[Record]) -> list[Record]:
    """The last record of every device, devices by name."""
    last = {r.device: r for r in found}
    return [last[device] for device in sorted(last)]


def _rounded(value: Any) -> Any:
    """Floats to six digits: what lies behind is noise."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value
