"""`permattn demo --paro`: one video denoised dense and sparse, from one calibration."""

from __future__ import annotations

import functools
import json
import math
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from permattn import __version__
from permattn.cli.demo.files import prepare_folder, write_whole
from permattn.cli.demo_paro.constructed import Sizes
from permattn.cli.errors import UserError, user_errors
from permattn.cli.options import check_backend, parse_device, parse_dtype
from permattn.core import Problem

SIZES = Sizes()
BLOCK = (64, 64)
FRAMES, ASPECT = 13, 33 / 19
MIN_TOKENS = 4 * BLOCK[0]
# What is denoised, and on what the plan was calibrated: other photograph, other noise, fewer steps.
PHOTO, CALIBRATION_PHOTO = 0, 2
CALIBRATION_STEPS = 2
HEADS_SHOWN = 6
SHOWN_DENSITY = 0.3


@dataclass(frozen=True)
class Options:
    """The command line of the demo."""

    steps: int
    tokens: int
    frames: int | None
    density: str
    precision: str | None
    device: str
    dtype: str
    backend: str
    out: Path
    rounds: int = 2


@dataclass(frozen=True)
class Setting:
    """The command line, understood.

    Args:
        grid: of the video, in tokens.
        densities, precisions: what runs, crossed.
        backend: the one that will run.
        device, dtype: of the model.
        folder: for plan files until all is done.
    """

    grid: tuple[int, int, int]
    densities: tuple[float, ...]
    precisions: tuple[str, ...]
    backend: str
    device: torch.device
    dtype: torch.dtype
    folder: Path


def show(options: Options, *, as_json: bool) -> None:
    """Runs the demo, prints the table, writes demo-paro.png, demo-paro.json and the plans.

    Raises:
        UserError: see the issue in one line.
    """
    # Progress and remarks go to stderr: stdout holds the report alone.
    remarks = Console(stderr=True)
    with user_errors():
        report, sheet = _run(options, remarks)
    if as_json:
        print(json.dumps(report.to_json(), indent=2))
        return
    from permattn.cli.demo_paro.report import print_report

    console = Console()
    print_report(console, report)
    console.print(f"Picture: [bold]{sheet}[/]   numbers: [bold]{sheet.with_suffix('.json')}[/]")


def parse_densities(text: str) -> tuple[float, ...]:
    """Shares in (0, 1], in the order given. Raises UserError."""
    found: list[float] = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if not 0.0 < value <= 1.0:
            raise UserError(f"--density {text}: wants shares in (0, 1], such as 0.5,0.3,0.2")
        found.append(value)
    return tuple(dict.fromkeys(found))


def parse_precisions(text: str | None, dtype: str) -> tuple[str, ...]:
    """Names of numerics, in the order given; None = the demo's four. Raises UserError."""
    from permattn.cli.demo_paro.runs import QUANTISED

    if text is None:
        return (dtype, "int8", "int8+int8", "int4")
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name in ("bf16", "fp16", "fp32") and name != dtype:
            raise UserError(f"--precision {name}: the model runs in {dtype}; pass --dtype {name}")
        if name != dtype and name not in QUANTISED:
            known = ", ".join((dtype, *QUANTISED))
            raise UserError(f"--precision {text}: {name!r} is unknown; wants names of {known}")
    return names


def choose_grid(tokens: int, frames: int | None) -> tuple[int, int, int]:
    """The least grid of at least that many tokens and of the demo's shape.

    Raises:
        UserError: too few tokens for blocks to be left out.
    """
    if tokens < MIN_TOKENS:
        raise UserError(f"--tokens {tokens}: wants at least {MIN_TOKENS}, a few blocks of 64")
    frames = frames or max(3, min(FRAMES, round((tokens / ASPECT) ** (1 / 3))))
    height = max(2, round(math.sqrt(tokens / frames / ASPECT)))
    width = max(2, math.ceil(tokens / frames / height))
    return frames, height, width


