"""Imports point one way (docs/architecture.md): every import of every module, lazy ones too."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "permattn"

# Room -> the rooms of the package that it may import beside itself.
MAY_IMPORT: dict[str, frozenset[str]] = {
    "core": frozenset(),
    "triton_kernels": frozenset(),
    "backends": frozenset({"core", "triton_kernels"}),
    "ops": frozenset({"core", "backends"}),
    "probe": frozenset({"core", "backends"}),
    "patterns": frozenset({"core", "ops", "probe", "bilevel"}),
    "api": frozenset({"core", "ops", "backends"}),
    "models": frozenset({"core", "patterns", "api", "paro_file", "bilevel"}),
    "calibrate": frozenset(
        {"core", "probe", "block_mass", "patterns", "api", "models", "paro_file"}
    ),
    "cli": frozenset(
        {
            *("core", "ops", "backends", "probe", "block_mass", "patterns", "api", "models"),
            *("calibrate", "paro_file", "paro", "bilevel"),
        }
    ),
    "plan_file": frozenset({"core"}),
    "block_mass": frozenset({"core", "backends"}),
    "region_ops": frozenset({"core", "backends"}),
    "bilevel": frozenset({"core", "backends", "region_ops"}),
    "paro_file": frozenset({"core", "patterns", "plan_file"}),
    # A front door of its own: names of other rooms, loaded on first use.
    "paro": frozenset({"core", "patterns", "models", "calibrate", "paro_file"}),
    "testing": frozenset({"core", "ops", "backends", "api", "bilevel", "region_ops"}),
}
# Room -> what it may import from outside the standard library; rooms not named here are free.
THIRD_PARTY: dict[str, frozenset[str]] = {
    "core": frozenset({"torch"}),
    "triton_kernels": frozenset({"torch", "triton"}),
    "backends": frozenset({"torch", "triton"}),
    "ops": frozenset({"torch"}),
    "patterns": frozenset({"torch"}),
    "api": frozenset({"torch"}),
    "plan_file": frozenset({"torch", "safetensors"}),
    "paro_file": frozenset({"torch"}),
    "block_mass": frozenset({"torch"}),
    "region_ops": frozenset({"torch"}),
    "bilevel": frozenset({"torch"}),
}
# Modules below these do not see each other: a backend is one file, a system one file or folder.
NO_SIDEWAYS = ("permattn.backends.", "permattn.patterns.", "permattn.models.families.")
# Documented exceptions: (importing module or room, imported name).
EXCEPTIONS = frozenset(
    {
        # scaled_dot_product_attention(pattern=None) is dense.
        ("api", "permattn.patterns.dense.plan_dense"),
    }
)


@dataclass(frozen=True)
class Import:
    """One import statement: `from module import name` has a name, `import module` has none."""

    line: int
    module: str
    name: str | None

    @property
    def full(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module


def imports_of(source: str, module: str, is_package: bool) -> Iterator[Import]:
    """Every import of a module: at the top, in functions, under TYPE_CHECKING, by import_module."""
    base = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, None)
        elif isinstance(node, ast.ImportFrom):
            parent = base[: len(base) - node.level + 1] if node.level else []
            target = ".".join([*parent, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(node.lineno, target, alias.name)
        elif isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            first = node.args[0]
            literal = isinstance(first, ast.Constant) and isinstance(first.value, str)
            if called in ("import_module", "__import__") and literal:
                yield Import(node.lineno, first.value, None)  # type: ignore[attr-defined, arg-type]


def room_of(module: str) -> str:
    """The room of a module of the package; "" is the front door, `permattn/__init__.py`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def faults_of(source: str, module: str, modules: frozenset[str], is_package: bool) -> list[str]:
    """Every import of one module that goes through a wall, as readable lines."""
    room = room_of(module)
    faults = []
    for item in imports_of(source, module, is_package):
        top = item.module.split(".")[0]
        where = f"{module}:{item.line}: imports {item.full}"
        if top != PACKAGE:
            allowed = THIRD_PARTY.get(room)
            if allowed is not None and top not in allowed | sys.stdlib_module_names:
                faults.append(f"{where}: {room} may import only {sorted(allowed)} from outside")
            continue
        # `from permattn import core` names a module, `... import AttnPlan` the front door.
        target = item.full if item.full in modules else item.module
        if (room, item.full) in EXCEPTIONS or (module, item.full) in EXCEPTIONS:
            continue
        if room_of(target) in ("_version", room) and room_of(target) != "":
            faults += _sideways(module, target, where)
        elif room == "":
            continue
        elif room_of(target) == "":
            if room != "cli":
                faults.append(f"{where}: only cli enters by the front door; name the module")
        elif room not in MAY_IMPORT:
            faults.append(f"{where}: room {room!r} has no rule; add one to MAY_IMPORT")
        elif room_of(target) not in MAY_IMPORT[room]:
            faults.append(f"{where}: {room} may import only {sorted(MAY_IMPORT[room])}")
    return faults


