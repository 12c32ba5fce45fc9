"""Records of the GPU suite, and the table that says which kernels have run on hardware."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import gpu_record, hardware, kernel_groups
from bench.gpu_pages import gpu_pages
from bench.gpu_record import Case, Goal, Library, Record, Run, Section
from bench.pages import performance_page

NOW = {group.name: "0" * 16 for group in kernel_groups.GROUPS}
SM90 = kernel_groups.GROUPS[0]


def record(**facts) -> Record:
    made = {
        "rehearsal": False,
        "commit": "0123456789ab",
        "dirty": False,
        "utc": "2026-01-02T03:04:05+00:00",
        "device": "Some GPU 9000",
        "cc": [9, 0],
        "driver": "1",
        "cuda_runtime": "13.0",
        "torch": "2",
        "triton": "3",
        "python": "3",
        "argv": "",
        "kernels": dict(NOW),
    }
    return Record(**{**made, **facts})


def passed(*keys: str, status: str = "passed") -> list[Section]:
    return [Section(key.split(" ", 1)[1], key.split(" ")[0], status, "", 1.0, 60.0) for key in keys]


def test_a_record_comes_back_as_it_was_written(tmp_path):
    made = record(sections=passed("cuda rows"), library=Library("abc", "same", ["9.0"]))
    made.cases.append(Case("cuda rows", "one", 0.5, 1.0, True))
    made.bench.append(Run("s", "a", "cuda", ms=1.23456789, tflops=None))
    made.goals.append(Goal("g", "a goal", "cuda", 1.0, False, "not measured"))
    made.count()
    path = gpu_record.write(made, tmp_path)
    assert path.name == "20260102T030405Z-some-gpu-9000-01234567.json"
    found = gpu_record.load(path)
    assert found == replace(made, bench=[replace(made.bench[0], ms=1.23457)])
    assert gpu_record.records(tmp_path) == [found]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"schema": 2}, "schema 1, got 2"), ({"cc": "9.0"}, "cc"), ({"more": 1}, "more")],
    ids=["schema", "type", "unknown-field"],
)
def test_a_file_of_another_form_is_refused(change, message, tmp_path):
    path = gpu_record.write(record(), tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        gpu_record.load(path)


def test_committed_records_are_of_this_schema():
    for run in gpu_record.records():
        assert run.sections and not run.rehearsal


def test_every_kernel_source_belongs_to_a_group():
    assert not kernel_groups.uncovered(), "name these in bench/kernel_groups.py"


def test_every_group_has_files_and_proofs_that_exist():
    from bench.gpu_plan import jobs

    keys = {job.key for job in jobs()}
    for group in kernel_groups.GROUPS:
        assert group.proofs and set(group.proofs) <= keys, group.name
        for glob in group.globs:
            assert list(kernel_groups.ROOT.glob(glob)), f"{group.name}: {glob}"


def test_a_hash_is_that_of_names_and_contents(tmp_path):
    tree = tmp_path / "csrc" / "cuda" / "sm90"
    tree.mkdir(parents=True)
    (tree / "a.cuh").write_text("1")
    (tree / "notes.txt").write_text("1")
    first = SM90.sha256(tmp_path)
    assert kernel_groups.uncovered(tmp_path) == []
    (tree / "notes.txt").write_text("2")
    assert SM90.sha256(tmp_path) == first
    (tree / "a.cuh").write_text("2")
    assert SM90.sha256(tmp_path) != first
    (tree / "a.cuh").rename(tree / "b.cuh")
    (tree / "b.cuh").write_text("1")
    assert SM90.sha256(tmp_path) != first
    header = tmp_path / "csrc" / "common" / "far.h"
    header.parent.mkdir()
    header.write_text("1")
    (tree / "b.cuh").write_text('#include "../../common/far.h"')
    second = SM90.sha256(tmp_path)
    header.write_text("2")
    assert SM90.sha256(tmp_path) != second, "what is included counts"
    (tmp_path / "csrc" / "cuda" / "new").mkdir()
    (tmp_path / "csrc" / "cuda" / "new" / "c.cu").write_text("")
    assert kernel_groups.uncovered(tmp_path) == ["csrc/cuda/new/c.cu"]


def row_of(runs: list[Record], now: dict[str, str] = NOW) -> str:
    table = hardware.hardware_table(runs, now)
    return next(line for line in table.splitlines() if SM90.name in line)


WHERE = "Some GPU 9000, 2026-01-02, 01234567"


def test_the_table_says_what_ran_and_what_changed():
    proved = record(sections=passed(*SM90.proofs))
    assert "never run on hardware" in row_of([])
    assert row_of([proved]) == f"| {SM90.name} | {WHERE} | unchanged |"
    changed = NOW | {SM90.name: "1" * 16}
    assert "**not verified on hardware since**" in row_of([proved], changed)
    assert SM90.name in hardware.unverified([proved], changed)
    assert SM90.name not in hardware.unverified([proved], NOW)


def test_half_a_proof_is_none_and_a_failure_stays_in_sight():
    proved, half = (record(sections=passed(*SM90.proofs[:n])) for n in (3, 1))
    assert "never run on hardware" in row_of([half])
    skipped = record(sections=passed(*SM90.proofs, status="skipped"))
    assert row_of([proved, skipped]) == row_of([proved])
    failed = record(sections=passed(*SM90.proofs, status="timed out"))
    assert row_of([proved, failed]) == f"| {SM90.name} | {WHERE} | **failed there** |"
    assert SM90.name in hardware.unverified([proved, failed], NOW)
    assert row_of([failed, proved]) == row_of([proved])


def test_a_rehearsal_is_no_run(tmp_path):
    gpu_record.write(record(rehearsal=True, sections=passed(*SM90.proofs)), tmp_path)
    assert gpu_record.records(tmp_path) == []


def test_the_page_shows_runs_goals_and_sections(tmp_path: Path):
    assert "Not yet run on hardware" in performance_page(tmp_path)
    made = record(sections=passed("cuda rows", status="failed"))
    made.bench.append(Run("s", "a", "cuda", ms=5.0, p10=4.0, p90=6.0, reps=30, tflops=317.0))
    made.bench.append(Run("s", "a", "flash-attn-3", why_not="not importable: no such module"))
    made.goals.append(Goal("g", "a rate", "cuda", 0.9, False, "not met", 0.5))
    gpu_record.write(made, tmp_path / "gpu")
    page = performance_page(tmp_path)
    assert "| a |  |  | cuda | bf16 | total | 5 (4 to 6) | 30 |  | 317.0 |" in page
    assert "not importable: no such module" in page
    assert "| cuda | a rate | at least 0.9 | 0.5 | **not met** |" in page
    assert "| cuda rows | failed |" in page
    assert gpu_pages([]) == [
        "## GPU\n\nNot yet run on hardware: run `make gpu` where there is a GPU.\n"
    ]
