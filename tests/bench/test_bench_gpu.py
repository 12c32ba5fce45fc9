"""The CUDA suite, as far as a machine without a GPU can tell: its code runs, its tree is enough."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_paro, gpu_prefill, gpu_sections
from bench.pages import performance_page

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
import permattn, permattn.triton_kernels, bench.gpu_sections, bench.gpu_prefill, bench.gpu_paro
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


@pytest.fixture
def prefill_on_cpu(monkeypatch):
    monkeypatch.setattr(gpu_prefill, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(gpu_prefill, "BUDGET_MS", 0.0)
    return lambda: gpu_prefill.prefill("auto", 1000, heads=(4, 2), head_dim=64, with_flex=False)


def test_a_prefill_is_itemised(prefill_on_cpu, tmp_path):
    data = prefill_on_cpu()
    assert json.loads(json.dumps(data)) == data
    ours = {x["run"]: x for x in data["ours"]}
    assert list(ours) == ["probe", *gpu_prefill.PLANNERS]
    for name in gpu_prefill.PLANNERS:
        run = ours[name]
        assert min(run[x] for x in ("plan_ms", "attend_ms", "ms", "tflops", "density")) > 0
        assert 0.1 < run["least_recall"] <= run["recall"] < 1.001
    others = {x["run"]: x for x in data["others"]}
    assert list(others) == ["sdpa-flash", "sdpa-cudnn", "flash-attn-2", "flash-attn-3"]
    assert others["sdpa-flash"]["tflops"] > 0
    assert others["flash-attn-3"]["why_not"].startswith("ModuleNotFoundError")
    assert "grid attention over SDPA flash" in data["ratios"]
    report = {"machine": {"device": "Card", "torch": "2"}, "commit": "abc", "utc": "2026-01-02T"}
    report["sections"] = {"prefill 32k": {"ok": True, "error": "", "data": data}}
    (tmp_path / "gpu-card.json").write_text(json.dumps(report))
    page = performance_page(tmp_path)
    assert "### Prefill of 1000 tokens (4/2 heads, D = 64, bf16)" in page
    assert "| flash-attn-3 | ModuleNotFoundError" in page and "| layer |" in page


def test_a_wrong_result_fails_the_prefill(prefill_on_cpu, monkeypatch):
    real = gpu_prefill.permattn.sparse_attention
    monkeypatch.setattr(
        gpu_prefill.permattn, "sparse_attention", lambda *a, **k: 1.05 * real(*a, **k)
    )
    with pytest.raises(AssertionError, match="grid: error"):
        prefill_on_cpu()


def test_another_kernel_that_fails_is_data(prefill_on_cpu, monkeypatch):
    def broken(layer: gpu_prefill.Layer, kind: object) -> None:
        raise torch.OutOfMemoryError("no room\nfor it")

    monkeypatch.setattr(gpu_prefill, "_sdpa", broken)
    data = prefill_on_cpu()
    assert data["others"][0] == {"run": "sdpa-flash", "why_not": "OutOfMemoryError: no room"}
    assert list(data["ratios"]) == ["planning over attention, grid"]


@pytest.fixture
def paro_on_cpu(monkeypatch):
    monkeypatch.setattr(gpu_paro, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(gpu_prefill, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(gpu_prefill, "BUDGET_MS", 0.0)
    tiny = gpu_paro.Layer((3, 8, 9), 6, 64, text=20)
    monkeypatch.setattr(gpu_paro, "LAYERS", {"tiny": tiny})


def test_a_paro_layer_is_itemised(paro_on_cpu, tmp_path):
    data = gpu_paro.timing("cpu", "tiny", (0.5, 0.3))
    assert json.loads(json.dumps(data)) == data
    assert [x["run"] for x in data["ours"]][:2] == ["50% bf16", "50% int8"]
    for run in data["ours"]:
        assert ("prepare_ms" in run) == ("bf16" not in run["run"])
    others = {x["run"]: x for x in data["others"]}
    assert others["sageattention"]["why_not"].startswith("ModuleNotFoundError")
    assert data["ratios"]["30% bf16 over SDPA flash"]["target"] == 2.71
    report = {"machine": {"device": "Card", "torch": "2"}, "commit": "abc", "utc": "2026-01-02T"}
    report["sections"] = {"paro tiny": {"ok": True, "error": "", "data": data}}
    (tmp_path / "gpu-card.json").write_text(json.dumps(report))
    page = performance_page(tmp_path)
    assert "### paro tiny (236 tokens, 6 heads, D = 64, bf16)" in page
    assert "| 50% int8+int8 |" in page


def test_paro_correctness_runs_and_goes_red(paro_on_cpu, monkeypatch):
    monkeypatch.setattr(gpu_paro, "FORMATS", ("int8+int8",))
    assert [x["case"] for x in gpu_paro.correctness("cpu")] == ["int8+int8-d64", "int8+int8-d128"]
    monkeypatch.setattr(gpu_paro, "attend", lambda b, q, k, v, plan: lambda: 1.05 * v)
    with pytest.raises(AssertionError, match="differ from the reference"):
        gpu_paro.correctness("cpu")


def runs_at(num_tokens: int) -> dict:
    """The ratios of made-up times: ours take 10 ms to attend and 1 to plan, SDPA 100."""
    mine = {"plan_ms": 1.0, "attend_ms": 10.0, "ms": 11.0, "tflops": 300.0}
    ours = [{"run": x, **mine} for x in ("grid", "layer")]
    return gpu_prefill.ratios(
        num_tokens, ours, [{"run": "sdpa-flash", "ms": 100.0, "tflops": 400.0}]
    )


def test_ratios_and_targets_of_a_million_tokens():
    found = runs_at(1 << 20)
    values = {name: (x["value"], x["target"]) for name, x in found.items()}
    assert values["grid attention over SDPA flash"] == (10.0, 12.0)
    assert values["layer with planning over SDPA flash"] == (pytest.approx(100 / 11), 8.3)
    assert values["rate of listed blocks over the best dense rate"] == (0.75, 0.6)
    assert values["planning over attention, grid"] == (0.1, 0.05)
    short = runs_at(1 << 15)
    assert short["grid attention over SDPA flash"]["target"] is None
    assert short["planning over attention, grid"]["target"] is None


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
