"""Peak memory of one case, in a process of its own: `python -m bench.memory CASE BACKEND THREADS`.

Prints one JSON object. The peak is that of the whole process, torch and inputs included; it is read
before the gate, whose float64 copies are not part of the call.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.machine import ROOT
from bench.registry import CASES, Case

_STATUS = Path("/proc/self/status")


def measure_memory(case: Case, backend: str, threads: int) -> dict[str, Any]:
    """Backend, ms, peak_gb, before_gb (inputs made, plan not) and the gate's numbers of a case."""
    command = [sys.executable, "-m", "bench.memory", case.name, backend, str(threads)]
    command.append(str(case.shape.num_tokens))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{case.name}: the measuring process failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_gb() -> float:
    """Highest resident memory of this process so far, in GB (10^9 bytes)."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    # Kibibytes, except on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main(argv: list[str]) -> int:
    from dataclasses import replace

    import torch

    from bench.contenders import Bench
    from bench.gate import judge, sample_rows

    name, backend, threads, num_tokens = argv
    torch.set_num_threads(int(threads))
    case = next(c for c in CASES if c.name == name)
    case = replace(case, shape=replace(case.shape, num_tokens=int(num_tokens)))
    bench = Bench(case, backend, int(threads))
    before = peak_gb()
    contender = bench.contender(case.runs[0])
    out = contender.call()
    start = time.perf_counter()
    contender.call()
    milliseconds = 1e3 * (time.perf_counter() - start)
    peak = peak_gb()
    assert isinstance(out, torch.Tensor) and contender.plan is not None
    rows = sample_rows(case.shape.num_tokens, 12)
    verdict = judge(out, bench.q, bench.k, bench.v, contender.plan, rows)
    facts = {
        "backend": bench.backend_name,
        "ms": milliseconds,
        "peak_gb": peak,
        "before_gb": before,
        "flops": contender.flops,
        "density": contender.plan.density(causal=False),
        "error": verdict.error,
        "torchs": verdict.torchs,
        "bound": verdict.bound,
        "ok": verdict.ok,
    }
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
