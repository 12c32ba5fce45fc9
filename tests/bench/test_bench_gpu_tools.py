"""Sanitizer and profiler around a child: what they say is read right."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from bench import gpu_child, gpu_tools
from bench.gpu_suite import Job, Journal, Suite, run_job


@pytest.fixture
def suite(tmp_path) -> Suite:
    made = Suite(torch.device("cpu"), Journal(tmp_path / "journal"), rehearsal=True)
    made.stand_ins = {"triton": "reference"}
    return made


def run(suite: Suite, call) -> dict:
    run_job(Job("tool", "triton", 60, call), suite)
    return suite.journal.read()[-1]


def program(folder: Path, name: str, text: str) -> None:
    """Puts a program of that name first on PATH."""
    path = folder / name
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


SAID = {
    "clean": ("========= ERROR SUMMARY: 0 errors", 0, "passed", ""),
    "errors": (
        "========= Invalid __global__ write of size 2 bytes\n========= ERROR SUMMARY: 3 errors",
        86,
        "failed",
        "1 of 1 wrong: memcheck (3.00e+00",
    ),
    "hazards": (
        "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)",
        86,
        "failed",
        "1 of 1 wrong: memcheck (2.00e+00",
    ),
    "refused": ("========= Error: Device not supported", 1, "failed", "AssertionError: no summary"),
    "child-failed": ("========= ERROR SUMMARY: 0 errors", 7, "failed", "AssertionError: the child"),
}


@pytest.mark.parametrize("case", SAID)
def test_what_the_sanitizer_says(case, suite, tools):
    text, code, status, why = SAID[case]
    program(tools, "compute-sanitizer", f"echo '{text}'\nexit {code}\n")
    found = run(suite, lambda x: gpu_tools.sanitizer(x, "memcheck"))
    assert (found["status"], found["why"][: len(why)]) == (status, why)
    if status == "passed":
        assert found["data"]["summary"] == "ERROR SUMMARY: 0 errors"


def test_the_child_runs_under_the_program(suite, tools):
    """All of its launches, with tensors in allocations of their own."""
    program(
        tools,
        "compute-sanitizer",
        'echo "caching off: $PYTORCH_NO_CUDA_MEMORY_CACHING"\n'
        'while [ "$1" != 86 ]; do shift; done\nshift\n"$@"\n'
        'echo "========= ERROR SUMMARY: 0 errors"\n',
    )
    found = run(suite, lambda x: gpu_tools.sanitizer(x, "racecheck"))
    assert found["status"] == "passed", found
    assert "caching off: 1" in found["data"]["log"]
    assert "gpu_child: small done" in found["data"]["log"]


@pytest.mark.parametrize("work", gpu_child.HOT)
def test_hot_kernels_run(work):
    gpu_child.hot("reference", torch.device("cpu"), work)


class Fake:
    """ncu_report, of one range with one launch."""

    def __init__(self, ranges: int) -> None:
        self.ranges = ranges

    def load_report(self, path: str) -> Fake:
        self.path = path
        return self

    def num_ranges(self) -> int:
        return self.ranges

    def range_by_idx(self, index: int) -> Fake:
        return self

    def num_actions(self) -> int:
        return 1

    def action_by_idx(self, index: int) -> Fake:
        return self

    def name(self) -> str:
        return "attention_kernel"

    def metric_by_name(self, name: str) -> Fake | None:
        return self if name == gpu_tools.METRICS["registers"] else None

    def value(self) -> int:
        return 168

    def rule_results_as_dicts(self) -> list[dict]:
        return [
            {"name": "small", "speedup_estimation": {"speedup": 2}},
            {"name": "none", "speedup_estimation": None},
            {"name": "large", "speedup_estimation": {"speedup": 30.5}},
        ]


def test_a_profile_becomes_numbers(tmp_path):
    (row,) = gpu_tools.parse_report(Fake(1), tmp_path / "x.ncu-rep")
    assert row["kernel"] == "attention_kernel" and row["registers"] == 168
    assert [x["name"] for x in row["rules"]] == ["large", "small"]
    assert "time_us" not in row
    with pytest.raises(ValueError, match="not a report"):
        gpu_tools.parse_report(Fake(0), tmp_path / "x.ncu-rep")


def test_the_profiler_is_run_and_read(suite, tools, monkeypatch):
    monkeypatch.setattr(gpu_tools, "report_module", lambda program: Fake(1))
    program(tools, "ncu", 'while [ "$1" != "-o" ]; do shift; done\ntouch "$2"\n')
    found = run(suite, gpu_tools.ncu)
    assert found["status"] == "passed"
    assert {x: y[0]["registers"] for x, y in found["data"].items()} == dict.fromkeys(
        gpu_child.HOT, 168
    )
    program(tools, "ncu", "echo 'no counters for you'\n")
    assert run(suite, gpu_tools.ncu)["why"] == "ncu made no report: no counters for you"
    monkeypatch.setattr(gpu_tools, "report_module", lambda program: None)
    assert run(suite, gpu_tools.ncu)["why"] == "ncu_report is not importable"