def _run(options: Options, remarks: Console) -> tuple[Any, Path]:
    densities = parse_densities(options.density)
    device = parse_device(options.device, must_exist=True)
    dtype = parse_dtype(options.dtype)
    grid = choose_grid(options.tokens, options.frames)
    problem = Problem(device.type, dtype, 8, 8, 64, 64, (BLOCK,))
    backend = check_backend(problem, options.backend)
    try:
        import diffusers
    except ImportError as e:
        raise UserError(
            "--paro runs a model of diffusers, which is missing: pip install 'permattn[cli]'"
        ) from e
    precisions = parse_precisions(options.precision, options.dtype)
    from permattn.cli.demo_paro import picture

    diffusers.utils.logging.set_verbosity_error()
    prepare_folder(options.out)
    with tempfile.TemporaryDirectory() as name, _progress(remarks) as progress:
        folder = Path(name)
        setting = Setting(grid, densities, precisions, backend, device, dtype, folder)
        report = _measure(options, setting, progress)
        task = progress.add_task("drawing", total=1)
        sheet = options.out / "demo-paro.png"
        write_whole(sheet, lambda path: picture.draw(path, report))
        text = json.dumps(report.to_json(), indent=2) + "\n"
        write_whole(sheet.with_suffix(".json"), lambda path: path.write_text(text, "utf-8"))
        for plan in folder.iterdir():
            write_whole(options.out / plan.name, functools.partial(shutil.copyfile, plan))
        progress.advance(task)
    return report, sheet


def _progress(remarks: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:34}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        console=remarks,
    )


def _measure(options: Options, setting: Setting, progress: Progress) -> Any:
    from permattn.cli.demo_paro.headmaps import head_maps
    from permattn.cli.demo_paro.pipeline import build_demo_pipeline
    from permattn.cli.demo_paro.quality import compare
    from permattn.cli.demo_paro.report import Report
    from permattn.cli.demo_paro.runs import Variant, run

    task = progress.add_task("building the model", total=1)
    made = build_demo_pipeline(
        setting.grid,
        steps=options.steps,
        sizes=SIZES,
        dtype=setting.dtype,
        device=setting.device,
    )
    progress.advance(task)
    start = time.perf_counter()
    shown = _shown(setting.densities)
    plans = _calibrate(made, setting, shown, options.backend, progress)
    seconds = time.perf_counter() - start
    task = progress.add_task("heads for the picture", total=1)
    layer = SIZES.layers // 2
    heads = head_maps(made, plans[shown, True].plan, PHOTO, layer, HEADS_SHOWN, SIZES)
    progress.advance(task)
    variants = [Variant(d, p) for d in setting.densities for p in setting.precisions]
    variants.append(Variant(shown, setting.precisions[0], ordered=False))
    turns = _turns(variants, options.rounds)
    task = progress.add_task("denoising", total=len(turns) * options.steps)
    call = made.call(PHOTO)
    dense: list[Any] = []
    runs: list[Any] = []
    remarks: dict[str, None] = {}
    for variant in turns:
        progress.update(task, description=f"denoising, {variant.name}")
        plan = None
        if variant.density is not None:
            plan = plans[variant.density, variant.ordered].plan
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            done = run(
                *(made.pipe, call, variant, plan),
                backend=options.backend,
                on_step=lambda: progress.advance(task),
            )
        remarks.update(dict.fromkeys(str(warning.message) for warning in said))
        (dense if plan is None else runs).append(done)
    progress.update(task, description="denoising")
    exact = dense[0]
    frames = exact.frames
    return Report(
        facts={**_facts(made, options, setting), "remarks": list(remarks)},
        dense=dense,
        runs=runs,
        quality=[compare(r.frames, r.latents, frames, exact.latents) for r in runs],
        plans=plans,
        heads=heads,
        calibration_seconds=seconds,
        sdpa_ratio=_sdpa_over_fp32(made.num_tokens, setting.dtype, setting.device),
    )


