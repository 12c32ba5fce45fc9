"""`permattn info`: what is here, what can run, and what a problem would cost."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from permattn import __version__
from permattn.backends import AUTO_ORDER, reasons
from permattn.calibrate.memory import LayerShape
from permattn.cli.errors import UserError
from permattn.cli.memory import (
    MemoryQuestion,
    memory_report,
    parse_frame,
    parse_pattern,
    print_memory,
)
from permattn.cli.options import parse_device, parse_dtype
from permattn.core import Problem, QuantSpec

BLOCK = 64
PACKAGES = ("transformers", "diffusers", "triton", "av", "scikit-image", "matplotlib")


@dataclass(frozen=True)
class Question:
    """A problem as the command line describes it."""

    heads: int
    kv_heads: int
    tokens: int
    head_dim: int
    dtype: str
    device: str
    density: float
    backward: bool
    memory: MemoryQuestion = field(default_factory=MemoryQuestion)
    quant: str = "none"

    def problem(self) -> Problem:
        if self.heads % self.kv_heads:
            raise UserError(
                f"--heads: wants a multiple of --kv-heads ({self.kv_heads}), got {self.heads}"
            )
        try:
            quant = QuantSpec.named(self.quant)
        except ValueError as e:
            raise UserError(f"--{e}") from None
        return Problem(
            device_type=parse_device(self.device, must_exist=False).type,
            dtype=parse_dtype(self.dtype),
            num_q_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim,
            blocks=((BLOCK, BLOCK),),
            quant=quant,
            needs_grad=self.backward,
        )


def show(question: Question, *, explain: bool, as_json: bool) -> None:
    """Prints the report.

    Raises:
        UserError: a problem that makes no sense.
    """
    problem = question.problem()
    report: dict[str, Any] = {
        "versions": versions(),
        "cpu": describe_cpu(),
        "cuda": describe_cuda(),
        "cuda_kernels": describe_cuda_kernels(),
        "backends": _why_not(problem),
    }
    if explain:
        report["explain"] = explanation(question, problem)
    if as_json:
        print(json.dumps(report, indent=2))
        return
    console = Console()
    _print_machine(console, report)
    _print_backends(console, report["backends"], question)
    if explain:
        _print_explanation(console, report["explain"])


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "permattn": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def describe_cpu() -> dict[str, Any]:
    """Model, threads, and the instruction sets of the native kernels."""
    from permattn.backends import cpu

    try:
        isa: str | None = cpu.isa()
    except RuntimeError:
        isa = None
    return {
        "model": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": isa,
        "available_isas": list(cpu.available_isas()),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
    }


def describe_cuda() -> list[dict[str, Any]]:
    devices = []
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        devices.append(
            {
                "name": facts.name,
                "capability": f"{facts.major}.{facts.minor}",
                "memory_bytes": facts.total_memory,
            }
        )
    return devices


def describe_cuda_kernels() -> dict[str, Any]:
    """CUDA code of the native library, and why none of it runs here."""
    from permattn.backends import cuda

    return cuda.describe()


def explanation(question: Question, problem: Problem) -> dict[str, Any]:
    """The backend that auto picks, every other's reason, and work and memory of one layer."""
    why = _why_not(problem)
    chosen = next((name for name in AUTO_ORDER if why[name] is None), None)
    pairs = question.tokens * (question.tokens + 1) // 2
    per_pair = 4 * question.head_dim * question.heads * (3.5 if question.backward else 1)
    return {
        "backend": chosen,
        "kernel": _kernel_name(chosen, problem),
        "why_not": why,
        "dense_flops": int(pairs * per_pair),
        "sparse_flops": int(pairs * per_pair * question.density),
        "density": question.density,
        "score_matrix_bytes_never_made": question.heads
        * question.tokens**2
        * problem.dtype.itemsize,
        "memory": memory_report(_shape(question, problem), question.memory),
    }


def _shape(question: Question, problem: Problem) -> LayerShape:
    return LayerShape(
        question.tokens,
        question.heads,
        question.kv_heads,
        question.head_dim,
        problem.dtype,
        parse_pattern(question.memory.pattern),
        parse_frame(question.memory.frame),
        problem.device_type,
    )


