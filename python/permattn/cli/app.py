"""Commands and their options; what they do lives in the modules beside."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from permattn.cli.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, UserError, one_line

app = typer.Typer(
    name="permattn",
    help="Block-sparse attention for long visual prompts.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else there.")]

_MODEL = (
    "A checkpoint: a local folder or a hub id. Default: a model with constructed weights; its text "
    "is meaningless, its attention looks like that of trained models."
)


def run(argv: Sequence[str]) -> int:
    """Runs one command line and turns every expected end into an exit code."""
    command = typer.main.get_command(app)
    try:
        result = command.main(list(argv), prog_name="permattn", standalone_mode=False)
    except KeyboardInterrupt:
        return _stop("interrupted", EXIT_INTERRUPTED)
    except UserError as e:
        return _stop(str(e), EXIT_BAD_INPUT)
    except BrokenPipeError:
        # The reader of a pipe (head, less) left; the interpreter must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as e:
        # By name: typer may bring a click of its own.
        if type(e).__name__ == "Abort":
            return _stop("interrupted", EXIT_INTERRUPTED)
        if hasattr(e, "format_message"):
            hint = getattr(getattr(e, "ctx", None), "command_path", "permattn")
            return _stop(f"{one_line(e.format_message())} (see {hint} --help)", EXIT_BAD_INPUT)
        raise
    if result == EXIT_INTERRUPTED:
        # typer turns Ctrl-C into this result without a word.
        return _stop("interrupted", EXIT_INTERRUPTED)
    return result if isinstance(result, int) else 0


def _stop(message: str, code: int) -> int:
    print(f"permattn: {message}", file=sys.stderr)
    return code


@app.command()
def info(
    explain: Annotated[
        bool, typer.Option("--explain", help="Say which backend the problem below would run on.")
    ] = False,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 28,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key and value heads.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Prompt length.")] = 131072,
    head_dim: Annotated[int, typer.Option(min=1, help="Size of a head.")] = 128,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    density: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of causal pairs that are computed.")
    ] = 0.1,
    backward: Annotated[bool, typer.Option("--backward", help="With gradients.")] = False,
    quant: Annotated[
        str, typer.Option(help="none, int8, int8+int8, int8+fp8, int8+int4 or int4.")
    ] = "none",
    pattern: Annotated[
        str, typer.Option(help="What every head runs: auto, grid, vertical_slash, ...")
    ] = "auto",
    frame: Annotated[str, typer.Option(help="Height x width of a frame in tokens.")] = "16x16",
    heads_per_pass: Annotated[
        int | None, typer.Option(min=1, help="Query heads planned and attended at a time.")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers whose keys and values are held.")] = 1,
    weights_gb: Annotated[float, typer.Option(min=0.0, help="Weights beside them, in GB.")] = 0.0,
    memory_gb: Annotated[
        float | None, typer.Option(min=0.0, help="Memory of the device, in GB: does it fit?")
    ] = None,
    json: Json = False,
) -> None:
    """Show versions, devices and backends, and what stands in a backend's way.

    With --explain: which backend and kernel a problem would run on, its work, and every byte of
    memory, counted without allocating it.
    """
    from permattn.cli import info as command

    memory = command.MemoryQuestion(pattern, frame, heads_per_pass, layers, weights_gb, memory_gb)
    problem = command.Question(
        heads, kv_heads, tokens, head_dim, dtype, device, density, backward, memory, quant
    )
    command.show(problem, explain=explain, as_json=json)


@app.command()
def demo(
    video: Annotated[
        Path | None, typer.Option(help="A video file. Default: one made from photographs.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help=_MODEL),
    ] = None,
    frames: Annotated[
        int | None, typer.Option(min=4, help="Video frames to read. Default: from --tokens.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=64, help="At least that many visual tokens. Default: 16384; --paro: 8000"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    backend: Annotated[str, typer.Option(help="auto, cpu, triton or reference.")] = "auto",
    out: Annotated[
        Path, typer.Option(help="Folder for the picture, the numbers and files.")
    ] = Path("demo-out"),
    rounds: Annotated[
        int,
        typer.Option(
            min=1, help="Timed passes of each kind, in turns; --paro: of the dense model."
        ),
    ] = 2,
    paro: Annotated[
        bool,
        typer.Option("--paro", help="PAROAttention: a Wan transformer denoises a video instead."),
    ] = False,
    steps: Annotated[
        int | None, typer.Option(min=1, help="--paro: denoising steps. Default: 8.")
    ] = None,
    density: Annotated[
        str | None,
        typer.Option(help="--paro: shares of blocks to compute. Default: 0.5,0.3,0.2."),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="--paro: numerics to run. Default: bf16,int8,int8+int8,int4."),
    ] = None,
    json: Json = False,
) -> None:
    """Prefill a long video prompt with and without sparse attention, and draw why it works.

    Runs a real vision-language model class on a real video file, dense (torch SDPA) and sparse in
    turns, and reports time, error, agreement and memory. Takes two to three minutes on two cores.

    With --paro: calibrates PAROAttention on a real Wan transformer class with constructed weights,
    denoises one video dense and sparse, quantised and not, and shows what is lost and gained.
    """
    if paro:
        from permattn.cli.demo_paro.run import Options as ParoOptions
        from permattn.cli.demo_paro.run import show as show_paro

        for name, value in (("--video", video), ("--model", model)):
            if value is not None:
                raise UserError(f"{name} {value}: --paro brings its own; leave it out")
        show_paro(
            ParoOptions(
                steps=steps or 8,
                tokens=tokens or 8000,
                frames=frames,
                density=density or "0.5,0.3,0.2",
                precision=precision,
                device=device,
                dtype=dtype,
                backend=backend,
                out=out,
                rounds=rounds,
            ),
            as_json=json,
        )
        return
    for name, given in (("--steps", steps), ("--density", density), ("--precision", precision)):
        if given is not None:
            raise UserError(f"{name} {given}: only with --paro")
    from permattn.cli.demo.run import Options, show

    options = Options(video, model, frames, tokens or 16384, device, dtype, backend, out, rounds)
    show(options, as_json=json)


@app.command()
def report(
    model: Annotated[str | None, typer.Option(help=_MODEL)] = None,
    video: Annotated[
        Path | None, typer.Option(help="A video file. Default: one made from photographs.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A config that calibrate wrote. Default: auto for every head."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=64, help="At least that many visual tokens.")] = 8192,
    frames: Annotated[
        int | None, typer.Option(min=4, help="Video frames to read. Default: from --tokens.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Such as 0,4-7. Default: all.")] = None,
    paro: Annotated[
        Path | None,
        typer.Option(help="A PARO plan; --model is then a diffusers pipeline, or 'constructed'."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="With --paro and a --model: what to generate.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="With --paro and --model: denoising steps.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.json and report.png.")] = Path(
        "report-out"
    ),
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    backend: Annotated[str, typer.Option(help="auto, cpu, triton or reference.")] = "auto",
    json: Json = False,
) -> None:
    """Show what a config does to one prompt: pattern, density, recall and error of every head.

    Recall is the share of the true attention mass that the plan keeps; the error is that of the
    attention output, on exact inputs. With --paro: axis orders, density and recall of a PARO plan;
    with --model its recall and error are measured on a run, and heads are drawn before and after
    reordering.
    """
    if paro is not None:
        from permattn.cli.paro_subject import PipeOptions
        from permattn.cli.report import paro as command

        if video is not None or config is not None or layers is not None:
            raise UserError("--paro: does not go with --video, --config or --layers")
        pipe = PipeOptions(model, tuple(prompt or ()), steps=steps, frames=frames)
        wanted = command.Options(paro, pipe, "transformer", out, device, dtype, backend)
        command.show(wanted, as_json=json)
        return
    if prompt or steps is not None:
        raise UserError("--prompt and --steps: belong to --paro")
    from permattn.cli.prompts import PromptOptions
    from permattn.cli.report.run import Options, show

    videos = () if video is None else (video,)
    prompts = PromptOptions(model, videos, 1, tokens, frames)
    show(Options(prompts, config, layers, out, device, dtype, backend), as_json=json)


calibrate = typer.Typer(
    help="Search offline for what every head of a model should run.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(calibrate, name="calibrate")


@calibrate.command()
def mminference(
    model: Annotated[str | None, typer.Option(help=_MODEL)] = None,
    video: Annotated[
        list[Path] | None,
        typer.Option(help="A video file; once per sample. Default: made from photographs."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Videos to make where none is given.")] = 1,
    tokens: Annotated[
        int, typer.Option(min=64, help="At least that many visual tokens per sample.")
    ] = 16384,
    frames: Annotated[
        int | None, typer.Option(min=4, help="Video frames to read. Default: from --tokens.")
    ] = None,
    config_out: Annotated[
        Path | None, typer.Option(help="Where the config goes. Default: config.json in --out.")
    ] = None,
    default_out: Annotated[
        Path | None,
        typer.Option(help="Also a config of one pattern for all heads, for any size."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.json and report.png.")] = Path(
        "calibrate-out"
    ),
    budget: Annotated[
        str, typer.Option(help="SINK+LOCAL: a head may cost what this A-shape costs.")
    ] = "1024+4096",
    density: Annotated[
        float | None, typer.Option(help="In place of --budget: a share of all causal pairs.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Such as 0,4-7. Default: all.")] = None,
    candidate: Annotated[
        list[str] | None,
        typer.Option(help="Only candidates whose name starts so, such as grid; may repeat."),
    ] = None,
    boundaries: Annotated[
        bool, typer.Option(help="Search patterns per modality and per pair of modalities.")
    ] = True,
    rounds: Annotated[int, typer.Option(min=0, help="Timed rounds; 0 = do not time.")] = 3,
    pooled: Annotated[
        bool, typer.Option(help="Heads share the budget of their layer, or each has its own.")
    ] = True,
    max_error: Annotated[
        float | None, typer.Option(min=0.0, help="Heads that err by more stay dense.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="A folder that keeps what is measured; go on from it.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    backend: Annotated[str, typer.Option(help="auto, cpu, triton or reference.")] = "auto",
    json: Json = False,
) -> None:
    """Find the prefill pattern of every head, and write the config that patch() reads.

    Candidates of equal cost are compared by the error of the attention output; kernel time decides
    between near ones.
    """
    from permattn.cli.calibrate.run import Options, show
    from permattn.cli.prompts import PromptOptions

    prompts = PromptOptions(model, tuple(video or ()), samples, tokens, frames)
    options = Options(
        prompts=prompts,
        config_out=config_out,
        default_out=default_out,
        out=out,
        budget=budget,
        density=density,
        layers=layers,
        candidates=tuple(candidate or ()),
        boundaries=boundaries,
        rounds=rounds,
        pooled=pooled,
        max_error=max_error,
        resume=resume,
        device=device,
        dtype=dtype,
        backend=backend,
    )
    show(options, as_json=json)


@calibrate.command()
def paro(
    model: Annotated[
        str | None,
        typer.Option(
            help="A diffusers pipeline: a local folder or a hub id. Default: a Wan transformer "
            "with constructed weights, which denoises videos made from photographs."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to generate; one or two are enough.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Videos where no --model is given.")] = 1,
    density: Annotated[float, typer.Option(help="Share of the vision blocks to compute.")] = 0.3,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    height: Annotated[int | None, typer.Option(min=16, help="In pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=16, help="In pixels.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Video frames.")] = None,
    metric: Annotated[
        str, typer.Option(help="How orders are compared: mass, or the paper's.")
    ] = "mass",
    scope: Annotated[
        str, typer.Option(help="What shares a threshold: model, layer, head, or coverage.")
    ] = "model",
    coverage: Annotated[
        float, typer.Option(help="With --scope coverage: the mass that every head keeps.")
    ] = 0.95,
    bins: Annotated[
        str, typer.Option(help="Steps that share masks: half_shared, per_step, shared, a number.")
    ] = "half_shared",
    block: Annotated[str, typer.Option(help="Slots of a block: SIZE or QUERIESxKEYS.")] = "64",
    sampled_steps: Annotated[
        str | None, typer.Option(help="Steps to measure: a count, or numbers such as 0,4,9.")
    ] = None,
    empty_below: Annotated[
        float, typer.Option(help="Heads with less mass on vision keys see text alone.")
    ] = 0.0,
    min_recall: Annotated[
        float, typer.Option(help="Refuse a plan with a layer that keeps less of its mass.")
    ] = 0.0,
    component: Annotated[
        str, typer.Option(help="Of a pipeline with two transformers: which one.")
    ] = "transformer",
    plan_out: Annotated[
        Path | None, typer.Option(help="Where the plan goes. Default: plan.paro in --out.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.json and report.png.")] = Path(
        "calibrate-out"
    ),
    resume: Annotated[
        Path | None, typer.Option(help="A folder that keeps what is measured; go on from it.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    backend: Annotated[str, typer.Option(help="auto, cpu, triton or reference.")] = "auto",
    json: Json = False,
) -> None:
    """Find axis orders and block masks of a diffusion transformer, and write a PARO plan.

    Runs the pipeline dense, twice per prompt, and a third time to measure the plan.
    """
    from permattn.calibrate.paro import SelectOptions
    from permattn.cli.calibrate.paro import Options, show
    from permattn.cli.errors import user_errors
    from permattn.cli.paro_subject import PipeOptions

    with user_errors():
        selection = SelectOptions(density, scope, coverage, empty_below, min_recall)  # type: ignore[arg-type]
    pipe = PipeOptions(model, tuple(prompt or ()), samples, steps, height, width, frames)
    options = Options(
        *(pipe, selection, metric, bins, block, sampled_steps, component),
        *(plan_out, out, resume, device, dtype, backend),
    )
    show(options, as_json=json)


@app.command(name="train-biformer")
def train_biformer(
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 400,
    size: Annotated[int, typer.Option(help="Pixels of a crop: a multiple of 112, or of 64.")] = 112,
    batch: Annotated[int, typer.Option(help="Crops per step.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and of the order of crops.")] = 0,
    attention: Annotated[
        str, typer.Option(help="ours, gather (as released), dense, or all side by side.")
    ] = "all",
    out: Annotated[
        Path, typer.Option(help="Folder for the checkpoint, the numbers and the pictures.")
    ] = Path("train-out"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")
    ] = False,
    picture: Annotated[bool, typer.Option(help="Draw curves and routed regions.")] = True,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    backend: Annotated[str, typer.Option(help="Of ours: auto, cpu, triton or reference.")] = "auto",
    json: Json = False,
) -> None:
    """Train a small BiFormer from scratch on real photographs, three ways side by side.

    Dense attention, routing as released (torch gather) and permattn: one seed, one order of
    batches. Ctrl-C leaves a checkpoint; --resume goes on to the same result, bit by bit.
    """
    from permattn.cli.train_biformer.run import Options, show

    options = Options(
        steps=steps,
        size=size,
        batch=batch,
        seed=seed,
        attention=attention,
        out=out,
        resume=resume,
        picture=picture,
        save_every=save_every,
        device=device,
        backend=backend,
    )
    show(options, as_json=json)


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)
def bench(context: typer.Context) -> int:
    """Check results, then time them against torch (needs the repository's bench folder).

    All arguments go to the bench: `permattn bench --help` lists them.
    """
    from permattn.cli import bench as command

    return command.run(context.args)
