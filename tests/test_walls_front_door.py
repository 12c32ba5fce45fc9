"""What `import permattn` costs, and what it offers."""

from __future__ import annotations

import json
import subprocess
import sys

import permattn
import pytest

# A change here is a change for users: it belongs into CHANGELOG.md and the documents too.
PUBLIC = frozenset(
    {
        "AttnPart",
        "AttnPlan",
        "BlockIndex",
        "HeadPattern",
        "Permutation",
        "QuantSpec",
        "TextRun",
        "TokenBand",
        "TokenGrid",
        "__version__",
        "load_plan",
        "patch",
        "permute_tokens",
        "plan_a_shape",
        "plan_dense",
        "plan_grid_prefill",
        "plan_prefill",
        "plan_tri_shape",
        "plan_vertical_slash",
        "save_plan",
        "scaled_dot_product_attention",
        "sparse_attention",
        "sparse_attention_with_lse",
        "unpatch",
    }
)
HEAVY = ("triton", "transformers", "pydantic", "rich", "typer", "matplotlib", "safetensors", "av")

PROBE = """
import json, sys, time
import torch
before, t0 = set(sys.modules), time.process_time()
{statement}
print(json.dumps({{
    "seconds": time.process_time() - t0,
    "new": sorted({{m.split(".")[0] for m in set(sys.modules) - before}}),
    "kernels": any(m.startswith("permattn.triton_kernels") for m in sys.modules),
    "cuda": torch.cuda.is_initialized(),
}}))
"""


def probe(statement: str) -> dict:
    """What a fresh process sees after one statement, torch being imported already."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(statement=statement)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def cold() -> dict:
    return probe("import permattn")


def test_import_loads_nothing_heavy(cold: dict):
    assert not set(HEAVY) & set(cold["new"]), cold["new"]
    assert not cold["kernels"]


def test_import_leaves_cuda_alone(cold: dict):
    assert cold["cuda"] is False


def test_import_adds_less_than_a_second_to_torch(cold: dict):
    assert cold["seconds"] < 1.0


def test_probe_sees_a_heavy_import():
    seen = probe("import rich")
    assert "rich" in seen["new"]


def test_public_names_are_the_listed_ones():
    assert sorted(permattn.__all__) == sorted(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name_exists_and_is_documented(name: str):
    offered = getattr(permattn, name)
    if name != "__version__":
        assert offered.__doc__
