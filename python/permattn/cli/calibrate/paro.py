"""`permattn calibrate paro`: measures, shows, and writes the plan."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from permattn.calibrate.paro import (
    MeasureOptions,
    PlanCheck,
    SelectOptions,
    check_plan,
    measure,
)
from permattn.cli.calibrate.paro_sheet import draw_plan, heads_to_draw
from permattn.cli.calibrate.paro_table import plan_facts, plan_title, print_plan
from permattn.cli.demo.files import prepare_folder, write_whole
from permattn.cli.errors import UserError, user_errors
from permattn.cli.options import check_backend, parse_device, parse_dtype
from permattn.cli.paro_subject import PipeOptions, PipeSubject, load_pipe
from permattn.cli.prompts import progress_bar
from permattn.core import Problem
from permattn.paro_file import save_paro
from permattn.patterns.paro import ParoPlan

_STAGES = {"orders": "comparing orders", "masks": "summing blocks"}


@dataclass(frozen=True)
class Options:
    """The command line."""

    pipe: PipeOptions
    selection: SelectOptions
    metric: str
    bins: str
    block: str
    sampled_steps: str | None
    component: str
    plan_out: Path | None
    out: Path
    resume: Path | None
    device: str
    dtype: str
    backend: str


def show(options: Options, *, as_json: bool) -> None:
    """Calibrates, prints the table and writes the plan, report.json and report.png.

    Raises:
        UserError: bad input, in one line.
    """
    remarks = Console(stderr=True)
    with user_errors():
        plan, check, files = _run(options, remarks)
    if as_json:
        print(json.dumps(_report(plan, check, files), indent=2))
        return
    console = Console()
    print_plan(console, plan, check, title=plan_title(plan))
    console.print("   ".join(f"{name}: [bold]{path}[/]" for name, path in files.items()))


def measure_options(options: Options) -> MeasureOptions:
    """The library's options. Raises UserError where the text makes no sense."""
    return MeasureOptions(
        density=options.selection.density,
        metric=options.metric,  # type: ignore[arg-type]
        block=parse_block(options.block),
        bins=int(options.bins) if options.bins.isdigit() else options.bins,  # type: ignore[arg-type]
        sampled_steps=parse_steps(options.sampled_steps),
        backend=options.backend,
    )


def parse_block(text: str) -> tuple[int, int]:
    """Block sizes from "64" or "64x128"."""
    q, cross, kv = text.partition("x")
    if not q.isdigit() or (cross and not kv.isdigit()):
        raise UserError(f"--block: wants SIZE or QUERIESxKEYS such as 64x128, got {text!r}")
    return int(q), int(kv or q)


def parse_steps(text: str | None) -> int | tuple[int, ...] | None:
    """A count from "8", or numbers from "0,4,9"."""
    if text is None:
        return None
    pieces = [x.strip() for x in text.split(",")]
    if not all(x.isdigit() for x in pieces):
        raise UserError(f"--sampled-steps: wants a count or numbers such as 0,4,9, got {text!r}")
    return int(pieces[0]) if len(pieces) == 1 else tuple(map(int, pieces))


def _run(options: Options, remarks: Console) -> tuple[ParoPlan, PlanCheck, dict[str, Path]]:
    device = parse_device(options.device, must_exist=True)
    dtype = parse_dtype(options.dtype)
    # Head sizes are checked again by the calls themselves; this refuses the impossible early.
    check_backend(Problem(device.type, dtype, 8, 8, 128, 128, ((64, 64),)), options.backend)
    wanted = measure_options(options)
    options.pipe.check()
    prepare_folder(options.out)
    with progress_bar(remarks) as progress:
        bars = Bars(progress)
        bars("loading the pipeline", 0.0)
        subject = load_pipe(options.pipe, device=device, dtype=dtype)
        bars("loading the pipeline", 1.0)
        measured = measure(
            *(subject.pipe, subject.prompts, wanted),
            component=options.component,
            resume=options.resume,
            on_progress=lambda stage, done: bars(_STAGES[stage], done),
            **subject.call,
        )
        plan = measured.plan(options.selection)
        check = check_plan(
            *(subject.pipe, subject.prompts[0], plan),
            component=options.component,
            maps=heads_to_draw(plan),
            on_progress=lambda done: bars("measuring the plan", done),
            backend=options.backend,
            **subject.call,
        )
        bars("measuring the plan", 1.0)
    return plan, check, _write(options, plan, check, subject)


class Bars:
    """A bar per stage, made when it is first heard of."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}

    def __call__(self, stage: str, done: float) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=1.0)
        self._progress.update(self._tasks[stage], completed=done)


def _write(
    options: Options, plan: ParoPlan, check: PlanCheck, subject: PipeSubject
) -> dict[str, Path]:
    files = {
        "plan": options.plan_out or options.out / "plan.paro",
        "numbers": options.out / "report.json",
        "picture": options.out / "report.png",
    }
    try:
        write_whole(files["plan"], lambda path: save_paro(plan, path))
    except OSError as e:
        raise UserError(f"--plan-out {files['plan']}: cannot be written ({one_reason(e)})") from e
    text = json.dumps({"note": subject.note, **_report(plan, check, files)}, indent=2) + "\n"
    write_whole(files["numbers"], lambda path: path.write_text(text, "utf-8"))
    title = plan_title(plan)
    write_whole(
        files["picture"],
        lambda path: draw_plan(path, plan, check, title=title, note=subject.note),
    )
    return files


def one_reason(error: OSError) -> str:
    """Why a file cannot be written: some libraries give no number."""
    return error.strerror or str(error)


def _report(plan: ParoPlan, check: PlanCheck, files: dict[str, Path]) -> dict[str, Any]:
    facts = plan_facts(plan, check)
    facts["plan"] = str(files["plan"])
    facts["plan_bytes"] = files["plan"].stat().st_size
    return facts
