"""The numbers of a PARO demo: gathered once, shown as a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from permattn.cli.demo_paro.headmaps import HeadMap
from permattn.cli.demo_paro.quality import Quality
from permattn.cli.demo_paro.runs import Run, Variant
from permattn.core.axis_order import ORDER_NAMES
from permattn.patterns.paro import ParoPlan

# Where dense attention takes longer than that in 16 bits than in 32, the baseline is a slow one.
_SLOW_SDPA = 1.1
NO_FAST_SDPA = (
    "torch's dense attention has no fast {dtype} path here: it takes {ratio:.1f} times as long as "
    "in fp32 on the same values. Against fp32 the speed-ups of attention are that much smaller."
)


@dataclass(frozen=True, eq=False)
class PlanFacts:
    """A plan and its file.

    Args:
        density: asked for.
        ordered: False = all heads in FHW.
        plan: the plan.
        file: its name in the output folder.
        file_bytes: its size.
    """

    density: float
    ordered: bool
    plan: ParoPlan
    file: str
    file_bytes: int

    def to_json(self) -> dict[str, Any]:
        orders = torch.bincount(self.plan.axis_orders.flatten().long(), minlength=len(ORDER_NAMES))
        return {
            "density": self.density,
            "ordered": self.ordered,
            "measured_density": float(self.plan.density().mean()),
            "recall": mean_recall(self.plan),
            "bins": self.plan.num_bins,
            "file": self.file,
            "file_bytes": self.file_bytes,
            "orders": dict(zip(ORDER_NAMES, orders.tolist(), strict=True)),
        }


def mean_recall(plan: ParoPlan) -> float | None:
    """Share of the attention mass that the plan keeps on its calibration, mean over heads."""
    return None if plan.recall is None else float(plan.recall.float().mean())


@dataclass(frozen=True, eq=False)
class Report:
    """Everything that a demo found.

    Args:
        facts: about model, machine and settings.
        dense: the dense runs, first to last.
        runs: the sparse runs.
        quality: of every sparse run, against the first dense one.
        plans: by (density, ordered).
        heads: what the picture shows.
        calibration_seconds: measuring, and thresholds of all plans.
        sdpa_ratio: dense attention in the model's dtype over fp32, by time.
    """

    facts: dict[str, Any]
    dense: list[Run]
    runs: list[Run]
    quality: list[Quality]
    plans: dict[tuple[float, bool], PlanFacts]
    heads: list[HeadMap]
    calibration_seconds: float
    sdpa_ratio: float

    @property
    def dense_run(self) -> Run:
        """All dense runs as one: medians are over the steps of all."""
        first = self.dense[0]
        times = [[ms for run in self.dense for ms in x(run)] for x in (_attention_of, _steps_of)]
        return Run(first.variant, first.latents, times[0], times[1], first.trail)

    def speedups(self, run: Run) -> tuple[float, float]:
        """(attention, step) of a sparse run."""
        dense = self.dense_run
        return dense.attention / max(run.attention, 1e-9), dense.step / max(run.step, 1e-9)

    def plan_of(self, variant: Variant) -> PlanFacts:
        """The plan of a sparse run."""
        assert variant.density is not None
        return self.plans[variant.density, variant.ordered]

    def find(self, variant: Variant) -> tuple[Run, Quality] | None:
        """A sparse run and its quality."""
        for run, quality in zip(self.runs, self.quality, strict=True):
            if run.variant == variant:
                return run, quality
        return None

    def to_json(self) -> dict[str, Any]:
        dense = self.dense_run
        rows = []
        for run, quality in zip(self.runs, self.quality, strict=True):
            attention, step = self.speedups(run)
            variant = run.variant
            plan = self.plan_of(variant)
            rows.append(
                {
                    "name": variant.name,
                    **asdict(variant),
                    "measured_density": float(plan.plan.density().mean()),
                    **asdict(quality),
                    "attention_ms": run.attention,
                    "step_ms": run.step,
                    "attention_ms_per_step": run.attention_ms,
                    "step_ms_per_step": run.step_ms,
                    "attention_speedup": attention,
                    "step_speedup": step,
                    "plan_bytes": plan.file_bytes,
                    "calls": run.stats,
                }
            )
        return {
            **self.facts,
            "calibration_seconds": self.calibration_seconds,
            "sdpa_time_over_fp32": self.sdpa_ratio,
            "dense": {
                "runs": len(self.dense),
                "attention_ms": dense.attention,
                "step_ms": dense.step,
                "attention_ms_per_step": dense.attention_ms,
                "step_ms_per_step": dense.step_ms,
            },
            "runs": rows,
            "plans": [plan.to_json() for plan in self.plans.values()],
            "heads": [
                {
                    "layer": head.layer,
                    "head": head.head,
                    "kind": head.name,
                    "order": head.order,
                    "density": head.density,
                    "kept": head.kept,
                    "kept_in_fhw": head.kept_before,
                }
                for head in self.heads
            ],
        }

    def remarks(self) -> list[str]:
        """What a reader must know about the numbers."""
        found = list(self.facts["remarks"])
        if self.sdpa_ratio >= _SLOW_SDPA:
            found.append(NO_FAST_SDPA.format(ratio=self.sdpa_ratio, dtype=self.facts["dtype"]))
        return found


def print_report(console: Console, report: Report) -> None:
    """The table, and in words what it means."""
    facts = report.facts
    console.print()
    console.print(f"[bold]{facts['model']}[/]", highlight=False)
    console.print(
        f"{facts['tokens']:,} tokens ({'x'.join(map(str, facts['grid']))}), {facts['steps']} steps "
        f"of {facts['scheduler']}; {facts['dtype']} on {facts['device']}, {facts['threads']} "
        f"threads; calibrated in {report.calibration_seconds:.0f} s on another video",
        highlight=False,
    )
    console.print(f"[yellow]{facts['note']}[/]", highlight=False)
    console.print()
    console.print(_quality_table(report))
    console.print(_time_table(report))
    console.print(
        "[dim]Same seed for all. PSNR and SSIM of the final frames, cosine of the final latents, "
        "against the first dense run. Times are medians over steps; attention counts norm and "
        f"rotary embedding of q and k, planning and permuting. Dense runs: {len(report.dense)}, "
        "first and between the others.[/]",
        highlight=False,
    )
    for remark in report.remarks():
        console.print(f"[yellow]{remark}[/]", highlight=False)


def _quality_table(report: Report) -> Table:
    table = Table()
    table.add_column("against the dense video")
    for name in ("density", "mass kept", "PSNR", "SSIM", "cosine", "plan"):
        table.add_column(name, justify="right")
    for run, quality in zip(report.runs, report.quality, strict=True):
        plan = report.plan_of(run.variant)
        recall = mean_recall(plan.plan)
        table.add_row(
            run.variant.name,
            f"{float(plan.plan.density().mean()):.1%}",
            "" if recall is None else f"{recall:.1%}",
            decibels(quality.psnr),
            f"{quality.ssim:.4f}",
            f"{quality.cosine:.5f}",
            f"{plan.file_bytes / 1024:,.0f} KiB",
            end_section=_ends_group(report, run),
        )
    return table


def _time_table(report: Report) -> Table:
    table = Table()
    table.add_column("one step")
    table.add_column("attention", justify="right")
    table.add_column("speed-up", justify="right", style="bold green")
    table.add_column("all of it", justify="right")
    table.add_column("speed-up", justify="right", style="green")
    dense = report.dense_run
    times = (milliseconds(dense.attention), "", milliseconds(dense.step), "")
    table.add_row("dense (SDPA)", *times, end_section=True)
    for run in report.runs:
        attention, step = report.speedups(run)
        table.add_row(
            run.variant.name,
            milliseconds(run.attention),
            f"{attention:.2f}x",
            milliseconds(run.step),
            f"{step:.2f}x",
            end_section=_ends_group(report, run),
        )
    return table


def _ends_group(report: Report, run: Run) -> bool:
    """Whether the next run has another plan."""
    following = report.runs[report.runs.index(run) + 1 :]
    return bool(following) and report.plan_of(following[0].variant) != report.plan_of(run.variant)


def decibels(psnr: float | None) -> str:
    """PSNR for people; None is an exact match."""
    return "exact" if psnr is None else f"{psnr:.1f} dB"


def milliseconds(value: float) -> str:
    """A time for people."""
    return f"{value:,.0f} ms"


def _attention_of(run: Run) -> list[float]:
    return run.attention_ms


def _steps_of(run: Run) -> list[float]:
    return run.step_ms
