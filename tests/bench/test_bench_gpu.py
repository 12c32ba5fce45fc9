"""The CUDA suite, as far as a machine without a GPU can tell: its code runs, its tree is enough."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import (
    gpu,
    gpu_cases,
    gpu_machine,
    gpu_plan,
    gpu_prefill,
    gpu_record,
    gpu_sections,
    gpu_suite,
    gpu_supervisor,
    kernel_groups,
)
from bench.pages import performance_page

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "backends"))
from cuda_on_cpu import shim_path  # noqa: E402, F401

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
import permattn, permattn.triton_kernels, bench.gpu_plan, bench.gpu_record, bench.kernel_groups
print(permattn.__file__)
print(permattn.triton_kernels.__file__)
print(sorted({{"triton", "pydantic", "typer"}} & set(sys.modules)))
"""


def page_of(name: str, data: object, folder: Path) -> str:
    """docs/performance.md of one section."""
    section = gpu_record.Section(name, "cuda", "passed", "", 1.0, 60.0, data)
    facts = {"utc": "2026-01-02T03:04:05", "device": "Card", "cc": [9, 0], "driver": "1"}
    facts |= {"cuda_runtime": "13.0", "torch": "2", "triton": "3", "python": "3", "argv": ""}
    made = gpu_record.Record(False, "abc", False, **facts, sections=[section])
    gpu_record.write(made, folder / "gpu")
    return performance_page(folder)


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
    page = page_of("prefill 32k", data, tmp_path)
    assert "### cuda prefill 32k: prefill of 1000 tokens (4/2 heads, D = 64, bf16)" in page
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
    package, kernels, loaded = done.stdout.splitlines()
    assert Path(package) == tree / "python" / "permattn" / "__init__.py"
    assert loaded == "[]", "a GPU machine need not have these"
    assert Path(kernels) == tree / "triton_kernels" / "__init__.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: `make gpu` would run it")
def test_without_a_gpu_it_says_so_and_fails(capsys):
    assert gpu.main([]) == gpu.NO_GPU
    assert "no CUDA device" in capsys.readouterr().err


def test_it_ends_within_its_time():
    """Budgets are limits of what hangs; the deadline of the whole run is the promise."""
    assert gpu.parser().parse_args([]).minutes < 25
    assert max(job.budget_s for job in gpu_plan.jobs()) <= 240
    assert len({job.key for job in gpu_plan.jobs()}) == len(gpu_plan.jobs())


def test_sections_are_chosen_by_name(capsys):
    assert gpu.main(["--list", "--only", "rows", "--skip", "triton"]) == 0
    assert capsys.readouterr().out.split()[2:] == ["cuda", "rows"]
    with pytest.raises(SystemExit):
        gpu.main(["--list", "--only", "nonsense"])
    assert "no section has 'nonsense'" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--library", "--wheel"])