def _why_not(problem: Problem) -> dict[str, str | None]:
    if problem.device_type == "cuda" and not torch.cuda.is_available():
        # Backends ask the device about itself.
        no_device = "this machine has no CUDA device"
        why: dict[str, str | None] = dict.fromkeys(AUTO_ORDER, no_device)
        return {**why, "cuda": describe_cuda_kernels()["why_not"] or no_device}
    return reasons(problem)


def _kernel_name(backend: str | None, problem: Problem) -> str | None:
    if backend == "cuda":
        from permattn.backends import cuda

        return cuda.kernel_name(problem)
    if backend == "cpu":
        from permattn.backends import cpu

        return f"native C++, {cpu.isa()}, {_short(problem.dtype)}, head dim {problem.head_dim}"
    if backend == "triton":
        major, minor = torch.cuda.get_device_capability()
        return f"Triton, sm_{major}{minor}, {_short(problem.dtype)}, head dim {problem.head_dim}"
    if backend == "reference":
        return "tiled torch operations in float32: exact and slow"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _print_machine(console: Console, report: dict[str, Any]) -> None:
    console.print("[bold]Machine[/]")
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, version in report["versions"].items():
        table.add_row(name, version or "not installed")
    cpu = report["cpu"]
    table.add_section()
    table.add_row("cpu", f"{cpu['model']}, {cpu['cores']} cores, {cpu['threads']} torch threads")
    table.add_row("native kernels use", cpu["isa"] or "none (see the cpu backend below)")
    if cpu["available_isas"]:
        table.add_row("available", ", ".join(cpu["available_isas"]))
    table.add_row("torch uses", cpu["torch_isa"])
    if not report["cuda"]:
        table.add_row("cuda", "no device")
    table.add_row("cuda kernels", escape(_cuda_kernels(report["cuda_kernels"])))
    for i, gpu in enumerate(report["cuda"]):
        gib = gpu["memory_bytes"] / 2**30
        table.add_row(f"cuda:{i}", f"{gpu['name']}, sm {gpu['capability']}, {gib:.0f} GiB")
    console.print(table)


def _cuda_kernels(kernels: dict[str, Any]) -> str:
    if kernels["version"] is None:
        return f"none: {kernels['why_not']}"
    ptx = "" if kernels["ptx"] is None else f", and newer ones as PTX {kernels['ptx']}"
    archs = ", ".join(kernels["archs"])
    why = "" if kernels["why_not"] is None else f"; not here: {kernels['why_not']}"
    return f"CUDA {kernels['version']} for compute capability {archs}{ptx}{why}"


def _print_backends(console: Console, backends: dict[str, str | None], question: Question) -> None:
    console.print(
        f"[bold]Backends[/] in the order that auto tries them ({question.dtype} on "
        f"{question.device}, head dim {question.head_dim})",
        highlight=False,
    )
    table = Table()
    table.add_column("backend", style="bold")
    table.add_column("can run")
    table.add_column("why not", overflow="fold")
    for name, why in backends.items():
        # A reason may name an extra in brackets, which are no markup.
        table.add_row(name, "[green]yes[/]" if why is None else "[red]no[/]", escape(why or ""))
    console.print(table)


def _print_explanation(console: Console, facts: dict[str, Any]) -> None:
    console.print("[bold]This problem[/], one layer")
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("runs on", facts["backend"] or "[red]nothing here[/]")
    if facts["kernel"]:
        table.add_row("kernel", facts["kernel"])
    table.add_section()
    table.add_row("dense, causal", f"{facts['dense_flops'] / 1e12:.2f} TFLOP")
    table.add_row(
        f"sparse, {100 * facts['density']:.1f} % of the pairs",
        f"{facts['sparse_flops'] / 1e12:.2f} TFLOP",
    )
    never = facts["score_matrix_bytes_never_made"]
    table.add_row("scores, never made", f"{never / 2**30:,.1f} GiB")
    console.print(table)
    print_memory(console, facts["memory"])
