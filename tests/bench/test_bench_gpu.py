"""The CUDA suite, as far as a machine without a GPU can tell: its code runs, its tree is enough."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_sections

ROOT = Path(__file__).resolve().parents[2]

# An interpreter that has torch and pytest, but no installed permattn.
BARE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.path[:] = [p for p in sys.path if "permattn" not in p and p not in ("", {root!r}, {src!r})]
try:
    import permattn
except ImportError:
    pass
else:
    raise SystemExit("permattn is installed here otherwise: " + permattn.__file__)
sys.path.insert(0, {tree!r} + "/bench")
import gpu
gpu.use_tree()
import permattn, permattn.triton_kernels, bench.gpu_sections
print(permattn.__file__)
print(permattn.triton_kernels.__file__)
print("triton" in sys.modules)
"""


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(gpu_sections, "DEVICE", torch.device("cpu"))


def test_gradients_and_determinism_run(on_cpu):
    data = gpu_sections.gradients("reference")
    assert [x["case"] for x in data][:3] == ["bf16-dq", "bf16-dk", "bf16-dv"]


def test_correctness_runs_and_goes_red(on_cpu, monkeypatch):
    few = gpu_sections._cases()[::23]
    monkeypatch.setattr(gpu_sections, "_cases", lambda: few)
    assert len(gpu_sections.correctness("reference")) == len(few)
    real = gpu_sections.permattn.sparse_attention
    monkeypatch.setattr(
        gpu_sections.permattn, "sparse_attention", lambda *a, **k: 1.01 * real(*a, **k)
    )
    with pytest.raises(AssertionError, match="wrong"):
        gpu_sections.correctness("reference")


def test_a_failing_section_becomes_data():
    def broken() -> None:
        raise RuntimeError("no such kernel\nand more")

    result = gpu.run_section("broken", broken)
    assert result["ok"] is False
    assert result["error"] == "RuntimeError: no such kernel"
    assert json.dumps(result)


def test_the_tree_alone_is_enough(tmp_path):
    tree = tmp_path / "tree"
    for folder in ("bench", "python", "triton_kernels"):
        shutil.copytree(
            ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", "results")
        )
    code = BARE.format(root=str(ROOT), src=str(ROOT / "python"), tree=str(tree))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    package, kernels, _ = done.stdout.splitlines()
    assert Path(package) == tree / "python" / "permattn" / "__init__.py"
    assert Path(kernels) == tree / "triton_kernels" / "__init__.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: `make gpu` would run it")
def test_without_a_gpu_it_says_so_and_fails(capsys):
    assert gpu.main([]) == gpu.NO_GPU
    assert "no CUDA device" in capsys.readouterr().err
