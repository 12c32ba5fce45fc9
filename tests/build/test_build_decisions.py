"""What setup.py decides: with programs in the place of compilers that note how they are called."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from fake_tools import ROOT, Tools, load_setup

SETTINGS = (
    "CXX",
    "CUDACXX",
    "CUDA_HOME",
    "PERMATTN_CUDA_ARCHS",
    "PERMATTN_REQUIRE_CUDA",
)
SM80 = "sm80/instantiations/bf16.cu"
SM90 = "sm90/instantiations/bf16_d128_n64.cu"

setup = load_setup()


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A g++ and no nvcc; no setting is set."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setup.sys, "platform", "linux")
    made = Tools(tmp_path)
    made.add_compiler()
    monkeypatch.setenv("PATH", made.path)
    # A toolkit of this machine is not in the game.
    which = setup.shutil.which
    monkeypatch.setattr(
        setup.shutil,
        "which",
        lambda name: None if name.startswith("/usr/local/cuda") else which(name),
    )
    return made


@pytest.fixture
def build(tools, monkeypatch):
    """build() -> the report of a build with those programs, and the library's path."""
    torch = tools.folder / "torch"
    monkeypatch.setattr(setup, "find_torch", lambda: torch)

    def run():
        library = tools.folder / "_native.so"
        return setup.build_library(library, tools.folder / "objects"), library

    return run


def source_of(call: list[str]) -> str:
    return Path(call[call.index("-c") + 1]).relative_to(ROOT / "csrc").as_posix()


def codes(call: list[str]) -> list[str]:
    return [a.removeprefix("-gencode=") for a in call if a.startswith("-gencode=")]


def kernels_compiled(tools: Tools) -> dict[str, list[str]]:
    """Source -> call of nvcc."""
    return {source_of(c): c for c in tools.calls("nvcc") if "-gencode" in " ".join(c)}


# PERMATTN_CUDA_ARCHS


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (None, ["80", "86", "89", "90a", "120a"]),
        ("80", ["80"]),
        ("90", ["90a"]),
        ("120,80", ["80", "120a"]),
        ("80;86; 80 80", ["80", "86"]),
        ("90 90a", ["90a"]),
        ("", []),
        ("  ", []),
    ],
    ids=repr,
)
def test_wanted_architectures(monkeypatch, given, wanted):
    if given is None:
        monkeypatch.delenv("PERMATTN_CUDA_ARCHS", raising=False)
    else:
        monkeypatch.setenv("PERMATTN_CUDA_ARCHS", given)
    assert setup.wanted_archs() == wanted


@pytest.mark.parametrize("word", ["8.0", "sm_80", "75", "80a", "90b", "all", "9", "1200"])
def test_a_word_that_names_no_architecture_ends_the_build(tools, build, monkeypatch, word):
    monkeypatch.setenv("PERMATTN_CUDA_ARCHS", f"80 {word}")
    with pytest.raises(SystemExit, match=f"PERMATTN_CUDA_ARCHS: wants .*'80 90a', got '{word}'"):
        build()
    assert tools.calls() == []


@pytest.mark.parametrize("value", ["yes", "true", "2"])
def test_a_requirement_is_yes_or_no(tools, build, monkeypatch, value):
    monkeypatch.setenv("PERMATTN_REQUIRE_CUDA", value)
    with pytest.raises(SystemExit, match=f"PERMATTN_REQUIRE_CUDA: wants 0 or 1, got '{value}'"):
        build()
    assert tools.calls() == []


# What is compiled for which device


def test_every_source_goes_to_the_devices_that_can_run_it(tools, build):
    tools.add_nvcc()
    report, _ = build()
    compiled = kernels_compiled(tools)
    folder = ROOT / "csrc"
    assert set(compiled) == {
        p.relative_to(folder).as_posix() for p in (folder / "cuda").rglob("*.cu")
    }
    everywhere = [
        *("arch=compute_80,code=sm_80", "arch=compute_86,code=sm_86", "arch=compute_89,code=sm_89"),
        *("arch=compute_90a,code=sm_90a", "arch=compute_120a,code=sm_120a"),
        "arch=compute_89,code=compute_89",
    ]
    for source, call in compiled.items():
        is_hopper = source.startswith("cuda/sm90/")
        assert codes(call) == (["arch=compute_90a,code=sm_90a"] if is_hopper else everywhere), (
            source
        )
    assert report["cuda"]["archs"] == ["80", "86", "89", "90a", "120a"]
    assert (report["cuda"]["ptx"], report["cuda"]["left_out"]) == ("89", [])


