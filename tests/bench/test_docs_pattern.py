"""docs/add_a_pattern.md is a whole example: its file imports, and its own tests pass."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "add_a_pattern.md"


def code_of(text: str) -> tuple[str, str]:
    """The pattern and its tests: the page's two blocks of Python."""
    pattern, tests = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return pattern, tests


def run_page(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a page's pattern and the tests below it as one test file."""
    pattern, tests = code_of(text)
    path = folder / "test_page.py"
    path.write_text(f"{pattern}\n\n{tests}", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_the_page_runs(tmp_path: Path):
    done = run_page(PAGE.read_text(encoding="utf-8"), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 passed" in done.stdout


def test_the_page_goes_red_when_its_pattern_is_wrong():
    pattern, tests = code_of(PAGE.read_text(encoding="utf-8"))
    broken = pattern.replace("<= reach).all(-1).to(device)", "< reach).all(-1).to(device)")
    assert broken != pattern
    page = types.ModuleType("page")
    exec(f"{broken}\n\n{tests}", vars(page))
    with pytest.raises(AssertionError):
        page.test_pairs_are_the_ones_of_the_definition((4, 8, 8), causal=False)