def _shown(densities: tuple[float, ...]) -> float:
    """The density of the head maps and of the run without reordering: the one nearest to 0.3."""
    return min(densities, key=lambda density: abs(density - SHOWN_DENSITY))


def _turns(variants: list[Any], rounds: int) -> list[Any]:
    """All variants, the dense run in front of them and evenly between them, at the end too."""
    from permattn.cli.demo_paro.runs import Variant

    turns: list[Any] = [Variant()]
    done = 1
    for i, variant in enumerate(variants, 1):
        turns.append(variant)
        while done < rounds and i * (rounds - 1) >= done * len(variants):
            turns.append(Variant())
            done += 1
    return turns


def _calibrate(
    made: Any, setting: Setting, shown: float, backend: str, progress: Progress
) -> dict[tuple[float, bool], Any]:
    """Plans by (density, reordered) and their files; one measurement serves all densities."""
    from permattn.calibrate.paro import MeasureOptions, SelectOptions, measure
    from permattn.cli.demo_paro.report import PlanFacts
    from permattn.paro_file import save_paro

    calls = [replace(made, steps=CALIBRATION_STEPS).call(CALIBRATION_PHOTO, seed=1)]
    steps = tuple(range(CALIBRATION_STEPS))
    measuring = MeasureOptions(
        density=shown, block=BLOCK, sampled_steps=steps, order_steps=1, backend=backend
    )
    plans: dict[tuple[float, bool], Any] = {}
    for ordered, chosen in ((True, setting.densities), (False, (shown,))):
        told = "calibrating" if ordered else "calibrating, not reordered"
        task = progress.add_task(told, total=2)
        found = measure(
            made.pipe,
            calls,
            measuring if ordered else replace(measuring, orders=(0,)),
            on_progress=_teller(progress, task),
        )
        for density in chosen:
            plan = found.plan(SelectOptions(density=density))
            name = f"wan-{100 * density:g}{'' if ordered else '-fhw'}.paro"
            path = setting.folder / name
            save_paro(plan, path)
            plans[density, ordered] = PlanFacts(density, ordered, plan, name, path.stat().st_size)
        progress.update(task, completed=2)
    return plans


def _teller(progress: Progress, task: Any) -> Callable[[str, float], None]:
    def tell(stage: str, share: float) -> None:
        progress.update(task, completed=share + (stage == "masks"))

    return tell


def _sdpa_over_fp32(tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """Time of torch's dense attention in a dtype over that in float32; two heads, medians."""
    if dtype == torch.float32:
        return 1.0
    values = torch.randn(1, 2, tokens, 64, device=device)
    times: dict[torch.dtype, list[float]] = {dtype: [], torch.float32: []}
    for _ in range(3):
        for kind, found in times.items():
            x = values.to(kind)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            torch.nn.functional.scaled_dot_product_attention(x, x, x)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found.append(time.perf_counter() - start)
    low, full = (sorted(times[kind])[1] for kind in (dtype, torch.float32))
    return low / full


def _facts(made: Any, options: Options, setting: Setting) -> dict[str, Any]:
    config = made.pipe.transformer.config
    return {
        "model": f"{type(made.pipe.transformer).__name__}, {config.num_layers} layers, "
        f"{config.num_attention_heads} heads of {config.attention_head_dim}",
        "note": made.note,
        "tokens": made.num_tokens,
        "grid": list(made.grid),
        "steps": options.steps,
        "scheduler": type(made.pipe.scheduler).__name__,
        "pipeline": type(made.pipe).__name__,
        "dtype": options.dtype,
        "device": str(setting.device),
        "threads": torch.get_num_threads(),
        "backend": setting.backend,
        "block": list(BLOCK),
        "permattn": __version__,
        "torch": torch.__version__,
    }
