"""What `import permattn` costs, and what it offers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import permattn
import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
HEAVY = (
    *("triton", "transformers", "diffusers", "pydantic", "rich", "typer", "matplotlib"),
    *("safetensors", "av"),
)

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


def listed_names(page: str) -> set[str]:
    """Names in the first column of a page's tables."""
    cells = re.findall(r"^\| (`[^|]*`) \|", page, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


DOCUMENTED = listed_names(PAGE.read_text(encoding="utf-8"))


def test_public_names_are_the_documented_ones():
    assert sorted(permattn.__all__) == sorted(DOCUMENTED)


@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_public_name_exists_and_has_a_docstring(name: str):
    offered = getattr(permattn, name)
    assert offered if name == "__version__" else offered.__doc__


def test_lister_reads_every_cell():
    page = "| name | |\n|---|---|\n| `a` | x `no` |\n| `b`, `c_d` | y |\n"
    assert listed_names(page) == {"a", "b", "c_d"}
