"""`permattn report`: one prompt, every head: pattern, density, recall and output error."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from permattn.calibrate import Sample, SearchResult
from permattn.calibrate.layer import LayerInput
from permattn.calibrate.measure import capture_layers, measure_prefill
from permattn.calibrate.passes import model_facts
from permattn.cli.calibrate.run import parse_layers
from permattn.cli.calibrate.table import print_heads
from permattn.cli.demo.compare import Drawn
from permattn.cli.demo.files import prepare_folder, write_whole
from permattn.cli.demo.subject import SheetHead
from permattn.cli.errors import user_errors
from permattn.cli.options import check_backend, parse_device, parse_dtype
from permattn.cli.prompts import PromptOptions, prepare, progress_bar
from permattn.cli.report.sheet import draw_report
from permattn.core import Problem


@dataclass(frozen=True)
class Options:
    """The command line."""

    prompts: PromptOptions
    config: Path | None
    layers: str | None
    out: Path
    device: str
    dtype: str
    backend: str


def show(options: Options, *, as_json: bool) -> None:
    """Measures, prints the table and writes report.json and report.png.

    Raises:
        UserError: bad input, in one line.
    """
    remarks = Console(stderr=True)
    with user_errors():
        result, title = _run(options, remarks)
    if as_json:
        print(json.dumps(result.to_json(), indent=2))
        return
    console = Console()
    print_heads(console, result, title=title)
    console.print(
        f"picture: [bold]{options.out / 'report.png'}[/]   "
        f"numbers: [bold]{options.out / 'report.json'}[/]"
    )


def _run(options: Options, remarks: Console) -> tuple[SearchResult, str]:
    from permattn.models import PrefillConfig

    device = parse_device(options.device, must_exist=True)
    dtype = parse_dtype(options.dtype)
    # Head sizes are checked again by the calls themselves; this refuses the impossible early.
    check_backend(Problem(device.type, dtype, 8, 2, 128, 128, ((64, 64),)), options.backend)
    config = PrefillConfig.load(options.config)
    layers = parse_layers(options.layers)
    options.prompts.check()
    prepare_folder(options.out)
    with progress_bar(remarks) as progress:
        subject = prepare(options.prompts, progress, device=device, dtype=dtype)[0]
        sample = Sample(subject.inputs)
        count = len(layers or model_facts(subject.model).layers)
        task = progress.add_task("measuring heads", total=count)
        result = measure_prefill(
            subject.model,
            sample,
            config,
            layers=layers,
            backend=options.backend,
            on_layer=lambda layer: progress.advance(task),
        )
        heads = extreme_heads(result)
        task = progress.add_task("drawing", total=len(heads) + 2)

        def advance() -> None:
            progress.advance(task)

        wanted = {head.layer for head in heads}
        inputs = capture_layers(subject.model, sample, wanted, backend=options.backend)
        advance()
        title = (
            f"{result.facts['model_class']}, {result.facts['samples'][0]['tokens']:,} tokens: "
            f"{options.config.name if options.config else 'every head auto'}"
        )
        _write(options, result, heads, inputs, title, subject.note, advance)
    return result, title


def extreme_heads(result: SearchResult) -> list[SheetHead]:
    """The heads of least, median and largest output error."""
    order = sorted(
        (choice.error, number, head)
        for number, row in result.layers.items()
        for head, choice in enumerate(row)
    )
    picks = {"least error": 0, "median error": len(order) // 2, "largest error": len(order) - 1}
    return [SheetHead(*order[i][1:], label) for label, i in picks.items()]


def _write(
    options: Options,
    result: SearchResult,
    heads: list[SheetHead],
    inputs: dict[int, LayerInput],
    title: str,
    note: str,
    on_step: Callable[[], object],
) -> None:
    drawn: dict[int, Drawn] = {}
    for number, layer in inputs.items():
        patterns = [c.pattern for c in result.layers[number]]
        scale = layer.scale if layer.scale is not None else layer.q.shape[-1] ** -0.5
        drawn[number] = Drawn(layer.q, layer.k, layer.plan(patterns), scale)
    data: dict[str, Any] = {"note": note, **result.to_json()}
    text = json.dumps(data, indent=2) + "\n"
    write_whole(options.out / "report.json", lambda path: path.write_text(text, "utf-8"))
    write_whole(
        options.out / "report.png",
        lambda path: draw_report(path, result, drawn, heads, title, note, on_step),
    )
