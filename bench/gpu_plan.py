"""The sections of the GPU suite in the order of their worth, each with its time."""

from __future__ import annotations

from functools import partial

from bench import (
    gpu_bilevel,
    gpu_conformance,
    gpu_large,
    gpu_rows,
    gpu_sections,
    gpu_tools,
)
from bench.gpu_suite import Job, Suite

# Seconds of the whole run: the sum of the budgets that are likely to be spent stays below it.
WHOLE_S = 24 * 60
BACKENDS = ("cuda", "triton")


def jobs(backends: tuple[str, ...] = BACKENDS) -> list[Job]:
    """Numbers first, then size and promises, then speed."""
    made = [
        Job("device", "", 90, gpu_sections.device_facts),
        Job("conformance", "", 120, gpu_conformance.conformance),
    ]
    if "cuda" in backends:
        made += _cuda()
    if "triton" in backends:
        made += _triton()
    for backend in backends:
        made += _promises(backend)
    for backend in backends:
        made += _tools(backend)
    return made


def _cuda() -> list[Job]:
    families = ("sm90", "sm80")
    return [
        *(
            Job(f"attention {x}", "cuda", 120, partial(gpu_sections.attention, family=x))
            for x in families
        ),
        *(
            Job(f"quantised {x}", "cuda", 120, partial(gpu_sections.quantised, family=x))
            for x in families
        ),
        Job("rows", "cuda", 90, gpu_rows.rows),
        Job("lists", "cuda", 60, gpu_rows.lists),
    ]


def _triton() -> list[Job]:
    return [
        Job("attention", "triton", 240, gpu_sections.attention),
        Job("quantised", "triton", 180, gpu_sections.quantised),
        Job("gradients", "triton", 90, gpu_sections.gradients),
        Job("rows", "triton", 90, gpu_rows.rows),
        Job("regions", "triton", 120, _regions),
        Job("test suite", "triton", 180, gpu_sections.test_suite),
    ]


def _promises(backend: str) -> list[Job]:
    return [
        Job("determinism", backend, 60, gpu_sections.determinism),
        Job("cuda graph", backend, 60, gpu_sections.cuda_graph),
        Job("two streams", backend, 60, gpu_sections.two_streams),
        Job("no host sync", backend, 60, gpu_sections.no_host_sync),
        Job("large", backend, 150, gpu_large.large),
    ]


def _tools(backend: str) -> list[Job]:
    """The kernels of Triton are compiled under the sanitizer, too: one check has to do."""
    checks = gpu_tools.SANITIZERS if backend == "cuda" else gpu_tools.SANITIZERS[:1]
    made = [
        Job(f"sanitizer {check}", backend, 120, partial(gpu_tools.sanitizer, check=check))
        for check in checks
    ]
    return [*made, Job("ncu", backend, 120, gpu_tools.ncu)]


def _regions(suite: Suite) -> object:
    return gpu_bilevel.correctness(suite.asked)
