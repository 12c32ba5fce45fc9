"""`permattn calibrate mminference`: searches, shows, and writes the config."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from permattn.calibrate import (
    Budget,
    Sample,
    SearchOptions,
    SearchResult,
    Space,
    search_prefill,
)
from permattn.cli.calibrate.sheet import draw_result
from permattn.cli.calibrate.table import print_heads
from permattn.cli.demo.files import prepare_folder, write_whole
from permattn.cli.demo.subject import Subject
from permattn.cli.errors import UserError, user_errors
from permattn.cli.options import check_backend, parse_device, parse_dtype
from permattn.cli.prompts import PromptOptions, prepare, progress_bar
from permattn.core import Problem

_STAGES = {
    "heads": "searching heads",
    "pairs": "searching pairs of modalities",
    "final": "measuring the choice",
}


@dataclass(frozen=True)
class Options:
    """The command line."""

    prompts: PromptOptions
    config_out: Path | None
    default_out: Path | None
    out: Path
    budget: str
    density: float | None
    layers: str | None
    candidates: tuple[str, ...]
    boundaries: bool
    rounds: int
    pooled: bool
    max_error: float | None
    resume: Path | None
    device: str
    dtype: str
    backend: str


def show(options: Options, *, as_json: bool) -> None:
    """Runs the search, prints the report and writes report.json, report.png and the config.

    Raises:
        UserError: bad input, in one line.
    """
    remarks = Console(stderr=True)
    with user_errors():
        result, files = _run(options, remarks)
    if as_json:
        print(json.dumps(result.to_json(), indent=2))
        return
    console = Console()
    print_heads(console, result, title=_title(result))
    console.print("   ".join(f"{name}: [bold]{path}[/]" for name, path in files.items()))


def search_options(options: Options) -> SearchOptions:
    """The library's options. Raises UserError where the text makes no sense."""
    space = Space()
    if options.candidates:
        space = space.only(options.candidates)
    return SearchOptions(
        space=space,
        budget=parse_budget(options.budget, options.density),
        layers=parse_layers(options.layers),
        boundaries=options.boundaries,
        rounds=options.rounds,
        pooled=options.pooled,
        max_error=options.max_error,
        backend=options.backend,
    )


def parse_budget(text: str, density: float | None) -> Budget:
    """A budget from "SINK+LOCAL", or from a density."""
    sink, plus, local = text.partition("+")
    if not (plus and sink.strip().isdigit() and local.strip().isdigit()):
        raise UserError(f"--budget: wants SINK+LOCAL such as 1024+4096, got {text!r}")
    return Budget(int(sink), int(local), density)


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """Layers from "0,4-7"; None = all."""
    if text is None:
        return None
    found: list[int] = []
    for piece in text.split(","):
        low, dash, high = piece.strip().partition("-")
        if not low.isdigit() or (dash and not high.isdigit()):
            raise UserError(f"--layers: wants numbers and ranges such as 0,4-7, got {text!r}")
        found += range(int(low), int(high or low) + 1)
    return tuple(found)


def _run(options: Options, remarks: Console) -> tuple[SearchResult, dict[str, Path]]:
    device = parse_device(options.device, must_exist=True)
    dtype = parse_dtype(options.dtype)
    # Head sizes are checked again by the calls themselves; this refuses the impossible early.
    check_backend(Problem(device.type, dtype, 8, 2, 128, 128, ((64, 64),)), options.backend)
    wanted = search_options(options)
    options.prompts.check()
    prepare_folder(options.out)
    with progress_bar(remarks) as progress:
        subjects = prepare(
            options.prompts, progress, device=device, dtype=dtype, keep=options.resume
        )
        result = search_prefill(
            subjects[0].model,
            [Sample(s.inputs) for s in subjects],
            wanted,
            state=options.resume,
            on_progress=_Bars(progress),
        )
    files = _write(options, result, subjects, dtype)
    return result, files


class _Bars:
    """One bar per stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}

    def __call__(self, stage: str, done: float) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(_STAGES[stage], total=1.0)
        self._progress.update(self._tasks[stage], completed=done)


def _write(
    options: Options, result: SearchResult, subjects: list[Subject], dtype: torch.dtype
) -> dict[str, Path]:
    made_on = _made_on(options, result, subjects, dtype)
    config_path = options.config_out or options.out / "config.json"
    files = {
        "config": config_path,
        "numbers": options.out / "report.json",
        "picture": options.out / "report.png",
    }
    config = result.config(base_model=made_on)
    text = json.dumps({"made_on": made_on, **result.to_json()}, indent=2) + "\n"
    try:
        write_whole(config_path, config.to_json)
        if options.default_out is not None:
            default = result.family_default(base_model=made_on)
            write_whole(options.default_out, default.to_json)
            files["family default"] = options.default_out
    except OSError as e:
        raise UserError(f"--config-out {e.filename}: cannot be written ({e.strerror})") from e
    write_whole(files["numbers"], lambda path: path.write_text(text, "utf-8"))
    write_whole(
        files["picture"],
        lambda path: draw_result(path, result, title=_title(result), note=subjects[0].note),
    )
    return files


def _made_on(
    options: Options, result: SearchResult, subjects: list[Subject], dtype: torch.dtype
) -> str:
    """What a config says about its origin."""
    if options.prompts.constructed is not None:
        model = f"{result.facts['model_class']}, constructed weights, not a released checkpoint"
    else:
        model = str(options.prompts.model)
    plural = "prompt" if len(subjects) == 1 else "prompts"
    made = "videos given" if options.prompts.videos else "videos made from photographs"
    tokens = result.facts["samples"][0]["tokens"]
    return (
        f"{model}; {len(subjects)} {plural} of {tokens} tokens, {made}; "
        f"budget {result.facts['budget_density']:.1%} of all pairs; "
        f"{str(dtype).removeprefix('torch.')}"
    )


def _title(result: SearchResult) -> str:
    facts = result.facts
    lengths = ", ".join(f"{s['tokens']:,}" for s in facts["samples"])
    return (
        f"{facts['model_class']}: prompts of {lengths} tokens, budget "
        f"{facts['budget_density']:.1%} of all pairs"
    )
