"""build.toml: the sources as Hugging Face's kernel-builder wants them listed.

python tests/build/hub_layout.py     rewrite it from what setup.py compiles
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fake_tools import ROOT, load_setup

FILE = ROOT / "build.toml"
HEAD = """\
# The sources for Hugging Face's kernel-builder (edition 5 of its format). Written from what
# setup.py compiles by `python tests/build/hub_layout.py`; a test compares them. docs/install.md
# says what a hub kernel still needs: this build has never been run.

[general]
name = "permattn"
version = 0
edition = 5
license = "Apache-2.0"
backends = ["cuda"]
"""
STABLE_ABI = """\
[torch.stable-abi]
cuda = "2.11"
"""
HEADERS = frozenset({".h", ".cuh", ".inl"})


def array(name: str, values: Iterable[str]) -> str:
    lines = "".join(f'  "{value}",\n' for value in values)
    return f"{name} = [\n{lines}]\n"


def dotted(arch: str) -> str:
    """As the builder writes "90a": "9.0a"."""
    letter = "a" if arch.endswith("a") else ""
    digits = arch.removesuffix("a")
    return f"{digits[:-1]}.{digits[-1]}{letter}"


def headers(*folders: str) -> list[Path]:
    """Every header below folders of csrc: the builder copies what is listed, and nothing else."""
    return [p for f in folders for p in (ROOT / "csrc" / f).rglob("*") if p.suffix in HEADERS]


def names(paths: Iterable[Path]) -> list[str]:
    return sorted(p.relative_to(ROOT).as_posix() for p in paths)


def text() -> str:
    """The whole file."""
    setup = load_setup()
    archs = tuple(setup.DEFAULT_CUDA_ARCHS.split())
    nvcc = setup.Nvcc("nvcc", setup.LEAST_NVCC, archs)
    flags = [*setup.compile_flags(), *(x for x in nvcc.definitions() if "_PTX=" not in x)]
    host = [*setup.cxx_sources(nvcc), *headers("binding", "common", "cpu", "cuda")]
    torch = "[torch]\n" + array("cxx-flags", flags) + array("src", names(host))
    parts = [HEAD, torch, STABLE_ABI]
    groups: dict[tuple[str, ...], list[Path]] = {}
    for source in setup.cuda_sources():
        groups.setdefault(nvcc.archs_of(source), []).append(source)
    for wanted, sources in sorted(groups.items(), key=lambda group: -len(group[0])):
        name = "hopper" if wanted == ("90a",) else "every_device"
        parts.append(
            f'[kernel.{name}]\nbackend = "cuda"\ndepends = ["torch"]\n'
            + array("cuda-capabilities", map(dotted, wanted))
            + array("cuda-flags", setup.NVCC_FLAGS)
            + array("src", names([*sources, *headers("common", "cuda")]))
        )
    return "\n".join(parts)


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
