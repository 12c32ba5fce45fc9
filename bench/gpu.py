"""`make gpu`: the CUDA suite, run from the tree as it lies, without an install or a network.

Needs torch with CUDA, and triton. Every section runs within its time in a process beside this one,
and its failure is recorded, so that one broken kernel does not hide what the others do. Writes one
record a run into bench/results/gpu. Returns 0 when every section passed or had a reason not to run,
1 when one failed, 3 when there is no GPU to run on.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.gpu_machine import Found
    from bench.gpu_record import Record
    from bench.gpu_suite import Job
    from bench.gpu_supervisor import Outcome

ROOT = Path(__file__).resolve().parents[1]
NO_GPU = 3


def use_tree() -> None:
    """Makes `permattn`, `permattn.triton_kernels` and `bench` importable from this tree alone.

    An install maps the top-level folder triton_kernels to permattn.triton_kernels; adding the root
    to the package's search path does the same.
    """
    for folder in (ROOT, ROOT / "python"):
        sys.path.insert(0, str(folder))
    import permattn

    if not (Path(permattn.__file__).parent / "triton_kernels").is_dir():
        permattn.__path__.append(str(ROOT))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="make gpu", description=(__doc__ or "").split("\n\n")[0])
    made.add_argument("--library", type=Path, help="a _native.so to run the CUDA kernels of")
    made.add_argument("--wheel", type=Path, help="a wheel that holds one (default: of dist/)")
    made.add_argument("--backends", default="cuda,triton", help="whose kernels (default: both)")
    made.add_argument("--only", default="", help="sections by a part of their name, ',' between")
    made.add_argument("--skip", default="", help="sections to leave out, likewise")
    made.add_argument("--minutes", type=float, default=24.0, help="of the whole run (default: 24)")
    made.add_argument(
        "--more", type=Path, help="a record of this tree, library and device to go on with"
    )
    made.add_argument("--out", type=Path, help="folder of the record (default: bench/results/gpu)")
    made.add_argument("--commit", default="", help="of this tree, where it is no checkout")
    made.add_argument("--list", action="store_true", help="print the sections, run nothing")
    made.add_argument(
        "--rehearse",
        action="store_true",
        help="run every section, tiny, on the CPU: shows that the suite runs, proves nothing",
    )
    # For the worker that this process starts.
    made.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    made.add_argument("--job", action="append", default=[], help=argparse.SUPPRESS)
    made.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    made.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return made


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    try:
        import torch
    except ImportError:
        print("make gpu: this Python has no torch; set PYTHON=... to one that has", file=sys.stderr)
        return NO_GPU
    if not (options.rehearse or options.list or torch.cuda.is_available()):
        print("make gpu: no CUDA device is visible to torch; nothing was run", file=sys.stderr)
        return NO_GPU
    use_tree()
    if options.worker is not None:
        return work(options)
    chosen = chosen_jobs(options)
    if options.list:
        print("\n".join(f"{job.budget_s:5.0f} s  {job.key}" for job in chosen))
        return 0
    return supervise(options, chosen, argv)


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def chosen_jobs(options: argparse.Namespace) -> list[Job]:
    """What --backends, --only and --skip leave of the plan."""
    from bench import gpu_plan

    backends = words(options.backends)
    if unknown := sorted(set(backends) - set(gpu_plan.BACKENDS)):
        parser().error(f"--backends: wants any of {list(gpu_plan.BACKENDS)}, got {unknown}")
    jobs = gpu_plan.jobs(tuple(backends))
    only, skip = words(options.only), words(options.skip)
    for option, given in (("--only", only), ("--skip", skip)):
        for word in given:
            if not any(word in job.key for job in jobs):
                parser().error(f"{option}: no section has {word!r} in its name; see --list")
    return [
        job
        for job in jobs
        if (not only or any(word in job.key for word in only))
        and not any(word in job.key for word in skip)
    ]


def work(options: argparse.Namespace) -> int:
    """As the worker: runs the named sections and writes the journal."""
    import torch

    from bench import gpu_plan, gpu_rehearsal
    from bench.gpu_machine import use_library
    from bench.gpu_suite import Journal, Suite, run_jobs

    torch.backends.cuda.matmul.allow_tf32 = False
    use_library(options.folder)
    suite = Suite(torch.device("cuda"), Journal(options.worker), artefacts=options.out)
    suite.backends = tuple(words(options.backends))
    if options.rehearse:
        gpu_rehearsal.prepare(suite)
    jobs = {job.key: job for job in gpu_plan.jobs()}
    named = [jobs[key] for key in options.job]
    run_jobs(named, suite, options.seconds)
    return 0


def supervise(options: argparse.Namespace, jobs: list[Job], argv: list[str]) -> int:
    """Finds the library, runs the sections in workers and keeps the record."""
    from bench.gpu_machine import find_library

    with tempfile.TemporaryDirectory(prefix="permattn-gpu-") as scratch:
        native = Path(scratch) / "native"
        native.mkdir()
        try:
            facts = {"dist": not options.rehearse}
            library = find_library(options.library, options.wheel, native, **facts)
        except FileNotFoundError as missing:
            parser().error(str(missing))
        return run_all(options, jobs, argv, library, Path(scratch) / "journal")


def run_all(
    options: argparse.Namespace, jobs: list[Job], argv: list[str], library: Found, journal: Path
) -> int:
    """Runs the sections and keeps the record; 0, or 1 where one failed."""
    from bench import gpu_record, gpu_rehearsal
    from bench.gpu_machine import CLOCKS, smi
    from bench.gpu_suite import Journal
    from bench.gpu_supervisor import Supervisor

    if options.rehearse:
        os.environ.update(gpu_rehearsal.environment())
    out = options.out or gpu_record.RECORDS
    if options.rehearse and options.out is None:
        out = Path(tempfile.mkdtemp(prefix="permattn-rehearsal-"))
    record = new_record(options, argv, library)
    if options.more is not None:
        record = continued(record, options.more)
        jobs = [job for job in jobs if record.section(job.key) is None]
    record.clocks.setdefault("before", "none" if options.rehearse else smi(CLOCKS))
    earlier = replace(record)

    def keep(outcome: Outcome) -> None:
        """After each section, so that an interrupted run keeps what it has."""
        fill(record, earlier, outcome)
        record.clocks["after"] = "none" if options.rehearse else smi(CLOCKS)
        gpu_record.write(record, out)

    command = [sys.executable, str(Path(__file__).resolve())]
    command += ["--worker", str(journal), "--out", str(out / record.name)]
    command += ["--backends", options.backends]
    command += ["--rehearse"] if options.rehearse else []
    command += ["--folder", str(library.folder)] if library.folder else []
    deadline = time.monotonic() + 60 * options.minutes
    Supervisor(jobs, command, Journal(journal), deadline, keep).run()
    path = gpu_record.write(record, out)
    passed, failed, skipped = record.suite.passed, record.suite.failed, record.suite.skipped
    print(f"{passed} passed, {len(failed)} failed, {len(skipped)} skipped; {path}")
    return 1 if failed else 0


def new_record(options: argparse.Namespace, argv: list[str], library: Found) -> Record:
    from bench import gpu_machine, gpu_record, kernel_groups
    from bench.machine import commit, utc_now

    head, dirty = commit()
    if options.commit:
        head, dirty = options.commit, dirty and head != "unknown"
    facts: dict[str, Any] = gpu_machine.describe(options.rehearse)
    kernels, sources = kernel_groups.hashes(), library.sources
    if sources != "same":
        # What ran is not what lies here: the record vouches for no native kernel of the tree.
        native = {group.name for group in kernel_groups.GROUPS if group.is_native}
        kernels = {name: value for name, value in kernels.items() if name not in native}
        if library.folder is not None:
            said = "from other sources than csrc" if sources == "other" else "from sources unknown"
            print(f"make gpu: the native library was built {said}: its kernels count for nothing")
    return gpu_record.Record(
        **facts,
        rehearsal=options.rehearse,
        commit=head,
        dirty=dirty,
        utc=utc_now(),
        argv=shlex.join(argv),
        library=gpu_record.Library(library.sha256, sources, why_not=library.why_not),
        kernels=kernels,
    )


def continued(record: Record, path: Path) -> Record:
    """The earlier record of that file, for more sections; what ran out of time runs again."""
    from bench import gpu_record

    earlier = gpu_record.read(path)
    for name in ("device", "kernels", "rehearsal"):
        if getattr(earlier, name) != getattr(record, name):
            parser().error(f"--more: {path.name} is of another {name}")
    if earlier.library.so_sha256 != record.library.so_sha256:
        parser().error(f"--more: {path.name} is of another native library")
    earlier.argv += f"; {record.argv}"
    earlier.sections = [s for s in earlier.sections if s.why != gpu_record.NO_TIME]
    return earlier


def fill(record: Record, earlier: Record, outcome: Outcome) -> None:
    """Adds what the sections found to what an earlier run had."""
    from bench import gpu_goals

    record.sections = [*earlier.sections, *outcome.sections]
    record.cases = [*earlier.cases, *outcome.cases]
    record.bench = [*earlier.bench, *outcome.runs]
    record.log_tail = "\n".join(outcome.log)
    record.count()
    for section in record.sections:
        said = section.data if isinstance(section.data, dict) else {}
        if section.name == "ceilings":
            record.ceilings = said
        if section.name.startswith("sanitizer "):
            record.sanitizer[section.key] = said.get("summary") or section.why
        elif section.name == "ncu":
            record.ncu[section.backend] = said or section.why
    device = record.section("device")
    if device is not None and isinstance(device.data, dict):
        record.library.archs = device.data["archs"]
        record.library.why_not = device.data["why_not"] or ""
    gpu_goals.complete(record)


if __name__ == "__main__":
    # Compiled FlexAttention and Triton keep what they make where a worker that follows finds it.
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
    raise SystemExit(main(sys.argv[1:]))
