"""What else carries the sources: the source distribution, and the layout of the kernels hub."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import hub_layout
import pytest
from fake_tools import ROOT, load_setup

CSRC = ROOT / "csrc"
INSTALL = ROOT / "docs" / "install.md"


def files_below(folder: Path) -> set[str]:
    return {p.relative_to(ROOT).as_posix() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def hub():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    return tomllib.loads(hub_layout.FILE.read_text(encoding="utf-8"))


def test_the_source_distribution_has_what_is_compiled_and_no_tests(tmp_path):
    # Its files pass through the folder that it is made in.
    tree = tmp_path / "tree"
    for folder in ("csrc", "python", "triton_kernels"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
    for path in ROOT.glob("*"):
        if path.is_file():
            shutil.copy(path, tree)
    (tree / "tests").mkdir()
    (tree / "tests" / "test_something.py").touch()
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as sources:
        names = {name.partition("/")[2] for name in sources.getnames()}
    python = {name for name in files_below(ROOT / "python" / "permattn") if name.endswith(".py")}
    kernels = {name for name in files_below(ROOT / "triton_kernels") if name.endswith(".py")}
    wanted = files_below(CSRC) | python | kernels | {"setup.py", "pyproject.toml"}
    assert wanted <= names, sorted(wanted - names)
    assert not [name for name in names if name.startswith(("tests/", "bench/"))]


def test_the_hub_lists_what_setup_compiles_for_the_same_devices(hub):
    setup = load_setup()
    nvcc = setup.Nvcc("nvcc", (13, 0), tuple(setup.DEFAULT_CUDA_ARCHS.split()))
    listed = {
        source: section["cuda-capabilities"]
        for section in hub["kernel"].values()
        for source in section["src"]
        if source.endswith(".cu")
    }
    compiled = {
        path.relative_to(ROOT).as_posix(): [
            f"{int(re.sub('a', '', arch)) / 10}{'a' * arch.endswith('a')}"
            for arch in nvcc.archs_of(path)
        ]
        for path in setup.cuda_sources()
    }
    assert listed == compiled
    sources = {s for s in hub["torch"]["src"] if s.endswith(".cpp")}
    assert sources == {p.relative_to(ROOT).as_posix() for p in setup.cxx_sources(nvcc)}


def test_the_hub_lists_every_header_that_is_included(hub):
    """The builder copies listed files only."""
    for section in [hub["torch"], *hub["kernel"].values()]:
        listed = set(section["src"])
        for name in sorted(listed):
            path = ROOT / name
            for found in re.findall(r'^#include "(.+)"$', path.read_text(), re.M):
                included = (path.parent / found).resolve()
                # Those of the tests, where there is no CUDA.
                if not included.exists():
                    assert (ROOT / "tests" / "cuda_shim" / found).exists(), (name, found)
                    continue
                assert included.relative_to(ROOT).as_posix() in listed, (name, found)


def test_spills_are_errors_on_the_hub_too(hub):
    for section in hub["kernel"].values():
        assert "-warn-spills,-Werror" in section["cuda-flags"]


def test_the_hubs_file_is_as_it_would_be_written():
    assert hub_layout.FILE.read_text(encoding="utf-8") == hub_layout.text()


def test_the_page_names_every_setting():
    """Of builds and of the package: what an environment can change."""
    sources = [ROOT / "setup.py", *(ROOT / "python").rglob("*.py")]
    names = {
        name
        for path in sources
        for name in re.findall(
            r'environ(?:\.get\(|\[)"((?:PERMATTN|CXX|CUDA)\w*)"', path.read_text()
        )
    }
    assert {"PERMATTN_CUDA_ARCHS", "PERMATTN_REQUIRE_CUDA", "CXX", "CUDACXX"} <= names
    page = INSTALL.read_text(encoding="utf-8")
    assert not [name for name in names if f"`{name}`" not in page]
    assert load_setup().DEFAULT_CUDA_ARCHS in page
