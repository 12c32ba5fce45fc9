"""Sections that run a child under another program: compute-sanitizer, and the profiler ncu."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import gpu_child
from bench.gpu_machine import tool
from bench.gpu_suite import Skip, Suite

SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
_CHILD = Path(__file__).resolve().parent / "gpu_child.py"
_ERRORS = re.compile(r"ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards?")
# What is read of a profile: name in the record -> the profiler's.
METRICS = {
    "time_us": "gpu__time_duration.sum",
    "clock_hz": "smsp__cycles_elapsed.avg.per_second",
    "sm_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram_percent": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_percent": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "tensor_percent": "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "tensor_cycles_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "xu_percent": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "shared_bytes": "launch__shared_mem_per_block_dynamic",
    "grid": "launch__grid_size",
    "block": "launch__block_size",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "local_loads": "smsp__inst_executed_op_local_ld.sum",
    "bank_conflicts": "l1tex__data_bank_conflicts_pipe_lsu.sum",
}


def sanitizer(suite: Suite, check: str) -> dict[str, str]:
    """Small launches under one check of compute-sanitizer; its summary.

    Raises:
        Skip: the program is not here.
        AssertionError: no summary, or the child failed by itself.
    """
    program = tool("compute-sanitizer")
    # Tensors of their own allocations, so that what lies behind one is out of bounds.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    if program is None:
        if suite.rehearsal and check == SANITIZERS[0]:
            _run([], child(suite, "small"), environment, suite.left())
        raise Skip("compute-sanitizer not found")
    command = [program, "--tool", check, "--print-limit", "20", "--error-exitcode", "86"]
    code, text = _run(command, child(suite, "small"), environment, suite.left())
    summary = summary_of(text)
    if summary is None:
        raise AssertionError(f"no summary (exit {code}): {text.strip()[-300:]}")
    suite.case(check, float(errors_of(summary)), 0.0)
    if code not in (0, 86):
        raise AssertionError(f"the child ended with {code}: {text.strip()[-300:]}")
    return {"summary": summary, "log": "\n".join(text.splitlines()[-40:])}


def summary_of(text: str) -> str | None:
    """The last line that counts errors or hazards."""
    found = [line for line in text.splitlines() if _ERRORS.search(line)]
    return found[-1].strip("= ") if found else None


def errors_of(summary: str) -> int:
    match = _ERRORS.search(summary)
    assert match is not None
    return int(match[1] or match[2])


def child(suite: Suite, work: str) -> list[str]:
    """The command of launches to look at."""
    from permattn.core import native

    command = [sys.executable, str(_CHILD), work, "--backend", suite.asked]
    return [*command, "--device", suite.device.type, "--folder", str(native.PACKAGE)]


def _run(
    around: Sequence[str], command: Sequence[str], environment: dict[str, str], seconds: float
) -> tuple[int, str]:
    done = subprocess.run(
        [*around, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=max(1.0, seconds - 2),
        env={**os.environ, **environment},
    )
    print(done.stdout[-4000:], flush=True)
    if not around and done.returncode:
        raise AssertionError(f"the child ended with {done.returncode}")
    return done.returncode, done.stdout


def ncu(suite: Suite) -> dict[str, Any]:
    """Profiles of the hot kernels, as numbers.

    Raises:
        Skip: ncu or ncu_report is not here, or the machine does not let counters be read.
    """
    program = tool("ncu")
    if program is None:
        if suite.rehearsal:
            for work in gpu_child.HOT:
                _run([], child(suite, work), {}, suite.left())
        raise Skip("ncu not found")
    module = report_module(program)
    if module is None:
        raise Skip("ncu_report is not importable")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for work in gpu_child.HOT:
            target = Path(scratch) / f"{work}.ncu-rep"
            # Clocks stay as they are: the card is not ours alone.
            command = [program, "--clock-control", "none", "--set", "full", "-f", "-o", str(target)]
            command += [
                "-k",
                "regex:attention_kernel|fwd_kernel",
                "--launch-skip",
                "1",
                "--launch-count",
                "1",
            ]
            _, text = _run(command, child(suite, work), {}, suite.left())
            if not target.exists():
                raise Skip(f"ncu made no report: {text.strip()[-300:]}")
            found[work] = parse_report(module, target)
    return found


def report_module(program: str) -> Any:
    """ncu_report: installed, or beside the profiler; None = neither."""
    try:
        return importlib.import_module("ncu_report")
    except ImportError:
        pass
    home = Path(program).resolve().parent
    places = [*home.glob("extras/python"), *home.parent.glob("extras/python")]
    places += sorted(Path("/opt/nvidia/nsight-compute").glob("*/extras/python"), reverse=True)
    for place in places:
        sys.path.append(str(place))
        try:
            return importlib.import_module("ncu_report")
        except ImportError:
            sys.path.remove(str(place))
    return None


def parse_report(module: Any, path: Path) -> list[dict[str, Any]]:
    """Every profiled launch of a report: its kernel, METRICS that it has, what the rules say.

    Raises:
        ValueError: not a report; the library itself takes anything and finds nothing.
    """
    report = module.load_report(str(path))
    if report.num_ranges() == 0:
        raise ValueError(f"{path.name}: not a report")
    rows = []
    for r in range(report.num_ranges()):
        profiled = report.range_by_idx(r)
        for i in range(profiled.num_actions()):
            action = profiled.action_by_idx(i)
            row: dict[str, Any] = {"kernel": action.name()}
            for name, metric in METRICS.items():
                value = action.metric_by_name(metric)
                if value is not None:
                    row[name] = value.value()
            row["rules"] = _rules(action)
            rows.append(row)
    return rows


def _rules(action: Any) -> list[dict[str, Any]]:
    """Rules that expect a gain: name and percent, the largest first."""
    gains: dict[str, float] = {}
    for rule in action.rule_results_as_dicts():
        gain = (rule.get("speedup_estimation") or {}).get("speedup")
        if gain:
            gains[str(rule.get("name"))] = float(gain)
    largest = sorted(gains, key=lambda name: -gains[name])[:5]
    return [{"name": name, "percent": gains[name]} for name in largest]
