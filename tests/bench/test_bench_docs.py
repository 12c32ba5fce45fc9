"""Prose and results agree: what the documents say is what bench/results says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench import docs
from bench.pages import performance_page, speed_table
from bench.plot import plot
from bench.registry import CASES, DENSITIES, percent
from bench.results import Row, load, merge

# A measured number: a speed-up, a time (but not a period, "every 4 ms") or a rate.
MEASURED = re.compile(r"\d[x×](?!\w)|(?<!every )\b[\d.]+\s?(?:ms|GFLOP/s|TFLOP/s)\b")


def made_up(case_name: str = "bf16-d64") -> Row:
    """A row of a case with invented times: run number n takes 100 / n milliseconds."""
    case = next(c for c in CASES if c.name == case_name)
    row = Row(
        case=case.name,
        group=case.group,
        title=case.title,
        shape=str(case.shape),
        backend="cpu",
        machine={
            "cpu": "Some CPU (family 1, model 2)",
            "cores": 2,
            "threads": 2,
            "isa": "avx512",
            "system": "Linux",
            "torch": "2",
        },
        commit="abc",
        dirty=False,
        utc="2026-01-02T03:04:05+00:00",
    )
    for n, run in enumerate(case.runs, start=1):
        ms = 100 / n
        row.runs[run.name] = {
            "ms": ms,
            "p10": ms,
            "p90": ms,
            "kept": 5,
            "tried": 7,
            "quiet": True,
            "gflop": 1.0,
            "gflops": 1e3 / ms,
            "pairs": 100.0,
            "density": 0.5,
        }
    for goal in case.goals:
        row.add_goal(goal)
    return row


def test_documents_agree_with_results():
    for path, text in docs.documents().items():
        assert path.read_text(encoding="utf-8") == text, f"run `make docs`: {path.name} is stale"


@pytest.mark.parametrize("path", docs.prose(), ids=lambda p: p.name)
def test_prose_names_no_number_of_its_own(path: Path):
    text = docs.text_outside_markers(path.read_text(encoding="utf-8"))
    found = [line for line in text.splitlines() if MEASURED.search(line)]
    assert not found, "measured numbers stand between bench markers: " + "; ".join(found)


def test_merge_replaces_one_case_and_keeps_the_rest(tmp_path):
    path = tmp_path / "cpu.jsonl"
    first, second = made_up(), made_up("gqa")
    merge(path, first)
    merge(path, second)
    newer = made_up()
    newer.commit = "def"
    merge(path, newer)
    assert {row.case: row.commit for row in load(path)} == {"gqa": "abc", "bf16-d64": "def"}


def test_goals_are_ratios_of_times():
    row = made_up()
    goal = row.goals["25 % vs SDPA"]
    runs = [run.name for run in next(c for c in CASES if c.name == row.case).runs]
    assert goal["value"] == pytest.approx(runs.index("25%") + 1)
    assert goal["met"] is False
    assert goal["own"] == pytest.approx((runs.index("25%") + 1) / (runs.index("100%") + 1))


def test_page_shows_every_goal_and_every_miss(tmp_path):
    merge(tmp_path / "cpu.jsonl", made_up())
    merge(tmp_path / "cpu.jsonl", made_up("structure-d64"))
    page = performance_page(tmp_path)
    assert "bf16, D = 64" in page
    assert "two permuted parts with a band, per pair" in page
    assert "- bf16-d64, 10 % vs SDPA: 6, wanted 15" in page
    assert "5 / 7" in page


def test_page_says_when_nothing_was_measured(tmp_path):
    assert "Nothing has been measured yet" in performance_page(tmp_path)


def test_table_marks_a_missed_target():
    assert "(7x, missed)" in speed_table([made_up()])


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("<!-- bench: cpu.jsonl/bf16-d64/goals/50 % vs SDPA/value .1f -->?<!-- /bench -->", "4.0"),
        ("<!-- bench: absent.json/a/b .1f --><!-- /bench -->", "not measured"),
    ],
    ids=["number", "no-such-file"],
)
def test_markers_are_filled(text: str, want: str, tmp_path: Path):
    merge(tmp_path / "cpu.jsonl", made_up())
    filled = docs.fill(text, tmp_path)
    assert f"-->{want}<!--" in filled
    assert docs.fill(filled, tmp_path) == filled


def test_marker_of_an_unknown_key_is_an_error(tmp_path):
    merge(tmp_path / "cpu.jsonl", made_up())
    with pytest.raises(ValueError, match="has no"):
        docs.fill("<!-- bench: cpu.jsonl/bf16-d64/goals/no .1f --><!-- /bench -->", tmp_path)


@pytest.mark.parametrize("line", ["it is 7.3x faster", "takes 12 ms", "5× as fast", "90 GFLOP/s"])
def test_checker_sees_a_number_outside_markers(line: str):
    assert MEASURED.search(docs.text_outside_markers(line))


def test_checker_lets_markers_and_code_pass():
    text = "<!-- bench: a/b .1f -->7.3x<!-- /bench -->\n```\n7.3x\n```\n16 x 16 tokens, 2x2x2\n"
    assert not MEASURED.search(docs.text_outside_markers(text))


def test_plot_writes_a_picture(tmp_path):
    path = tmp_path / "speed.png"
    plot([made_up()], path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert all(percent(d) in made_up().runs for d in DENSITIES)
