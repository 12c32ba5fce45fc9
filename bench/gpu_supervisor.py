"""Runs sections in a process beside this one, ends what takes too long, goes on after a crash."""

from __future__ import annotations

import collections
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.gpu_record import FAILED, NO_TIME, SKIPPED, TIMED_OUT, Case, Run, Section
from bench.gpu_suite import Job, Journal

_LOG_LINES = 60
_POLL_S = 0.1


@dataclass
class Outcome:
    """Everything that the journal tells."""

    sections: list[Section] = field(default_factory=list)
    cases: list[Case] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    log: collections.deque[str] = field(
        default_factory=lambda: collections.deque(maxlen=_LOG_LINES)
    )


@dataclass
class Supervisor:
    """Sections in order, each within its budget.

    Args:
        command: starts a worker; the keys of its sections are appended.
        deadline: of `time.monotonic`: no section begins after it.
        after_each: called whenever a section has ended.
    """

    jobs: Sequence[Job]
    command: Sequence[str]
    journal: Journal
    deadline: float
    after_each: Callable[[Outcome], None]
    outcome: Outcome = field(default_factory=Outcome)
    _read: int = 0
    _begun: tuple[str, float] | None = None

    def run(self) -> Outcome:
        while pending := self._pending():
            if time.monotonic() > self.deadline:
                for job in pending:
                    self._end(job, SKIPPED, NO_TIME)
                break
            self._one_worker(pending)
        return self.outcome

    def _pending(self) -> list[Job]:
        done = {s.key for s in self.outcome.sections}
        return [job for job in self.jobs if job.key not in done]

    def _one_worker(self, pending: Sequence[Job]) -> None:
        """Until it has run all, or had to be ended."""
        self._begun = None
        left = max(0.0, self.deadline - time.monotonic())
        keys = [word for job in pending for word in ("--job", job.key)]
        worker = subprocess.Popen(
            [*self.command, "--seconds", f"{left:.0f}", *keys],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        reader = threading.Thread(target=self._tee, args=(worker,), daemon=True)
        reader.start()
        stopped = ""
        try:
            while worker.poll() is None and not stopped:
                time.sleep(_POLL_S)
                self._follow()
                stopped = self._why_stop(pending)
        finally:
            if worker.poll() is None:
                # Its children too: a profiler or a sanitizer would keep the device.
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
        reader.join(timeout=5)
        self._follow()
        self._account(pending, worker.returncode, stopped)

    def _why_stop(self, pending: Sequence[Job]) -> str:
        now = time.monotonic()
        if self._begun is None:
            return NO_TIME if now > self.deadline + 60 else ""
        budget = next(job.budget_s for job in pending if job.key == self._begun[0])
        if now > self._begun[1] + budget:
            return f"took more than {budget:g} s"
        return ""

    def _account(self, pending: Sequence[Job], code: int, stopped: str) -> None:
        """Whoever was at work when a worker ended before its time did not pass."""
        if self._begun is not None:
            job = next(job for job in pending if job.key == self._begun[0])
            if stopped:
                self._end(job, TIMED_OUT, stopped, job.budget_s)
            else:
                seconds = time.monotonic() - self._begun[1]
                self._end(job, FAILED, f"its process ended with {code}", seconds)
            self._begun = None
            return
        if code and len(self._pending()) == len(pending):
            # It did not get as far as its first section: another try would not either.
            for job in pending:
                self._end(job, FAILED, stopped or f"its process ended with {code} before it began")

    def _end(self, job: Job, status: str, why: str, seconds: float = 0.0) -> None:
        print(f"{job.key}: {status} ({why})", flush=True)
        facts = (job.name, job.backend, status, why, round(seconds, 2), job.budget_s)
        self.outcome.sections.append(Section(*facts))
        self.after_each(self.outcome)

    def _follow(self) -> None:
        """Takes over what the worker has written since."""
        for line in self.journal.read(self._read):
            self._read += 1
            if line["kind"] == "start":
                self._begun = (line["key"], time.monotonic())
            elif line["kind"] == "case":
                self.outcome.cases.append(Case(**line["case"]))
            elif line["kind"] == "run":
                self.outcome.runs.append(Run(**line["run"]))
            elif line["kind"] == "end":
                self._begun = None
                job = next(job for job in self.jobs if job.key == line["key"])
                facts = (line["status"], line["why"], line["seconds"], job.budget_s, line["data"])
                self.outcome.sections.append(Section(job.name, job.backend, *facts))
                self.after_each(self.outcome)

    def _tee(self, worker: subprocess.Popen[str]) -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            self.outcome.log.append(line.rstrip("\n"))
