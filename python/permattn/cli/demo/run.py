"""`permattn demo`: one prompt, dense and sparse in turns."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from permattn import __version__
from permattn.cli.demo import picture, video
from permattn.cli.demo.compare import Audit, Drawn, agreement, choose_heads, describe_head
from permattn.cli.demo.constructed import Grid, Sizes
from permattn.cli.demo.files import prepare_folder, write_whole
from permattn.cli.demo.measure import Meter, Result, Times, memory_note
from permattn.cli.demo.report import Report, print_report
from permattn.cli.demo.subject import SheetHead, Subject, choose_grid, constructed_subject
from permattn.cli.errors import UserError, memory_errors
from permattn.cli.options import check_backend, parse_device, parse_dtype
from permattn.core import Problem

OWN_VIDEO_ASPECT = 2.0
MIN_Q_LEN = 256
SIZES = Sizes()


@dataclass(frozen=True)
class Options:
    """The command line of the demo."""

    video: Path | None
    model: str | None
    frames: int | None
    tokens: int
    device: str
    dtype: str
    backend: str
    out: Path
    rounds: int = 2


def show(options: Options, *, as_json: bool) -> None:
    """Runs the demo, prints the report and writes demo.png, demo.json and, if made, demo.mp4.

    Raises:
        UserError: see the issue in one line.
    """
    # Progress and remarks go to stderr: stdout holds the report alone.
    remarks = Console(stderr=True)
    with memory_errors():
        report, sheet = _run(options, remarks)
    if as_json:
        print(json.dumps(report.to_json(), indent=2))
        return
    console = Console()
    print_report(console, report)
    console.print(f"Picture: [bold]{sheet}[/]   numbers: [bold]{sheet.with_suffix('.json')}[/]")


def _run(options: Options, remarks: Console) -> tuple[Report, Path]:
    device = parse_device(options.device, must_exist=True)
    dtype = parse_dtype(options.dtype)
    # The head sizes are checked again by the call itself; this refuses the impossible early.
    problem = Problem(device.type, dtype, 8, 2, 128, 128, ((64, 64),))
    backend = check_backend(problem, options.backend)
    if options.video is not None and not options.video.is_file():
        raise UserError(f"--video {options.video}: no such file; give the path of a video")
    prepare_folder(options.out)
    with tempfile.TemporaryDirectory() as folder, _progress(remarks) as progress:
        own = Path(folder) / "demo.mp4"
        subject, clip = _prepare(options, own, device, dtype, progress)
        report, drawn, heads = _measure(subject, clip, options, backend, device, progress)
        task = progress.add_task("drawing", total=len(heads) + 1)
        sheet = options.out / "demo.png"
        write_whole(
            sheet,
            lambda path: picture.draw(
                path, report, clip, drawn, heads, lambda: progress.advance(task)
            ),
        )
        text = json.dumps(report.to_json(), indent=2) + "\n"
        write_whole(sheet.with_suffix(".json"), lambda path: path.write_text(text, "utf-8"))
        if options.video is None:
            write_whole(sheet.with_suffix(".mp4"), lambda path: shutil.copyfile(own, path))
    return report, sheet


def _progress(remarks: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:34}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        console=remarks,
    )


def _prepare(
    options: Options, own: Path, device: torch.device, dtype: torch.dtype, progress: Progress
) -> tuple[Subject, video.Clip]:
    """The model and its inputs, and the clip that they were made from."""
    source = options.video or own
    aspect = OWN_VIDEO_ASPECT if options.video is None else video.aspect_of(source)

    def read(pixels: Grid) -> video.Clip:
        """A clip of two frames per grid frame; height and width in pixels."""
        size: dict[str, Any] = {
            "num_frames": 2 * pixels.frames,
            "width": pixels.width,
            "height": pixels.height,
        }
        if options.video is None:
            task = progress.add_task("encoding a video of photographs", total=2 * pixels.frames)
            video.encode(own, **size, on_frame=lambda: progress.advance(task))
        task = progress.add_task("decoding the video", total=2 * pixels.frames)
        return video.decode(source, **size, on_frame=lambda: progress.advance(task))

    if options.model is not None:
        from permattn.cli.demo.checkpoint import checkpoint_subject

        return checkpoint_subject(
            options.model,
            read,
            tokens=options.tokens,
            frames=options.frames,
            aspect=aspect,
            device=device,
            dtype=dtype,
        )
    grid = choose_grid(options.tokens, options.frames, aspect)
    side = 2 * SIZES.patch
    clip = read(Grid(grid.frames, grid.height * side, grid.width * side))
    task = progress.add_task("building the model", total=1)
    subject = constructed_subject(clip, grid, device=device, dtype=dtype, sizes=SIZES)
    progress.advance(task)
    return subject, clip


def _measure(
    subject: Subject,
    clip: video.Clip,
    options: Options,
    backend: str,
    device: torch.device,
    progress: Progress,
) -> tuple[Report, dict[int, Drawn], list[SheetHead]]:
    """One pass that compares every layer (and warms both ways up), then the timed passes."""
    from permattn.models import PrefillConfig, patch
    from permattn.patterns.mminference import plan_prefill

    meter = Meter(subject.model, subject.inputs, device)
    config = PrefillConfig(min_q_len=MIN_Q_LEN)
    middle = subject.model.get_decoder().config.num_hidden_layers // 2

    def patched() -> Any:
        try:
            return patch(
                subject.model, config, backend=options.backend, planner=meter.planner(plan_prefill)
            )
        except ValueError as e:
            raise UserError(f"--model: {e}") from e

    task = progress.add_task("comparing layer by layer", total=1)
    with patched() as handle:
        audit = Audit(handle, {head.layer for head in subject.sheet or ()} or {middle})
        exact = meter.run(instead=audit)
    progress.advance(task)
    if not audit.errors:
        reasons = ", ".join(handle.stats["dense_reasons"]) or "no attention call was seen"
        raise UserError(f"every attention call ran dense ({reasons}); use more --tokens")
    dense: list[Times] = []
    sparse: list[Times] = []
    last: Result | None = None
    stats: dict[str, Any] = {}
    task = progress.add_task("dense, sparse, in turns", total=2 * options.rounds)
    for _ in range(options.rounds):
        dense.append(meter.run().times)
        progress.advance(task)
        with patched() as handle:
            last = meter.run()
            stats = handle.stats
        sparse.append(last.times)
        progress.advance(task)
    assert last is not None
    heads = list(subject.sheet or choose_heads(middle, audit.layers[middle]))
    report = Report(
        facts=_facts(subject, clip, options, backend, device),
        dense=dense,
        sparse=sparse,
        density_per_layer=[audit.densities[n] for n in sorted(audit.densities)],
        agreement=agreement(audit, exact, last),
        heads=[describe_head(audit.layers[h.layer], h, options.backend) for h in heads],
        stats=stats,
    )
    return report, audit.layers, heads


def _facts(
    subject: Subject, clip: video.Clip, options: Options, backend: str, device: torch.device
) -> dict[str, Any]:
    width, height = clip.source_size
    made = "made from photographs" if options.video is None else str(options.video)
    return {
        "model": subject.name,
        "note": subject.note,
        "video": f"{len(clip.frames)} frames of a {width}x{height} {clip.codec} video ({made})",
        "tokens": subject.inputs["input_ids"].shape[1],
        "visual_tokens": subject.visual_tokens,
        "dtype": options.dtype,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "backend": backend,
        "permattn": __version__,
        "torch": torch.__version__,
        "memory_note": memory_note(device),
    }
