"""Sections in a process of their own: what fails, hangs or crashes is data, the rest goes on."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

from bench.gpu_record import Section
from bench.gpu_suite import Job, Journal, Skip, Suite, run_job, run_jobs
from bench.gpu_supervisor import Supervisor


def suite(tmp_path: Path) -> Suite:
    return Suite(torch.device("cpu"), Journal(tmp_path / "journal"))


def ended(made: Suite) -> dict:
    return made.journal.read()[-1]


def broken(made: Suite) -> None:
    raise RuntimeError("no such kernel\nand more")


def missing(made: Suite) -> None:
    raise Skip("no such tool")


def wrong(made: Suite) -> int:
    made.case("good", 0.5, 1.0)
    made.case("bad", 2.0, 1.0)
    made.case("nan", float("nan"), 1.0)
    made.check("raises", lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    return 7


@pytest.mark.parametrize(
    ("call", "status", "why"),
    [
        (lambda made: {"x": 1}, "passed", ""),
        (broken, "failed", "RuntimeError: no such kernel"),
        (missing, "skipped", "no such tool"),
        (wrong, "failed", "3 of 4 wrong: bad (2.00e+00, allowed 1.00e+00); nan (1.00e+30, allowed"),
    ],
    ids=["passes", "raises", "skips", "wrong-cases"],
)
def test_how_a_section_ends(call, status, why, tmp_path):
    made = suite(tmp_path)
    assert run_job(Job("x", "", 10, call), made)
    assert ended(made)["status"] == status
    assert ended(made)["why"].startswith(why)


def test_a_lost_device_ends_the_worker_not_the_run(tmp_path):
    def lost(made: Suite) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    made, later = suite(tmp_path), []
    run_jobs([Job("a", "", 9, lost), Job("b", "", 9, later.append)], made, 60)
    assert ended(made)["status"] == "failed" and not later


def test_no_section_begins_when_the_time_is_over(tmp_path):
    later: list = []
    run_jobs([Job("a", "", 9, later.append)], suite(tmp_path), -1)
    assert not later


# A worker that plays the sections it is asked for, by their names.
WORKER = """
import json, os, sys, time
path, keys = sys.argv[1], [x for x in sys.argv[2:] if not x.startswith("--") and x != "60"]
keys = [k for k in keys if not k.isdigit()]
def write(**facts):
    with open(path, "a") as stream: stream.write(json.dumps(facts) + "\\n")
for key in keys:
    write(kind="start", key=key)
    case = dict(section=key, id="c", error=0.0, tolerance=1.0, ok=True)
    write(kind="case", case=case)
    print("running", key, flush=True)
    if key == "hangs": time.sleep(60)
    if key == "crashes": os._exit(9)
    write(kind="end", key=key, status="passed", why="", seconds=0.1, data=None)
    if key == "last of its worker": break
"""


def supervised(tmp_path: Path, names: list[str], worker: str = WORKER, seconds: float = 60):
    script = tmp_path / "worker.py"
    script.write_text(worker)
    journal = Journal(tmp_path / "journal")
    jobs = [Job(name, "", 1.5, lambda made: None) for name in names]
    kept: list[int] = []
    deadline = time.monotonic() + seconds
    command = [sys.executable, "-S", str(script), str(journal.path)]
    made = Supervisor(jobs, command, journal, deadline, lambda x: kept.append(len(x.sections)))
    return made.run(), kept


def by_name(sections: list[Section]) -> dict[str, tuple[str, str]]:
    return {s.name: (s.status, s.why) for s in sections}


def test_what_hangs_or_crashes_costs_itself_alone(tmp_path):
    names = ["first", "hangs", "last of its worker", "crashes", "end"]
    outcome, kept = supervised(tmp_path, names)
    found = by_name(outcome.sections)
    assert list(found) == names
    assert [found[n][0] for n in names] == ["passed", "timed out", "passed", "failed", "passed"]
    assert found["hangs"][1] == "took more than 1.5 s"
    assert found["crashes"][1] == "its process ended with 9"
    # What a section wrote before it was ended is kept, and the record after each.
    assert [c.section for c in outcome.cases] == names
    assert kept == [1, 2, 3, 4, 5]
    assert "running end" in outcome.log


def test_a_worker_that_cannot_begin_is_not_tried_again(tmp_path):
    outcome, _ = supervised(tmp_path, ["a", "b"], worker="raise SystemExit(4)")
    assert {s.why for s in outcome.sections} == {"its process ended with 4 before it began"}
    assert [s.status for s in outcome.sections] == ["failed", "failed"]


def test_what_there_was_no_time_for_is_skipped(tmp_path):
    outcome, _ = supervised(tmp_path, ["a"], seconds=-1)
    assert by_name(outcome.sections) == {"a": ("skipped", "the time of the whole run was over")}
