"""PTX text to a list of instructions, and the declarations around them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from .errors import SimulationError

# Addresses below are never handed out, so that a null pointer into shared memory is found.
FIRST_SHARED_BYTE = 1024
TYPE_BYTES = {
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "f16x2": 4,
    "bf16x2": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
    "b128": 16,
}
_ENTRY = re.compile(r"(?:\.visible\s+|\.weak\s+|\.extern\s+|\.common\s+)*\.(entry|func)\b")
_VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak|common)\s+)*\.(shared|global|const|local)\s+"
    r"(?:\.attribute\([^)]*\)\s*)?(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*"
    r"((?:\[\d*\])*)\s*(?:=\s*(.*))?$",
    re.S,
)
_PARAM = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(.*?)([\w$]+)(?:\[(\d+)\])?$", re.S)
_NAME = re.compile(r"[%A-Za-z_$][\w$]*")


@dataclass
class Instruction:
    """One statement.

    Args:
        parts: the opcode split at its dots.
        guard: the predicate that must hold (or, if `negated`, must not).
        line: of the PTX text.
        location: of the source, where `.loc` tells.
    """

    opcode: str
    parts: list[str]
    operands: list[str]
    guard: str | None
    negated: bool
    line: int
    location: str | None


@dataclass
class Variable:
    """A named piece of memory; `offset` in its space, `data` where it is initialised."""

    name: str
    space: str
    offset: int
    size: int
    align: int
    data: bytes = b""


@dataclass
class Parameter:
    name: str
    kind: str
    size: int
    offset: int


@dataclass
class Program:
    """One entry of a module.

    Args:
        labels: name to the index of the instruction that follows.
        registers: declared name, or its prefix where a range was declared, to type.
        shared_bytes: end of the statically declared shared memory.
        dynamic: names of the shared memory whose size the launch gives.
        threads: of a block, where the kernel promises them.
    """

    entry: str = ""
    target: str = ""
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    parameters: list[Parameter] = field(default_factory=list)
    shared_bytes: int = FIRST_SHARED_BYTE
    dynamic: list[str] = field(default_factory=list)
    local_bytes: int = 0
    threads: int | None = None

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.size for p in self.parameters), default=0)


def split_operands(text: str) -> list[str]:
    """Splits at the commas that no bracket encloses."""
    parts, depth, current = [], 0, ""
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += c
    return [*parts, current.strip()] if current.strip() else parts


def entries_of(ptx: str) -> list[str]:
    """Names of the kernels of a module."""
    return re.findall(r"\.entry\s+([\w$]+)", ptx)


def parse(ptx: str, entry: str | None = None) -> Program:
    """Reads one entry of a module: the named one, or the only one."""
    names = entries_of(ptx)
    if entry is None:
        if len(names) != 1:
            raise SimulationError(f"name an entry of {names}")
        entry = names[0]
    if entry not in names:
        raise SimulationError(f"no entry {entry!r} in {names}")
    return _Parser(ptx, entry).program


class _Parser:
    """Reads statements one by one; bodies of other entries are passed over."""

    def __init__(self, ptx: str, entry: str) -> None:
        self.program = Program(entry=entry)
        self.files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', ptx, re.M))
        target = re.search(r"^\s*\.target\s+(\w+)", ptx, re.M)
        self.program.target = target.group(1) if target else ""
        self.location: str | None = None
        self.depth = 0
        self.inside = False  # the wanted entry's body
        self.scopes: list[dict[str, str]] = []
        self.numbers = 0
        self.branches: list[tuple[Instruction, list[dict[str, str]]]] = []
        for line, kind, text in _statements(ptx):
            self._take(line, kind, text)
        for instruction, scopes in self.branches:
            label = instruction.operands[0]
            name = _resolve(label, scopes)
            if name not in self.program.labels:
                raise SimulationError(f"ptx line {instruction.line}: no label {label!r}")
            instruction.operands[0] = name

    def _take(self, line: int, kind: str, text: str) -> None:
        if kind == "header":
            found = re.search(r"\.(entry|func)\s+(?:\([^)]*\)\s*)?([\w$]+)", text)
            self.inside = bool(found) and found.groups() == ("entry", self.program.entry)
            if self.inside:
                self._header(text)
        elif kind == "open":
            self.depth += 1
            self.scopes.append({})
        elif kind == "close":
            self.depth -= 1
            self.scopes.pop()
            self.inside = self.inside and self.depth > 0
        elif self.depth and not self.inside:
            return
        elif kind == "loc":
            self._loc(text)
        elif kind == "label":
            name = text
            if self.depth > 1:
                self.numbers += 1
                name = self.scopes[-1].setdefault(text, f"{text}@{self.numbers}")
            self.program.labels[name] = len(self.program.instructions)
        elif text.startswith(".reg"):
            self._registers(text)
        elif match := _VARIABLE.match(text):
            self._variable(*match.groups())
        elif text.startswith("."):
            if not re.match(r"\.(pragma|alias|branchtargets)\b", text):
                raise SimulationError(f"ptx line {line}: unknown directive {text[:60]!r}")
        elif self.inside:
            self._instruction(line, text)

    def _header(self, text: str) -> None:
        inside = re.search(r"\((.*)\)", text, re.S)
        offset = 0
        for declared in split_operands(inside.group(1)) if inside else []:
            match = _PARAM.match(declared)
            if match is None:
                raise SimulationError(f"parameter {declared!r} is not understood")
            align, kind, _, name, count = match.groups()
            size = TYPE_BYTES[kind]
            step = int(align) if align and count else size
            offset = -(-offset // step) * step
            size *= int(count or 1)
            self.program.parameters.append(Parameter(name, kind, size, offset))
            offset += size
        if threads := re.search(r"\.reqntid\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", text):
            x, y, z = (int(n or 1) for n in threads.groups())
            self.program.threads = x * y * z

    def _loc(self, text: str) -> None:
        file, row = text.split()[1:3]
        if row != "0":
            self.location = f"{self.files.get(file, file)}:{row}"
        if inlined := re.search(r"inlined_at\s+(\d+)\s+(\d+)", text):
            self.location = f"{self.location} (inlined at line {inlined.group(2)})"

    def _registers(self, text: str) -> None:
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text, re.S).groups()
        for name in split_operands(names):
            if prefix := re.match(r"(%?[\w$]+)<\d+>$", name):
                self.program.registers[prefix.group(1)] = kind
                continue
            if self.depth > 1:
                self.numbers += 1
                self.scopes[-1][name] = name = f"{name}@{self.numbers}"
            self.program.registers[name] = kind

    def _variable(self, space, align, kind, name, counts, data) -> None:
        program = self.program
        size = TYPE_BYTES[kind]
        align = int(align or size)
        lengths = [int(n) if n else None for n in re.findall(r"\[(\d*)\]", counts)]
        if None in lengths:
            if space == "shared":
                program.dynamic.append(name)
            return
        for n in lengths:
            size *= n
        offset = 0
        if space == "shared":
            offset = -(-program.shared_bytes // align) * align
            program.shared_bytes = offset + size
        elif space == "local":
            offset = -(-program.local_bytes // align) * align
            program.local_bytes = offset + size
        values = _initial_bytes(data, kind) if data else b""
        program.variables[name] = Variable(name, space, offset, size, align, values)

    def _instruction(self, line: int, text: str) -> None:
        guard, negated = None, False
        if match := re.match(r"@(!?)\s*(%?[\w$]+)\s+(.*)$", text, re.S):
            negated, guard, text = match.group(1) == "!", match.group(2), match.group(3)
        opcode, _, rest = text.partition(" ")
        operands = split_operands(rest)
        nested = self.scopes[1:]
        is_branch = opcode.split(".")[0] == "bra"
        if any(nested):
            guard = guard and _resolve(guard, nested)
            if not is_branch:
                operands = [_NAME.sub(lambda m: _resolve(m.group(), nested), x) for x in operands]
        location = self.location
        made = Instruction(opcode, opcode.split("."), operands, guard, negated, line, location)
        self.program.instructions.append(made)
        if is_branch:
            self.branches.append((made, list(nested)))


def _resolve(name: str, scopes: list[dict[str, str]]) -> str:
    for scope in reversed(scopes):
        if name in scope:
            return scope[name]
    return name


def _initial_bytes(text: str, kind: str) -> bytes:
    if kind[0] == "f":
        raise SimulationError("initialised memory of floats is not understood")
    size = TYPE_BYTES[kind]
    values = [int(v, 0) for v in split_operands(text.strip().strip("{}"))]
    return b"".join((v & ((1 << 8 * size) - 1)).to_bytes(size, "little") for v in values)


def _statements(ptx: str) -> Iterator[tuple[int, str, str]]:
    """(line, kind, text): kinds header, open, close, loc, label and statement."""
    ptx = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), ptx, flags=re.S)
    pending, is_header = "", False
    for line, raw in enumerate(ptx.splitlines(), 1):
        rest = raw.replace("\t", " ").strip()
        if rest.startswith(".section"):
            return  # for debuggers, after all code
        if rest.startswith((".file ", ".version ", ".target ", ".address_size ")):
            continue
        rest = rest.split("//")[0].strip()
        while rest:
            if not pending:
                if rest[0] in "{}":
                    yield line, "open" if rest[0] == "{" else "close", ""
                    rest = rest[1:].lstrip()
                    continue
                if rest.startswith(".loc "):
                    yield line, "loc", rest
                    break
                if match := re.match(r"([\w$]+):(?!:)\s*", rest):
                    yield line, "label", match.group(1)
                    rest = rest[match.end() :]
                    continue
                is_header = _ENTRY.match(rest) is not None
            ends = re.search(r"[;{]" if is_header else ";", rest)
            if ends is None:
                pending += rest + " "
                break
            text, last = (pending + rest[: ends.start()]).strip(), ends.group()
            rest = rest[ends.end() :].lstrip()
            pending = ""
            yield line, "header" if is_header and last == "{" else "statement", text
            if is_header and last == "{":
                yield line, "open", ""
            is_header = False
