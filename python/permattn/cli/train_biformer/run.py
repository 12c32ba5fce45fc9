"""`permattn train-biformer`: trains, shows, and leaves a checkpoint to go on from."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from permattn import __version__
from permattn.backends import BACKENDS, resolve
from permattn.cli.demo.files import prepare_folder, write_whole
from permattn.cli.errors import UserError, user_errors
from permattn.cli.options import parse_device
from permattn.cli.train_biformer import checkpoint
from permattn.cli.train_biformer.network import describe
from permattn.cli.train_biformer.photographs import PHOTOS, PhotoCrops, load_photographs
from permattn.cli.train_biformer.report import Report, print_report
from permattn.cli.train_biformer.settings import MIN_STEPS, Settings, parse_kinds, regions_of
from permattn.cli.train_biformer.trainer import Trainer
from permattn.core.regions import RegionProblem

NUMBERS, CURVES, REGIONS = "train.json", "curves.png", "regions.png"
# What the picture of regions shows: photograph, where across the middle band, and two places.
SHOWN = (
    ("astronaut.png", 0.12, (0.36, 0.5), (0.9, 0.1)),
    ("camera.png", 0.16, (0.22, 0.5), (0.8, 0.2)),
    ("chelsea.png", 0.45, (0.25, 0.2), (0.75, 0.75)),
    ("motorcycle_left.png", 0.5, (0.5, 0.2), (0.6, 0.8)),
)


@dataclass(frozen=True)
class Options:
    """The command line."""

    steps: int
    size: int
    batch: int
    seed: int
    attention: str
    out: Path
    resume: bool
    picture: bool
    save_every: int
    device: str
    backend: str


def show(options: Options, *, as_json: bool) -> None:
    """Trains, prints the table, and writes numbers, pictures and the checkpoint.

    Raises:
        UserError: bad input, in one line.
        KeyboardInterrupt: on Ctrl-C, behind a checkpoint of the last whole step.
    """
    # Progress and remarks go to stderr: stdout holds the report alone.
    remarks = Console(stderr=True)
    with user_errors():
        report, files = _run(options, remarks)
    if as_json:
        print(json.dumps(report.to_json(), indent=2))
        return
    console = Console()
    print_report(console, report)
    console.print("   ".join(f"{name}: [bold]{path}[/]" for name, path in files.items()))


def settings_of(options: Options) -> Settings:
    """What the command line asks for. Raises UserError where it makes no sense."""
    kinds = parse_kinds(options.attention)
    if options.steps < MIN_STEPS:
        raise UserError(f"--steps {options.steps}: wants at least {MIN_STEPS}")
    if options.batch < MIN_STEPS:
        raise UserError(f"--batch {options.batch}: wants at least 2, batch norm needs them")
    regions, topks = regions_of(options.size)
    device = parse_device(options.device, must_exist=True)
    _check_backend(device.type, options.backend)
    return Settings(
        kinds=kinds,
        steps=options.steps,
        size=options.size,
        regions=regions,
        topks=topks,
        batch=options.batch,
        seed=options.seed,
        backend=options.backend,
        device=str(device),
    )


def train(
    trainer: Trainer,
    *,
    save: Callable[[], object],
    save_every: int,
    on_step: Callable[[], object] = lambda: None,
) -> None:
    """Steps to the end; saves every so many steps, at the end, and on Ctrl-C.

    Raises:
        KeyboardInterrupt: Ctrl-C came; the step under way was finished and saved.
    """
    with _interrupts() as interrupted:
        while trainer.step < trainer.settings.steps and not interrupted.is_set():
            trainer.advance()
            if trainer.step % save_every == 0 and trainer.step < trainer.settings.steps:
                save()
            on_step()
        save()
    if interrupted.is_set():
        raise KeyboardInterrupt


def _run(options: Options, remarks: Console) -> tuple[Report, dict[str, Path]]:
    settings = settings_of(options)
    if options.save_every < 1:
        raise UserError(f"--save-every {options.save_every}: wants at least 1")
    kept = None
    if options.resume:
        kept = checkpoint.load(options.out, settings)
    else:
        checkpoint.refuse_to_overwrite(options.out)
    crops = PhotoCrops(load_photographs(), settings.size)
    trainer = Trainer(settings, crops)
    if kept is not None:
        trainer.load_state(kept)
    prepare_folder(options.out)
    with _progress(remarks) as progress:
        bar = _Bar(progress, trainer)
        train(
            trainer,
            save=lambda: checkpoint.save(options.out, settings, trainer.state()),
            save_every=options.save_every,
            on_step=bar.update,
        )
    report = Report(_facts(settings, trainer), trainer.runs)
    return report, _write(options, report, trainer)


class _Bar:
    """Loss of every run, and images per second of all together."""

    def __init__(self, progress: Progress, trainer: Trainer) -> None:
        self._progress = progress
        self._trainer = trainer
        steps = trainer.settings.steps
        self._task = progress.add_task("training", total=steps, completed=trainer.step, told="")

    def update(self) -> None:
        runs = self._trainer.runs
        seconds = sum(run.seconds[-1] for run in runs)
        rate = len(runs) * self._trainer.settings.batch / seconds
        losses = "  ".join(f"{run.kind} {run.losses[-1]:.3f}" for run in runs)
        told = f"loss: {losses}   {rate:,.0f} images/s"
        self._progress.update(self._task, completed=self._trainer.step, told=told)


def _progress(remarks: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[told]}"),
        console=remarks,
    )


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Ctrl-C sets the event; a second one interrupts at once."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = signal.getsignal(signal.SIGINT) or signal.SIG_DFL

    def note(_signal: int, _frame: Any) -> None:
        came.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)


def _check_backend(device_type: str, backend: str) -> str:
    if backend != "auto" and backend not in BACKENDS:
        raise UserError(f"--backend: wants auto, {', '.join(BACKENDS)}, got {backend!r}")
    head_dim = Settings.head_dim
    problem = RegionProblem(device_type, torch.float32, head_dim, head_dim)
    try:
        return resolve(problem, backend)
    except NotImplementedError as e:
        raise UserError(f"--backend {backend}: {e}") from e


def _facts(settings: Settings, trainer: Trainer) -> dict[str, Any]:
    count = trainer.crops.num_classes
    return {
        "model": describe(settings, trainer.runs[0].model),
        "task": f"Which of {count} photographs is a {settings.size}-pixel crop from? Training "
        "crops lie beside the middle band, validation crops in it",
        "photographs": list(PHOTOS),
        "chance": 1 / count,
        "validation_crops": count * settings.per_photo,
        "settings": settings.to_json(),
        "dtype": "fp32",
        "backend": _check_backend(torch.device(settings.device).type, settings.backend),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "permattn": __version__,
        "torch": torch.__version__,
    }


def _write(options: Options, report: Report, trainer: Trainer) -> dict[str, Path]:
    files = {"numbers": options.out / NUMBERS}
    text = json.dumps(report.to_json(), indent=1) + "\n"
    write_whole(files["numbers"], lambda path: path.write_text(text, "utf-8"))
    if options.picture:
        from permattn.cli.train_biformer.curves_picture import draw_curves

        files["curves"] = options.out / CURVES
        write_whole(files["curves"], lambda path: draw_curves(path, report))
        views = _views(trainer)
        if views:
            from permattn.cli.train_biformer.routed_picture import draw_views

            files["regions"] = options.out / REGIONS
            note = (
                "Validation crops. The query region is outlined in its colour; routed regions are "
                "bright, the brighter and yellower the larger the affinity."
            )
            write_whole(files["regions"], lambda path: draw_views(path, views, note))
    files["checkpoint"] = options.out / checkpoint.NAME
    return files


def _views(trainer: Trainer) -> list[Any]:
    """Routing of the network that permattn trained; none where another attention ran alone."""
    from permattn.cli.train_biformer.routed import routes_of
    from permattn.cli.train_biformer.routed_picture import RoutedView

    ours = next((run for run in trainer.runs if run.kind == "ours"), None)
    if ours is None:
        return []
    views = []
    for name, across, *places in SHOWN:
        image, pixels = trainer.crops.validation_view(PHOTOS.index(name), across)
        stages = routes_of(ours.model, image.to(trainer.settings.device))
        views.append(RoutedView(Path(name).stem.split("_")[0], pixels, stages, tuple(places)))
    return views
