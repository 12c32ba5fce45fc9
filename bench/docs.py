"""`python -m bench.docs`: documents made from bench/results; `--check` says whether they agree.

docs/performance.md is written whole. In README.md and docs/, only what stands between markers is:
`<!-- bench: cpu.jsonl/CASE/goals/NAME/value .1f -->7.3<!-- /bench -->` for a number of a results
file, and `<!-- bench: table -->` ... `<!-- /bench -->` for the table of speed-ups; `kernels on
hardware` for that of bench.hardware.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu_record import records
from bench.hardware import hardware_table
from bench.kernel_groups import hashes
from bench.machine import ROOT, threads_text
from bench.pages import performance_page, speed_table
from bench.results import load

RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
_MARK = re.compile(r"(<!-- bench: (?P<what>[^>]+?) -->)(?P<text>.*?)(<!-- /bench -->)", re.DOTALL)
_MISSING = "not measured"


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the documents; with --check writes nothing and returns 1 when they differ."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args not in ([], ["--check"]):
        print("usage: python -m bench.docs [--check]", file=sys.stderr)
        return 2
    stale = []
    for path, text in documents().items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(path.relative_to(ROOT).as_posix())
        if not args:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    rows = load(RESULTS / "cpu.jsonl")
    if not args and any(row.group == "speed" for row in rows):
        from bench.plot import plot

        plot(rows, RESULTS / "cpu.png")
    for name in stale:
        print(f"{name}: {'differs from bench/results' if args else 'written'}")
    return 1 if args and stale else 0


def documents() -> dict[Path, str]:
    """Every generated document and what it must say."""
    made = {PAGE: performance_page(RESULTS)}
    for path in prose():
        made[path] = fill(path.read_text(encoding="utf-8"), RESULTS)
    return made


def prose() -> list[Path]:
    """The documents that people write: README and docs/, without the generated page."""
    found = [README, *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in found if path.exists() and path != PAGE]


def fill(text: str, results: Path) -> str:
    """Replaces what stands between markers by what the results say."""
    tables = {"table": headline, "kernels on hardware": on_hardware}

    def one(match: re.Match[str]) -> str:
        what = match["what"].strip()
        value = f"\n{tables[what](results)}\n" if what in tables else look_up(what, results)
        return f"{match[1]}{value}{match[4]}"

    return _MARK.sub(one, text)


def headline(results: Path) -> str:
    """The table of speed-ups on all cores; on one thread while there is no other."""
    for name in ("cpu.jsonl", "cpu-1-thread.jsonl"):
        rows = [row for row in load(results / name) if row.group == "speed"]
        if rows:
            facts = rows[0].machine
            where = f"{facts['cpu'].split(' (')[0]}, {threads_text(facts['threads'])}"
            return f"{where}, {facts['isa']}:\n\n{speed_table(rows)}"
    return speed_table([])


def on_hardware(results: Path) -> str:
    """Which kernels have run on hardware, and which have changed since."""
    return hardware_table(records(results / "gpu"), hashes())


def look_up(what: str, results: Path) -> str:
    """The number behind "FILE/KEY/KEY FORMAT"; a JSONL file's first key is a case.

    Raises:
        ValueError: not of that form, or a file that is there has no such key.
    """
    place, _, style = what.rpartition(" ")
    name, *keys = place.split("/")
    if not keys:
        raise ValueError(f"bench marker: wants 'FILE/KEY/... FORMAT', got {what!r}")
    path = results / name
    if not path.exists():
        return _MISSING
    value: Any
    if path.suffix == ".jsonl":
        value = {row.case: vars(row) for row in load(path)}
    else:
        value = json.loads(path.read_text(encoding="utf-8"))
    for key in keys:
        value = value[int(key)] if isinstance(value, list) else value.get(key)
        if value is None:
            raise ValueError(f"bench marker: {name} has no {'/'.join(keys)!r}")
    return format(value, style)


def text_outside_markers(text: str) -> str:
    """A document without generated places and code: no measured number may stand there."""
    return re.sub(r"^```.*?^```$", "", _MARK.sub("", text), flags=re.DOTALL | re.MULTILINE)


if __name__ == "__main__":
    raise SystemExit(main())
