"""What a section of the GPU suite is given, and the journal that its results go to.

Sections run in a process of their own, which writes every result down at once: what hangs, crashes
or spoils the CUDA context costs one section, and what it had found is kept.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench.gpu_record import FAILED, PASSED, SKIPPED, Case, Run

# What torch raises where the CUDA context is lost for good.
_LOST = (
    "CUDA error",
    "an illegal memory access",
    "device-side assert",
    "unspecified launch failure",
)
# The error of a case that gave none.
_UNKNOWN = 1e30


class Skip(Exception):
    """Why a section has nothing to run here."""


@dataclass
class Journal:
    """Lines of JSON, each written through."""

    path: Path

    def write(self, kind: str, **facts: Any) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"kind": kind, **facts}) + "\n")

    def read(self, skip: int = 0) -> list[dict[str, Any]]:
        """Whole lines from number `skip` on."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        lines = text[: text.rfind("\n") + 1].splitlines()
        return [json.loads(line) for line in lines[skip:]]


@dataclass
class Suite:
    """Where a section runs, and where its results go.

    Args:
        backend: as the record names it: "cuda", "triton", or "" for what has none.
        asked: what permattn is asked for: the backend, or what stands in for it in a rehearsal.
        deadline: of the running section, by `time.monotonic`.
        backends: whose kernels the run is about.
        artefacts: files that come home beside the record are written there.
    """

    device: torch.device
    journal: Journal
    rehearsal: bool = False
    backend: str = ""
    asked: str = ""
    section: str = ""
    artefacts: Path | None = None
    backends: tuple[str, ...] = ("cuda", "triton")
    deadline: float = float("inf")
    stand_ins: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    num_cases: int = 0

    def case(self, id: str, error: float, tolerance: float, *, ok: bool | None = None) -> None:
        """Writes a comparison down; a wrong one fails the section when it is over."""
        # JSON has neither infinity nor NaN.
        error = float(error) if math.isfinite(error) else _UNKNOWN
        fine = error <= tolerance if ok is None else ok
        self.num_cases += 1
        made = Case(self.section, id, error, float(tolerance), bool(fine))
        self.journal.write("case", case=asdict(made))
        if not fine:
            self.wrong.append(f"{id} ({error:.2e}, allowed {tolerance:.2e})")

    def check(self, id: str, call: Callable[[], tuple[float, float]]) -> None:
        """A comparison that may itself fail: what it raises is a wrong case, not the end."""
        try:
            error, tolerance = call()
        except Exception as problem:
            if is_lost(problem):
                raise
            traceback.print_exc()
            self.num_cases += 1
            self.journal.write("case", case=asdict(Case(self.section, id, _UNKNOWN, 0.0, False)))
            self.wrong.append(f"{id} ({_first_line(problem)})")
            return
        self.case(id, error, tolerance)

    def run(self, **facts: Any) -> Run:
        """Writes a timed call down."""
        made = Run(section=self.section, **facts)
        self.journal.write("run", run=asdict(made))
        return made

    def left(self) -> float:
        """Seconds of the section's budget."""
        return self.deadline - time.monotonic()

    def why_not(self, backend: str) -> str | None:
        """Why kernels of a backend cannot run here at all; None where they can."""
        if backend == "cuda":
            from permattn.backends.cuda import device

            if self.rehearsal and device.SHIM is None:
                return "the kernels are not built for a CPU here"
            return device.why_not_here(self.device.type)
        if backend == "triton" and not self.rehearsal and find_spec("triton") is None:
            return "triton is not installed"
        return None

    @property
    def has_gradients(self) -> bool:
        return self.backend != "cuda"


@dataclass(frozen=True)
class Job:
    """One section.

    Args:
        budget_s: seconds after which it is ended.
        call: runs it; returns what the record shall hold, raises `Skip` or what is wrong.
    """

    name: str
    backend: str
    budget_s: float
    call: Callable[[Suite], Any]

    @property
    def key(self) -> str:
        return f"{self.backend} {self.name}".strip()


def is_lost(error: BaseException) -> bool:
    """Whether nothing more can run on the device in this process."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST)


def run_job(job: Job, suite: Suite) -> bool:
    """Runs a section and writes down how it ended; False = this process is of no more use."""
    suite.backend, suite.section = job.backend, job.key
    suite.asked = suite.stand_ins.get(job.backend, job.backend)
    suite.wrong, suite.num_cases = [], 0
    suite.deadline = time.monotonic() + job.budget_s
    suite.journal.write("start", key=job.key)
    began = time.perf_counter()
    status, why, data, goes_on = PASSED, "", None, True
    try:
        if why_not := suite.why_not(job.backend):
            raise Skip(why_not)
        data = job.call(suite)
    except Skip as reason:
        status, why = SKIPPED, str(reason)
    except Exception as error:  # the suite goes on: what failed is recorded and counted
        traceback.print_exc()
        status, why = FAILED, _first_line(error)
        goes_on = not is_lost(error)
    if suite.wrong and status != FAILED:
        shown = "; ".join(suite.wrong[:5]) + ("; ..." if len(suite.wrong) > 5 else "")
        status, why = FAILED, f"{len(suite.wrong)} of {suite.num_cases} wrong: {shown}"
    seconds = round(time.perf_counter() - began, 2)
    suite.journal.write("end", key=job.key, status=status, why=why, seconds=seconds, data=data)
    print(f"{job.key}: {status} ({seconds} s){' ' + why if why else ''}", flush=True)
    return goes_on


def run_jobs(jobs: Iterable[Job], suite: Suite, seconds: float) -> None:
    """Runs sections in order until the device is lost, or no other may begin."""
    until = time.monotonic() + seconds
    for job in jobs:
        if time.monotonic() > until or not run_job(job, suite):
            return


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
