"""`permattn report --paro`: what a plan does to every head, from its file or measured again."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from permattn.calibrate.paro import PlanCheck, check_plan
from permattn.calibrate.paro.check import check_subject
from permattn.cli.calibrate.paro import Bars
from permattn.cli.calibrate.paro_sheet import draw_plan, heads_to_draw
from permattn.cli.calibrate.paro_table import plan_facts, plan_title, print_plan, size_of
from permattn.cli.demo.files import prepare_folder, write_whole
from permattn.cli.errors import UserError, user_errors
from permattn.cli.options import check_backend, parse_device, parse_dtype
from permattn.cli.paro_subject import PipeOptions, load_pipe
from permattn.cli.prompts import progress_bar
from permattn.core import Problem
from permattn.paro_file import load_paro
from permattn.patterns.paro import ParoPlan

_PIXELS = 16


@dataclass(frozen=True)
class Options:
    """The command line."""

    plan: Path
    pipe: PipeOptions
    component: str
    out: Path
    device: str
    dtype: str
    backend: str


def show(options: Options, *, as_json: bool) -> None:
    """Prints the table and writes report.json and report.png.

    Raises:
        UserError: bad input, in one line.
    """
    remarks = Console(stderr=True)
    with user_errors():
        plan, check = _run(options, remarks)
    if as_json:
        print(json.dumps(plan_facts(plan, check), indent=2))
        return
    console = Console()
    print_plan(console, plan, check, title=plan_title(plan))
    if check is None:
        console.print(
            "Recall as it was when the plan was calibrated; --model measures it again, and draws "
            "maps.",
            highlight=False,
        )
    console.print(
        f"picture: [bold]{options.out / 'report.png'}[/]   "
        f"numbers: [bold]{options.out / 'report.json'}[/]"
    )


def _run(options: Options, remarks: Console) -> tuple[ParoPlan, PlanCheck | None]:
    try:
        plan = load_paro(options.plan)
    except FileNotFoundError as e:
        raise UserError(f"--paro {options.plan}: no such file; give the path of a plan") from e
    check, note = None, f"{options.plan.name}, {size_of(plan.num_bytes)}"
    if options.pipe.model is None:
        prepare_folder(options.out)
    else:
        check, note = _measured(options, plan, remarks)
    text = json.dumps({"note": note, **plan_facts(plan, check)}, indent=2) + "\n"
    write_whole(options.out / "report.json", lambda path: path.write_text(text, "utf-8"))
    title = plan_title(plan)
    write_whole(
        options.out / "report.png",
        lambda path: draw_plan(path, plan, check, title=title, note=note),
    )
    return plan, check


def _measured(options: Options, plan: ParoPlan, remarks: Console) -> tuple[PlanCheck, str]:
    from permattn.models.diffusion import describe

    device = parse_device(options.device, must_exist=True)
    dtype = parse_dtype(options.dtype)
    check_backend(Problem(device.type, dtype, 8, 8, 128, 128, ((64, 64),)), options.backend)
    pipe = options.pipe
    if pipe.is_constructed:
        # The constructed model fits any grid; its weights are those of this one.
        frames, height, width = plan.grid
        pipe = replace(pipe, frames=frames, height=_PIXELS * height, width=_PIXELS * width)
    pipe.check()
    prepare_folder(options.out)
    with progress_bar(remarks) as progress:
        bars = Bars(progress)
        bars("loading the pipeline", 0.0)
        subject = load_pipe(pipe, device=device, dtype=dtype)
        bars("loading the pipeline", 1.0)
        facts = describe(subject.pipe, component=options.component)
        check_subject(plan, facts)
        if plan.origin.fingerprint not in ("", facts.fingerprint):
            remarks.print("[yellow]The plan was calibrated on other weights.[/]", highlight=False)
        check = check_plan(
            *(subject.pipe, subject.prompts[0], plan),
            component=options.component,
            maps=heads_to_draw(plan),
            on_progress=lambda done: bars("measuring the plan", done),
            backend=options.backend,
            **subject.call,
        )
        bars("measuring the plan", 1.0)
    return check, subject.note
