"""What the simulator raises, with the line of the PTX and of the source that is to blame."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .parse import Instruction


class SimulationError(Exception):
    """A kernel did something that a GPU would not define, or that is not modelled."""


class UnknownOpcode(SimulationError):
    """An instruction that the simulator does not have; it never skips one."""


class Diverged(Exception):
    """Threads that an instruction of a whole warp needs are elsewhere; they may still come."""

    def __init__(self, error: SimulationError) -> None:
        super().__init__(str(error))
        self.error = error


def fault(instruction: Instruction, message: str) -> SimulationError:
    """An error at an instruction."""
    source = f"; source {instruction.location}" if instruction.location else ""
    return SimulationError(
        f"{message}  [ptx line {instruction.line}: {instruction.opcode}{source}]"
    )
