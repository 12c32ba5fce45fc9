"""Programs that look like compilers: each notes how it was called, and makes what it should."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
KNOWN = (80, 86, 89, 90, 100, 120)
END = "--end of call--"
# One write a call, as many run at a time.
RECORD = """\
#!/bin/sh
printf '%s\\n' "${0##*/}" "$@" '@END@' >> '@LOG@'
"""
TOUCH = """\
out=
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then out=$2; fi
  shift
done
[ -n "$out" ] && echo made > "$out"
exit 0
"""


def load_setup() -> ModuleType:
    """setup.py as a module: nothing is built by its import."""
    spec = importlib.util.spec_from_file_location("permattn_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look themselves up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Tools:
    """A folder of programs for PATH, a toolkit, and the list of what was called."""

    folder: Path

    @property
    def toolkit(self) -> Path:
        return self.folder / "toolkit"

    @property
    def log(self) -> Path:
        return self.folder / "calls"

    @property
    def path(self) -> str:
        """PATH: these programs and no others; they use nothing but their shell."""
        return str(self.folder / "bin")

    def calls(self, program: str = "") -> list[list[str]]:
        """Argument lists in order, program first; all of them, or those of one program."""
        if not self.log.exists():
            return []
        calls = [call.splitlines() for call in self.log.read_text().split(f"{END}\n")[:-1]]
        return [call for call in calls if program in ("", call[0])]

    def add(self, name: str, body: str = TOUCH, folder: str = "bin") -> Path:
        program = self.folder / folder / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(RECORD.replace("@LOG@", str(self.log)).replace("@END@", END) + body)
        program.chmod(0o755)
        return program

    def add_compiler(self, name: str = "g++") -> Path:
        return self.add(
            name, 'if [ "$1" = --version ]; then echo "fake 12.2"; exit 0; fi\n' + TOUCH
        )

    def add_nvcc(
        self,
        release: str = "13.0",
        known: tuple[int, ...] = KNOWN,
        failing: str = "",
        folder: str = "bin",
    ) -> Path:
        """An nvcc that is a script somewhere; its toolkit is `toolkit`.

        Args:
            failing: a word; sources whose path has it do not compile, as their kernels spill.
        """
        library = self.toolkit / "lib64"
        library.mkdir(parents=True, exist_ok=True)
        (library / "libcudart_static.a").touch()
        codes = " ".join(f"sm_{arch}" for arch in known)
        body = f"""\
case "$*" in
*--version*) echo "Cuda compilation tools, release {release}, V{release}.88"; exit 0;;
*--list-gpu-code*) printf '%s\\n' {codes}; exit 0;;
*--dryrun*) echo '#$ TOP={self.toolkit}/bin/..' >&2; exit 0;;
esac
"""
        if failing:
            spills = "ptxas warning : Registers are spilled to local memory in function x"
            body += f'case "$*" in *{failing}*) echo "{spills}" >&2; exit 255;; esac\n'
        return self.add("nvcc", body + TOUCH, folder)