@pytest.mark.parametrize(
    ("archs", "ptx", "has_sm90"),
    [("80 86", "86", False), ("90a", None, True), ("120a", None, False), ("80 90a", "80", True)],
    ids=str,
)
def test_the_binding_is_told_what_is_in(tools, build, monkeypatch, archs, ptx, has_sm90):
    monkeypatch.setenv("PERMATTN_CUDA_ARCHS", archs)
    tools.add_nvcc()
    report, _ = build()
    call = next(c for c in tools.calls("g++") if "binding/facts_of_cuda.cpp" in " ".join(c))
    numbers = ",".join(a.strip("a") for a in archs.split())
    assert {"-DPERMATTN_CUDA", f"-DPERMATTN_CUDA_ARCHS={numbers}"} <= set(call)
    assert [a for a in call if "CUDA_PTX" in a] == ([f"-DPERMATTN_CUDA_PTX={ptx}"] if ptx else [])
    assert ("-DPERMATTN_CUDA_SM90" in call) == has_sm90
    assert report["cuda"]["ptx"] == ptx
    compiled = kernels_compiled(tools)
    assert any(source.startswith("cuda/sm90/") for source in compiled) == has_sm90
    assert all(
        (f"code=compute_{ptx}" in " ".join(c)) == (ptx is not None)
        for s, c in compiled.items()
        if not s.startswith("cuda/sm90/")
    )


def test_every_kernel_is_compiled_so_that_spills_are_errors(tools, build):
    tools.add_nvcc()
    build()
    for source, call in kernels_compiled(tools).items():
        assert call[call.index("-Xptxas") + 1] == "-warn-spills,-Werror", source
        assert call[call.index("-ccbin") + 1] == "g++", source
        assert "-std=c++20" in call, source


def test_the_library_is_linked_with_the_static_runtime_of_the_toolkit(tools, build):
    tools.add_nvcc()
    _, library = build()
    (link,) = [c for c in tools.calls("g++") if "-shared" in c]
    assert link[link.index("-o") + 1] == str(library)
    # The nvcc on PATH is a script: the toolkit is where it says, not above the script.
    assert f"-L{tools.toolkit / 'lib64'}" in link and "-lcudart_static" in link
    assert not {"-lcudart", "-lcuda"} & set(link)
    objects = {Path(a).name for a in link if a.endswith(".o")}
    assert {"cuda_sm80_instantiations_bf16.cu.o", "binding_cuda_attend.cpp.o"} <= objects
    compiled = [c for c in tools.calls("g++") if "-c" in c]
    assert all(str(tools.toolkit / "include") in c for c in compiled)


def test_a_toolkit_without_the_static_runtime(tools, build):
    tools.add_nvcc()
    (tools.toolkit / "lib64" / "libcudart_static.a").unlink()
    report, _ = build()
    assert report["cuda"]["reason"] == f"no libcudart_static.a below {tools.toolkit}"


# Which nvcc


def test_nvcc_by_variable_before_path(tools, monkeypatch):
    tools.add_nvcc()
    other = tools.add_nvcc(folder="other")
    monkeypatch.setenv("CUDACXX", str(other))
    assert setup.find_nvcc().path == str(other)


def test_nvcc_by_the_toolkits_folder_before_path(tools, monkeypatch):
    tools.add_nvcc()
    other = tools.add_nvcc(folder="home/bin")
    monkeypatch.setenv("CUDA_HOME", str(tools.folder / "home"))
    assert setup.find_nvcc().path == str(other)


@pytest.mark.parametrize(
    ("variable", "what"), [("CUDACXX", "cuda"), ("CXX", "library")], ids=["nvcc", "g++"]
)
def test_a_compiler_that_was_named_has_no_substitute(tools, build, monkeypatch, variable, what):
    tools.add_nvcc()
    monkeypatch.setenv(variable, "ccache other")
    message = f"{variable}: wants one program that exists, got 'ccache other'"
    if what == "cuda":
        assert build()[0]["cuda"]["reason"] == message
    else:
        with pytest.raises(setup.NotBuilt, match=message):
            build()


@pytest.mark.parametrize(
    ("options", "archs", "reason"),
    [
        ({"release": "11.8"}, "80", "nvcc 11.8 is too old (needs 12.0)"),
        ({"known": (80, 90)}, "120a", "nvcc 13.0 knows none of 120a"),
        ({"release": "unknown"}, "80", "--version names no release"),
        ({"failing": SM80}, "80", "Registers are spilled"),
        ({}, "", "PERMATTN_CUDA_ARCHS is empty"),
    ],
    ids=["too-old", "unknown-architecture", "no-release", "spills", "nobody-wants-it"],
)
def test_without_kernels_the_library_says_why(tools, build, monkeypatch, options, archs, reason):
    monkeypatch.setenv("PERMATTN_CUDA_ARCHS", archs)
    tools.add_nvcc(**options)
    report, library = build()
    assert library.exists() and report["built"] and not report["cuda"]["built"]
    assert reason in report["cuda"]["reason"]
    # What launches kernels is not compiled, and nothing is told that there are any.
    compiled = [source_of(c) for c in tools.calls("g++") if "-c" in c]
    assert "binding/schemas.cpp" in compiled and "cuda/config.cpp" in compiled
    assert not [s for s in compiled if s.startswith("binding/cuda_")]
    assert not [a for c in tools.calls("g++") for a in c if a.startswith("-DPERMATTN_CUDA")]
    lines = setup.summary(report)
    assert lines[1] == f"no CUDA kernels: {report['cuda']['reason']}"
    assert lines[2] == "the cuda backend will say so; on CUDA devices triton runs in its place"


