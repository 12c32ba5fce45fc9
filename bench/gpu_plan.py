"""The sections of the GPU suite in the order of their worth, each with its time.

A run ends when its minutes are over; what it did not reach, `--only` runs in another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from bench import (
    gpu_bench,
    gpu_bilevel,
    gpu_conformance,
    gpu_large,
    gpu_paro,
    gpu_prefill,
    gpu_rows,
    gpu_sections,
    gpu_tools,
)
from bench.bilevel_baselines import Stage
from bench.gpu_shapes import BILEVEL_BATCH, PREFILL_HEADS, PREFILL_LENGTHS, SHAPES
from bench.gpu_suite import Job, Suite

BACKENDS = ("cuda", "triton")
# The shapes that the goals of the kernels are about.
_FIRST = ("a", "b", "e-16k")
_BILEVEL = tuple(
    Stage(f"224-stage{i}", BILEVEL_BATCH, side, heads, 7, topk)
    for i, side, heads, topk in ((1, 56, 2, 1), (2, 28, 4, 4), (3, 14, 8, 16))
)


def jobs(backends: Sequence[str] = BACKENDS) -> list[Job]:
    """Numbers first, then promises and size, then speed; CUDA C++ before Triton."""
    made = [
        Job("device", "", 90, gpu_sections.device_facts),
        Job("conformance", "", 120, gpu_conformance.conformance),
    ]
    shapes = {
        shape.name: Job(f"shape {shape.name}", "", 150, partial(gpu_bench.bench, shape=shape))
        for shape in SHAPES
    }
    made += [*_cuda(), *_promises("cuda")]
    made += [Job("ceilings", "", 60, gpu_bench.ceilings), *(shapes.pop(name) for name in _FIRST)]
    made += [*_sanitizers("cuda"), *_triton(), *_promises("triton"), *shapes.values()]
    made += [Job("ncu", backend, 120, gpu_tools.ncu) for backend in BACKENDS]
    made += [*_whole("triton"), *_whole("cuda"), *_sanitizers("triton")]
    return [job for job in made if job.backend in ("", *backends)]


def _cuda() -> list[Job]:
    by_family = {
        "attention": gpu_sections.attention,
        "poison": gpu_sections.poison,
        "quantised": gpu_sections.quantised,
    }
    return [
        *(
            Job(f"{name} {family}", "cuda", 120, partial(call, family=family))
            for name, call in by_family.items()
            for family in ("sm90", "sm80")
        ),
        Job("rows", "cuda", 90, gpu_rows.rows),
        Job("lists", "cuda", 60, gpu_rows.lists),
        Job("probe", "cuda", 60, gpu_sections.probe),
    ]


def _triton() -> list[Job]:
    return [
        Job("attention", "triton", 240, gpu_sections.attention),
        Job("quantised", "triton", 180, gpu_sections.quantised),
        Job("poison", "triton", 90, gpu_sections.poison),
        Job("probe", "triton", 120, gpu_sections.probe),
        Job("gradients", "triton", 90, gpu_sections.gradients),
        Job("rows", "triton", 90, gpu_rows.rows),
        Job("regions", "triton", 120, _regions),
        Job("test suite", "triton", 180, gpu_sections.test_suite),
    ]


def _promises(backend: str) -> list[Job]:
    return [
        Job("determinism", backend, 60, gpu_sections.determinism),
        Job("cuda graph", backend, 60, gpu_sections.cuda_graph),
        Job("paro", backend, 90, gpu_paro.correctness),
        Job("two streams", backend, 60, gpu_sections.two_streams),
        Job("no host sync", backend, 60, gpu_sections.no_host_sync),
        Job("large", backend, 150, gpu_large.large),
    ]


def _sanitizers(backend: str) -> list[Job]:
    """The kernels of Triton are compiled under the sanitizer, too: one check has to do."""
    checks = gpu_tools.SANITIZERS if backend == "cuda" else gpu_tools.SANITIZERS[:1]
    return [
        Job(f"sanitizer {check}", backend, 120, partial(gpu_tools.sanitizer, check=check))
        for check in checks
    ]


def _whole(backend: str) -> list[Job]:
    """Whole prefills, and the stages of a vision model, which Triton alone has kernels for."""
    made = [
        Job(f"prefill {length}", backend, 150, partial(_prefill, length=length))
        for length in PREFILL_LENGTHS
    ]
    return [*made, Job("bilevel", backend, 240, _bilevel)] if backend == "triton" else made


def _prefill(suite: Suite, length: str) -> object:
    if suite.rehearsal:
        facts = (suite.asked, 512)
        return gpu_prefill.prefill(*facts, heads=(2, 1), head_dim=64, with_flex=False)
    tokens = gpu_prefill.LENGTHS[length]
    return gpu_prefill.prefill(suite.asked, tokens, heads=PREFILL_HEADS)


def _regions(suite: Suite) -> object:
    return gpu_bilevel.correctness(suite.asked)


def _bilevel(suite: Suite) -> object:
    if suite.rehearsal:
        return gpu_bilevel.timing(suite.asked, gpu_bilevel.CHECKED[:1], compiled=False)
    return gpu_bilevel.timing(suite.asked, _BILEVEL)