def _sideways(module: str, target: str, where: str) -> Iterator[str]:
    for below in NO_SIDEWAYS:
        if not (module.startswith(below) and target.startswith(below)):
            continue
        mine, theirs = (x.removeprefix(below).split(".")[0] for x in (module, target))
        if mine != theirs:
            yield f"{where}: sideways import below {below[:-1]}"


def module_files() -> dict[str, Path]:
    """Module name -> file, over both source roots."""
    found = {}
    for root, prefix in (
        (ROOT / "python" / PACKAGE, PACKAGE),
        (ROOT / "triton_kernels", f"{PACKAGE}.triton_kernels"),
    ):
        for path in sorted(root.rglob("*.py")):
            parts = list(path.relative_to(root).with_suffix("").parts)
            if parts[-1] == "__init__":
                parts.pop()
            found[".".join([prefix, *parts])] = path
    return found


FILES = module_files()
MODULES = frozenset(FILES)


def test_both_source_roots_are_found():
    assert {"permattn.core.plan", "permattn.ops", "permattn.triton_kernels"} <= MODULES


@pytest.mark.parametrize("room", sorted({room_of(m) for m in MODULES}), ids=lambda r: r or "init")
def test_imports_point_one_way(room: str):
    faults = [
        fault
        for module, path in FILES.items()
        if room_of(module) == room
        for fault in faults_of(
            path.read_text(encoding="utf-8"), module, MODULES, path.name == "__init__.py"
        )
    ]
    assert not faults, "\n".join(faults)


def test_lazy_imports_are_the_only_exceptions():
    """An exception closes a cycle, so it must stay inside a function."""
    for module, path in FILES.items():
        body = ast.parse(path.read_text(encoding="utf-8")).body
        top = "\n".join(ast.unparse(x) for x in body if isinstance(x, (ast.Import, ast.ImportFrom)))
        for item in imports_of(top, module, path.name == "__init__.py"):
            assert (room_of(module), item.full) not in EXCEPTIONS, f"{module}: {item.full}"


PLANTED = {
    "core-to-ops": ("permattn.core.bad", "from permattn.ops import pack_plan"),
    "core-to-numpy": ("permattn.core.bad", "import numpy as np"),
    "core-lazily": ("permattn.core.bad", "def f():\n    from permattn import api\n"),
    "core-relative": ("permattn.core.bad", "from ..ops import pack_plan"),
    "core-front-door": ("permattn.core.bad", "from permattn import AttnPlan"),
    "core-type-checking": (
        "permattn.core.bad",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from permattn import backends\n",
    ),
    "core-import-module": (
        "permattn.core.bad",
        "import importlib\nimportlib.import_module('permattn.models')\n",
    ),
    "kernels-to-package": ("permattn.triton_kernels.bad", "from permattn.core import AttnPlan"),
    "kernels-to-front-door": ("permattn.triton_kernels.bad", "import permattn"),
    "backend-sideways": ("permattn.backends.bad", "from permattn.backends import reference"),
    "backend-to-ops": ("permattn.backends.bad", "from permattn.ops import sparse_attention_op"),
    "backend-to-transformers": ("permattn.backends.bad", "def f():\n    import transformers\n"),
    "ops-to-api": ("permattn.ops", "from permattn.api import sparse_attention"),
    "pattern-sideways": ("permattn.patterns.bad", "from permattn.patterns.dense import plan_dense"),
    "pattern-to-backend": ("permattn.patterns.bad", "from permattn.backends.reference import NAME"),
    "pattern-to-models": ("permattn.patterns.bad", "import permattn.models"),
    "api-to-models": ("permattn.api", "from permattn.models import patch"),
    "family-sideways": (
        "permattn.models.families.bad",
        "from permattn.models.families.qwen2_vl import FAMILY",
    ),
    "models-to-cli": ("permattn.models.bad", "from permattn.cli import main"),
    "unknown-room": ("permattn.newroom.bad", "from permattn.core import AttnPlan"),
}


@pytest.mark.parametrize("case", PLANTED, ids=str)
def test_checker_sees_a_planted_fault(case: str):
    module, source = PLANTED[case]
    assert faults_of(source, module, MODULES | {module}, is_package=False)


LEGAL = {
    "core": (
        "permattn.core.good",
        "import math\nimport torch\nfrom permattn.core.plan import ceil_div",
    ),
    "backend": ("permattn.backends.good", "from permattn.core.packing import pack_plan"),
    "backend-kernels": (
        "permattn.backends.good",
        "def f():\n    from permattn import triton_kernels\n",
    ),
    "pattern-folder": ("permattn.patterns.good.a", "from permattn.patterns.good.b import x"),
    "cli": ("permattn.cli.good", "import permattn, rich\nfrom permattn.models import patch"),
}


@pytest.mark.parametrize("case", LEGAL, ids=str)
def test_checker_lets_legal_imports_pass(case: str):
    module, source = LEGAL[case]
    assert faults_of(source, module, MODULES | {module}, is_package=False) == []