def test_a_library_that_is_not_there_is_named(option, tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--rehearse", option, str(tmp_path / "x")])
    assert f"{option}: no such file" in capsys.readouterr().err


def test_kernels_of_a_wheel_are_taken_out_of_it(tmp_path):
    wheel = tmp_path / "permattn-0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("permattn/_native.so", b"code")
        archive.writestr("permattn/_native_build.json", "{}")
    folder = tmp_path / "native"
    folder.mkdir()
    found = gpu_machine.find_library(None, wheel, folder)
    assert (found.folder / "_native.so").read_bytes() == b"code"
    assert found.sha256 == hashlib.sha256(b"code").hexdigest()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("permattn/x", "")
    with pytest.raises(FileNotFoundError, match=r"holds no permattn/_native\.so"):
        gpu_machine.find_library(None, wheel, folder)


FAST = (
    "device,conformance,attention,quantised,rows,lists,gradients,determinism,no host sync,large,"
    "triton paro,ceilings,shape b,shape d,shape e-4k"
)


ITEMISED = {
    *((x, y) for x in ("cuda", "triton") for y in ("mask", "plan", "total", "prepare", "kernel")),
    ("sdpa-flash", "total"),
}


def test_the_suite_needs_torch_and_triton_alone():
    """Every section's module, as on a device where nothing else is installed."""
    extras = ("rich", "typer", "pydantic", "matplotlib", "pytest", "hypothesis", "transformers")
    lines = (
        "import runpy, sys",
        f"sys.modules.update(dict.fromkeys({extras!r}))",
        "sys.argv = ['gpu.py', '--list']",
        f"runpy.run_path({str(ROOT / 'bench' / 'gpu.py')!r}, run_name='__main__')",
    )
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(gpu_plan.jobs())


def test_a_rehearsal_runs_the_suite(tmp_path, shim_path):  # noqa: F811
    """As `make gpu ARGS=--rehearse` does, in processes of its own; the whole takes longer."""
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--rehearse", "--only", FAST]
    environment = os.environ | {"PERMATTN_CUDA_SHIM": shim_path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    found = gpu_record.load(path)
    assert found.rehearsal and gpu_record.records(tmp_path) == []
    assert not found.suite.failed and found.suite.collected >= 14
    assert all(case.ok for case in found.cases)
    sections = {case.section for case in found.cases}
    assert {"cuda attention sm80", "cuda quantised sm80", "cuda rows", "triton rows"} <= sections
    assert found.section("cuda attention sm90").status == "skipped"
    assert {(run.contender, run.what) for run in found.bench if run.ms} >= ITEMISED
    assert {goal.backend for goal in found.goals} == {"cuda", "triton"}
    assert found.ceilings["matmul_tflops"] > 0
    assert len(list(tmp_path.glob("*.npz"))) == 1, "answers of the conformance probes"


def test_a_wrong_kernel_fails_its_sections(monkeypatch, tmp_path):
    """The same sections go red where results are off by a hundredth."""
    made = gpu_suite.Suite(torch.device("cpu"), gpu_suite.Journal(tmp_path / "journal"))
    made.rehearsal, made.stand_ins = True, {"triton": "reference"}
    real = gpu_sections.sparse_attention_with_lse

    def off(*args, **facts):
        out, lse = real(*args, **facts)
        return 1.01 * out, lse

    jobs = {job.key: job for job in gpu_plan.jobs()}
    monkeypatch.setattr(gpu_cases, "attention_cases", lambda backend: [])
    gpu_suite.run_job(jobs["triton attention"], made)
    assert made.journal.read()[-1]["status"] == "passed"
    monkeypatch.setattr(gpu_sections, "sparse_attention_with_lse", off)
    gpu_suite.run_job(jobs["triton attention"], made)
    assert made.journal.read()[-1]["status"] == "failed"
    assert "wrong" in made.journal.read()[-1]["why"]


def setup_says() -> str:
    """What setup.py's own function gives for this tree; running the file would build it."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (made,) = [
        x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == "sources_sha256"
    ]
    names = {"hashlib": hashlib, "CSRC": ROOT / "csrc"}
    exec(compile(ast.Module([made], []), "setup.py", "exec"), names)
    return names["sources_sha256"]()


@pytest.mark.parametrize("sources", ["same", "other", "unknown"])
def test_a_library_of_other_sources_vouches_for_nothing(sources, tmp_path, capsys):
    report = {"same": {"sources": setup_says()}, "other": {"sources": "x"}, "unknown": {}}[sources]
    (tmp_path / "_native_build.json").write_text(json.dumps(report))
    found = gpu_machine.Found(tmp_path, "abc")
    assert found.sources == sources
    record = gpu.new_record(gpu.parser().parse_args(["--rehearse"]), [], found)
    native = {group.name for group in kernel_groups.GROUPS if group.is_native}
    assert native and (native <= set(record.kernels)) == (sources == "same")
    assert set(record.kernels) >= set(kernel_groups.hashes()) - native
    assert ("count for nothing" in capsys.readouterr().out) == (sources != "same")


def test_a_record_is_gone_on_with(tmp_path, capsys):
    """What ran is kept, what did not have its time runs again; another tree's record is refused."""

    def section(name: str, status: str = "passed", why: str = "") -> gpu_record.Section:
        return gpu_record.Section(name, "triton", status, why, 1.0, 60.0)

    options = gpu.parser().parse_args(["--rehearse"])
    library = gpu_machine.Found(None, "abc")
    record = gpu.new_record(options, ["--first"], library)
    done = [section("rows"), section("poison", "timed out", "took more than 1 s")]
    record.sections = [*done, section("large", "skipped", gpu_record.NO_TIME)]
    path = gpu_record.write(record, tmp_path)
    again = gpu.new_record(options, ["--more", "x"], library)
    found = gpu.continued(again, path)
    assert found.sections == done and found.argv == "--first; --more x"
    outcome = gpu_supervisor.Outcome([section("large")])
    gpu.fill(found, replace(found), outcome)
    assert [s.name for s in found.sections] == ["rows", "poison", "large"]
    assert found.suite.passed == 2 and found.suite.failed == ["triton poison"]
    for other, what in (
        (gpu.new_record(options, [], gpu_machine.Found(None, "def")), "native library"),
        (replace(again, kernels={}), "kernels"),
    ):
        with pytest.raises(SystemExit):
            gpu.continued(other, path)
        assert f"is of another {what}" in capsys.readouterr().err
