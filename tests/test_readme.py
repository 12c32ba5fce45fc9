"""README's commands are true: targets and subcommands exist, and the marked blocks really run.

A fenced block right below a line `<!-- run -->` (or `<!-- run: SECONDS -->`) is executed: bash or
console by bash, python by Python; in the tree if it names make or bench/, else in an empty folder.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
FENCE = re.compile(
    r"(?:^<!-- run(?:: *(?P<seconds>\d+))? -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One fenced block of a Markdown file; `seconds` is None where it is not to be run."""

    line: int
    language: str
    body: str
    seconds: int | None

    def __str__(self) -> str:
        return f"line-{self.line}-{self.language}"

    def commands(self) -> str:
        """What a person would type: `$` prompts stripped, a console block's output dropped."""
        if self.language != "console":
            return self.body
        lines = [x[2:] for x in self.body.splitlines() if x.startswith("$ ")]
        return "\n".join(lines) + "\n"


def blocks_of(text: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(text):
        marked = match.group(0).startswith("<!-- run")
        seconds = int(match["seconds"] or 60) if marked else None
        line = text[: match.start()].count("\n") + 1
        found.append(Block(line, match["language"], match["body"], seconds))
    return found


def run_block(block: Block, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a block with this interpreter's programs first on the PATH."""
    env = dict(os.environ)
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    if block.language == "python":
        command = [sys.executable, "-c", block.commands()]
    else:
        command = ["bash", "-euo", "pipefail", "-c", block.commands()]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=block.seconds
    )


BLOCKS = blocks_of(README.read_text(encoding="utf-8"))
SHELL = [b for b in BLOCKS if b.language in ("bash", "console", "sh", "shell")]
MARKED = [b for b in BLOCKS if b.seconds is not None]


def typed(pattern: str) -> list[str]:
    """First words after a program in README's shell blocks, sorted and unique."""
    found = [m for b in SHELL for m in re.findall(pattern, b.commands(), re.MULTILINE)]
    return sorted(set(found))


def test_readme_has_blocks_that_run():
    assert MARKED, "mark at least one block of README.md with <!-- run -->"


@pytest.mark.parametrize("block", MARKED, ids=str)
def test_marked_block_runs(block: Block, tmp_path: Path):
    # Paths in the README are relative to the tree; what a block writes must not land there.
    needs_tree = "make" in block.body or "bench/" in block.body
    done = run_block(block, ROOT if needs_tree else tmp_path)
    assert done.returncode == 0, f"{block.commands()}\n{done.stdout}\n{done.stderr}"


def test_make_targets_exist():
    listed = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    targets = re.findall(r"^  (\w+) ", listed.stdout, re.MULTILINE)
    assert {"demo", "test", "lint", "bench", "gpu", "docs", "clean", "help"} <= set(targets)
    missing = set(typed(r"^make (?:-\S+ )*([a-z]+)")) - set(targets)
    assert not missing, f"README names make targets that do not exist: {sorted(missing)}"


@pytest.mark.parametrize("command", typed(r"^permattn ([a-z]+)"), ids=str)
def test_subcommand_exists(command: str):
    block = Block(0, "bash", f"permattn {command} --help\n", 60)
    done = run_block(block, ROOT)
    assert done.returncode == 0, done.stderr


PLANTED = """
<!-- run -->
```console
$ echo right
right
```

```bash
exit 3
```

<!-- run: 5 -->
```bash
false
```
<!-- run -->
```python
import permattn
assert permattn.__all__
```
"""


def test_extractor_tells_marked_from_unmarked():
    assert [(b.language, b.seconds) for b in blocks_of(PLANTED)] == [
        ("console", 60),
        ("bash", None),
        ("bash", 5),
        ("python", 60),
    ]


@pytest.mark.parametrize(("number", "code"), [(0, 0), (2, 1), (3, 0)], ids=["good", "bad", "py"])
def test_runner_sees_success_and_failure(number: int, code: int, tmp_path: Path):
    assert run_block(blocks_of(PLANTED)[number], tmp_path).returncode == code