def test_architectures_that_nvcc_does_not_know_are_left_out_and_named(tools, build):
    tools.add_nvcc(release="12.4", known=(80, 86, 89, 90))
    report, _ = build()
    assert report["cuda"]["archs"] == ["80", "86", "89", "90a"]
    assert report["cuda"]["left_out"] == ["120a"]
    assert setup.summary(report)[-1] == "left out, newer than this nvcc: 120a"
    assert not [a for c in kernels_compiled(tools).values() for a in c if "120" in a]


def test_an_nvcc_that_does_not_run(tools, build):
    tools.add("nvcc", "exit 3\n")
    assert "nvcc --version failed" in build()[0]["cuda"]["reason"]


def test_the_summary_of_a_whole_build(tools, build):
    tools.add_nvcc()
    first, second = setup.summary(build()[0])
    assert first.startswith("native library: 0.0 MiB in ") and first.endswith(", fake 12.2")
    assert second.startswith("CUDA kernels: CUDA 13.0 for 80 86 89 90a 120a, PTX 89, in ")


# PERMATTN_REQUIRE_CUDA


@pytest.mark.parametrize(
    ("options", "archs", "what_to_do"),
    [
        (None, "80", "nvcc was not found .set CUDACXX or CUDA_HOME, or put it on PATH."),
        ({}, "", "PERMATTN_CUDA_ARCHS is empty"),
        ({"known": (80,)}, "80 90a", "nvcc 13.0 does not know 90a .take a newer one, or leave"),
        ({"failing": SM90}, "90a", "Registers are spilled"),
    ],
    ids=["no-nvcc", "nobody-wants-it", "one-missing", "spills"],
)
def test_required_kernels_that_cannot_be_built_end_it(
    tools, build, monkeypatch, options, archs, what_to_do
):
    monkeypatch.setenv("PERMATTN_REQUIRE_CUDA", "1")
    monkeypatch.setenv("PERMATTN_CUDA_ARCHS", archs)
    if options is not None:
        tools.add_nvcc(**options)
    wanted = f"permattn: PERMATTN_REQUIRE_CUDA=1 and CUDA kernels cannot be built: .*{what_to_do}"
    with pytest.raises(SystemExit, match=wanted):
        build()
    # Before the long part.
    assert not [c for c in tools.calls("g++") if "-c" in c]


# The commands


def run_setup(tools: Tools, *command: str, **settings: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in SETTINGS}
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=ROOT,
        env={**kept, "PATH": tools.path, **settings},
        capture_output=True,
        text=True,
    )


def test_a_required_wheel_without_nvcc_fails_as_a_command(tools):
    folders = ["--build-lib", str(tools.folder / "lib"), "--build-temp", str(tools.folder / "temp")]
    settings = {"PERMATTN_REQUIRE_CUDA": "1", "CUDACXX": "nvcc"}
    done = run_setup(tools, "-q", "build_ext", *folders, **settings)
    assert done.returncode != 0
    assert "CUDACXX: wants one program that exists, got 'nvcc'" in done.stderr
    assert not list((tools.folder / "lib").rglob("*.so"))


@pytest.mark.parametrize(
    ("failing", "tag"), [("", "-13cu-py3-none-"), (SM80, "-py3-none-")], ids=["kernels", "none"]
)
def test_the_wheels_name_says_what_is_in_it(tools, failing, tag):
    tools.add_nvcc(failing=failing)
    out = tools.folder
    folders = {"egg_info": "egg_base", "build": "build_base", "bdist_wheel": "bdist_dir"}
    config = out / "folders.cfg"
    config.write_text("".join(f"[{k}]\n{v} = {out / k}\n" for k, v in folders.items()))
    (out / "egg_info").mkdir()
    settings = {"DIST_EXTRA_CONFIG": str(config), "PERMATTN_CUDA_ARCHS": "80"}
    done = run_setup(tools, "-q", "bdist_wheel", "--dist-dir", str(out / "dist"), **settings)
    assert done.returncode == 0, done.stderr
    (wheel,) = (out / "dist").iterdir()
    version = wheel.name.split("-")[1]
    assert wheel.name.startswith(f"permattn-{version}{tag}") and wheel.suffix == ".whl"
    assert len([c for c in tools.calls("g++") if "-shared" in c]) == 1
    names = zipfile.ZipFile(wheel).namelist()
    kinds = {Path(name).suffix for name in names if name.startswith("permattn/")}
    assert kinds == {".py", ".so", ".json"}
    tops = {name.split("/")[0] for name in names}
    assert tops == {"permattn", f"permattn-{version}.dist-info"}
    assert [name for name in names if name.endswith(".so")] == ["permattn/_native.so"]
    assert len(names) == len(set(names))
    kernels = {f"permattn/triton_kernels/{p.name}" for p in (ROOT / "triton_kernels").glob("*.py")}
    package = ROOT / "python"
    files = {p.relative_to(package).as_posix() for p in (package / "permattn").rglob("*.py")}
    assert kernels | files <= set(names)


def test_setup_is_imported_without_torch_and_builds_nothing():
    code = (
        "import sys; sys.path.insert(0, 'tests/build'); import fake_tools; fake_tools.load_setup();"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
