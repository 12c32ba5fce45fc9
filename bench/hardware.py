"""`python -m bench.hardware`: which kernels have run on hardware, and which changed since then.

Prints the table that docs/hardware.md holds between markers. `make docs` writes it there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.gpu_record import FAILED, PASSED, TIMED_OUT, Record, records
from bench.kernel_groups import GROUPS, Group, hashes


def main() -> int:
    print(hardware_table(records(), hashes()))
    return 0


def hardware_table(runs: Sequence[Record], now: Mapping[str, str]) -> str:
    """One row a group of kernels.

    Args:
        runs: on hardware, oldest first.
        now: group -> hash of its sources.
    """
    lines = ["| kernels | last run on hardware | since then |", "|---|---|---|"]
    for group in GROUPS:
        tried = [run for run in runs if outcome(group, run) is not None]
        if not tried:
            cells = ("never run on hardware", "")
        elif not outcome(group, tried[-1]):
            cells = (_where(tried[-1]), "**failed there**")
        elif tried[-1].kernels.get(group.name) == now[group.name]:
            cells = (_where(tried[-1]), "unchanged")
        else:
            cells = (_where(tried[-1]), "changed: **not verified on hardware since**")
        lines.append(f"| {group.name} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def unverified(runs: Sequence[Record], now: Mapping[str, str]) -> list[str]:
    """Groups whose sources, as they are, have not passed on hardware when they last ran there."""
    found = []
    for group in GROUPS:
        tried = [run for run in runs if outcome(group, run) is not None]
        passed = bool(tried) and bool(outcome(group, tried[-1]))
        if not passed or tried[-1].kernels.get(group.name) != now[group.name]:
            found.append(group.name)
    return found


def outcome(group: Group, run: Record) -> bool | None:
    """Whether the sections that vouch for a group passed in a run; None = not all of them ran."""
    sections = [run.section(key) for key in group.proofs]
    if any(s is not None and s.status in (FAILED, TIMED_OUT) for s in sections):
        return False
    return True if all(s is not None and s.status == PASSED for s in sections) else None


def _where(run: Record) -> str:
    local = ", with local changes" if run.dirty else ""
    return f"{run.device}, {run.utc[:10]}, {run.commit[:8]}{local}"


if __name__ == "__main__":
    raise SystemExit(main())
