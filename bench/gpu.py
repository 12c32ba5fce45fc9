"""`make gpu`: the CUDA suite, run from the tree as it lies, without an install or a network.

Needs torch with CUDA and triton. Every section runs on its own and records its failure, so that
one broken kernel does not hide what the others do. Writes bench/results/gpu-<device>.json. Returns
0 when every section passed, 1 when one failed, 3 when there is no GPU to run on.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
NO_GPU = 3


def use_tree() -> None:
    """Makes `permattn`, `permattn.triton_kernels` and `bench` importable from this tree alone.

    An install maps the top-level folder triton_kernels to permattn.triton_kernels; adding the root
    to the package's search path does the same.
    """
    for folder in (ROOT, ROOT / "python"):
        sys.path.insert(0, str(folder))
    import permattn

    if not (Path(permattn.__file__).parent / "triton_kernels").is_dir():
        permattn.__path__.append(str(ROOT))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--tokens", type=int, default=16384, help="length of the timed calls")
    parser.add_argument(
        "--lengths",
        default="32k,128k,512k,1m",
        help="of the whole prefills, any of 32k,128k,512k,1m; '' for none (default: all)",
    )
    parser.add_argument("--no-flex", action="store_true", help="leave out compiled FlexAttention")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    try:
        import torch
    except ImportError:
        print("make gpu: this Python has no torch; set PYTHON=... to one that has", file=sys.stderr)
        return NO_GPU
    if not torch.cuda.is_available():
        print("make gpu: no CUDA device is visible to torch; nothing was run", file=sys.stderr)
        return NO_GPU
    use_tree()
    from bench import gpu_bilevel, gpu_paro, gpu_prefill
    from bench import gpu_sections as sections
    from bench.machine import commit, utc_now

    lengths = [x for x in args.lengths.lower().split(",") if x]
    if unknown := sorted(set(lengths) - set(gpu_prefill.LENGTHS)):
        parser.error(f"--lengths: wants any of {list(gpu_prefill.LENGTHS)}, got {unknown}")
    head, dirty = commit()
    machine = describe_gpu()
    report: dict[str, Any] = {"machine": machine, "commit": head, "dirty": dirty, "utc": utc_now()}
    report["sections"] = {}
    named: dict[str, Callable[[], Any]] = {
        "correctness": lambda: sections.correctness(args.backend),
        "gradients": lambda: sections.gradients(args.backend),
        "determinism": lambda: sections.determinism(args.backend),
        "cuda graph": lambda: sections.cuda_graph(args.backend),
        "no host sync": lambda: sections.no_host_sync(args.backend),
        "planning": lambda: sections.planning(args.tokens),
        "timing": lambda: sections.timing(args.backend, args.tokens, not args.no_flex),
        "paro correctness": lambda: gpu_paro.correctness(args.backend),
        **{f"paro {x}": partial(gpu_paro.timing, args.backend, x) for x in gpu_paro.LAYERS},
        "bilevel correctness": lambda: gpu_bilevel.correctness(args.backend),
        "bilevel": lambda: gpu_bilevel.timing(args.backend),
        "test suite": lambda: sections.test_suite(ROOT),
    }
    for length in lengths:
        named[f"prefill {length}"] = partial(
            gpu_prefill.prefill,
            args.backend,
            gpu_prefill.LENGTHS[length],
            with_flex=not args.no_flex,
        )
    path = args.out or RESULTS / f"gpu-{slug(machine['device'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, section in named.items():
        report["sections"][name] = run_section(name, section)
        report["clocks after"] = smi("clocks.sm,clocks.mem,temperature.gpu,power.draw")
        # After each section, so that an interrupted run keeps what it has.
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    passed = [s["ok"] for s in report["sections"].values()]
    print(f"{passed.count(True)} passed, {passed.count(False)} failed")
    return 0 if all(passed) else 1


def run_section(name: str, section: Callable[[], Any]) -> dict[str, Any]:
    """Runs one section; a failure becomes data."""
    start = time.perf_counter()
    try:
        result: dict[str, Any] = {"ok": True, "error": "", "data": section()}
    except Exception as error:  # the suite goes on: what failed is recorded and counted
        traceback.print_exc()
        first = str(error).splitlines()[0] if str(error) else ""
        result = {"ok": False, "error": f"{type(error).__name__}: {first}", "data": []}
    result["seconds"] = round(time.perf_counter() - start, 2)
    print(f"{name}: {'passed' if result['ok'] else 'FAILED'} ({result['seconds']} s)", flush=True)
    return result


def describe_gpu() -> dict[str, Any]:
    import torch

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    facts = torch.cuda.get_device_properties(0)
    return {
        "device": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "memory_gb": round(facts.total_memory / 1e9, 1),
        "multiprocessors": facts.multi_processor_count,
        "driver": smi("driver_version"),
        "clocks": smi("clocks.sm,clocks.max.sm,clocks.mem,power.limit"),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
    }


def smi(query: str) -> str:
    """One line of nvidia-smi, or why there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "nvidia-smi not found"
    command = [program, f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.stdout.strip() or done.stderr.strip()


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
