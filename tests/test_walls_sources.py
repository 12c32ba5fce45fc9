"""Files and functions stay short, and nothing names a path of somebody's machine."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("python", "triton_kernels", "bench", "tests", "csrc", "docs", ".ci")
SOURCES = frozenset({".py", ".h", ".cpp", ".inl", ".cu", ".cuh"})
TEXTS = SOURCES | {".md", ".toml", ".yaml", ".yml", ".json", ".jsonl", ".txt", ".cmake", ""}
MAX_FILE, MAX_FUNCTION, MAX_KERNEL = 600, 120, 250
# Put together here so that this file does not accuse itself.
FOREIGN_PATH = re.compile(
    r"(?<![\w.])/(?:" + "|".join(["work", "tmp", "root", "home", "opt/wheels"]) + r")/[\w.]"
)


def text_files(suffixes: frozenset[str]) -> list[Path]:
    """The tree's own text files: the known folders and the files at the top."""
    inside = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*")]
    skipped = {"__pycache__", ".venv", "permattn.egg-info"}
    return sorted(
        p
        for p in [*inside, *ROOT.glob("*")]
        if p.is_file() and p.suffix in suffixes and not skipped & set(p.parts)
    )


def long_functions(source: str) -> Iterator[str]:
    """Functions over the limit; a Triton kernel (decorated with jit) may be longer."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        is_kernel = any("jit" in ast.unparse(d) for d in node.decorator_list)
        limit = MAX_KERNEL if is_kernel else MAX_FUNCTION
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > limit:
            yield f"{node.name}: {length} lines, at most {limit}"


def foreign_paths(text: str) -> list[str]:
    """Lines that name an absolute path of somebody's machine."""
    return [line.strip() for line in text.splitlines() if FOREIGN_PATH.search(line)]


def test_files_are_short():
    sizes = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in text_files(SOURCES)}
    assert len(sizes) > 20
    long = [f"{p.relative_to(ROOT)}: {n} lines" for p, n in sizes.items() if n > MAX_FILE]
    assert not long, "\n".join(long)


def test_functions_are_short():
    faults = [
        f"{path.relative_to(ROOT)}: {fault}"
        for path in text_files(frozenset({".py"}))
        for fault in long_functions(path.read_text(encoding="utf-8"))
    ]
    assert not faults, "\n".join(faults)


def test_no_file_names_a_path_of_one_machine():
    faults = [
        f"{path.relative_to(ROOT)}: {line}"
        for path in text_files(TEXTS)
        for line in foreign_paths(path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert not faults, "\n".join(faults)


def _function(lines: int, decorator: str = "") -> str:
    return f"{decorator}def f():\n" + "    x = 1\n" * (lines - 1)


@pytest.mark.parametrize(
    ("source", "is_fault"),
    [
        (_function(120), False),
        (_function(121), True),
        (_function(250, "@triton.jit\n"), False),
        (_function(251, "@triton.jit\n"), True),
        ("class A:\n    def f(self):\n" + "        x = 1\n" * 121, True),
    ],
    ids=["120", "121", "kernel-250", "kernel-251", "method-122"],
)
def test_checker_measures_functions(source: str, is_fault: bool):
    assert bool(list(long_functions(source))) == is_fault


@pytest.mark.parametrize("folder", ["work", "tmp", "root", "home"], ids=str)
def test_checker_sees_a_planted_path(folder: str):
    assert foreign_paths(f"x = open('/{folder}/somebody/file')")


@pytest.mark.parametrize(
    "text",
    ["a/work/b", "docs/tmp/x", "/usr/local/cuda", "./work/x", "https://x.org/home/y"],
    ids=str,
)
def test_checker_lets_other_paths_pass(text: str):
    assert not foreign_paths(text)
