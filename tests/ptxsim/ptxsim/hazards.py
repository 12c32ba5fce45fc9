"""What may not happen in shared memory, found by vector clocks.

Every warp of a block is an agent, and so is its asynchronous machinery (bulk copies), the last one.
`clock[a, b]` is the last moment of agent b that agent a knows to be over; barriers join clocks. An
access conflicts with an earlier one by b, at moment t, if the accessing agent's clock of b is
before t. Memory is followed in granules, as wide as the smallest access of the program.
"""

from __future__ import annotations

import numpy as np

from .errors import fault
from .parse import FIRST_SHARED_BYTE, Instruction

NOT_WRITTEN, IN_FLIGHT = -1, -2


class Hazards:
    """The history of all shared memory of the blocks that run together.

    Args:
        blocks: that run together; each has its own agents.
        warps: of a block.
        size: bytes of all blocks' shared memory.
        granule: bytes that are followed as one.
        proxy_fence: whether generic writes (cp.async's too) must be fenced before the async proxy
            (wgmma, bulk copies) reads them.
    """

    def __init__(
        self, blocks: int, warps: int, size: int, granule: int, *, proxy_fence: bool = True
    ) -> None:
        self.agents = warps + 1
        self.blocks, self.granule, self.proxy_fence = blocks, granule, proxy_fence
        self.length = -(-size // granule)
        self.stride = self.length // blocks
        self.writer = np.empty(self.length, np.int16)
        self.moment = np.empty(self.length, np.int32)
        self.fenced = np.empty(self.length, np.int32)
        self.readers = np.empty((self.length, self.agents), np.int32)
        self.in_use = np.empty(self.length, np.int16)  # asynchronous reads under way
        self.by_async = np.empty(self.length, np.bool_)
        self.atomics: np.ndarray | None = None  # as readers; made when there is one
        self.clock = np.empty((blocks * self.agents, self.agents), np.int32)
        self.own_fence = np.empty_like(self.clock)
        self.reset()

    def reset(self) -> None:
        self.writer[:], self.moment[:], self.fenced[:] = NOT_WRITTEN, 0, 0
        self.readers[:], self.in_use[:], self.by_async[:], self.atomics = 0, 0, False, None
        self.clock[:], self.own_fence[:] = 0, 0
        agents = np.arange(len(self.clock))
        self.clock[agents, agents % self.agents] = 1
        self.num_in_use = 0

    def granules(self, flat: np.ndarray, size: int) -> tuple[np.ndarray, int]:
        """Granules of accesses of `size` bytes, one after the other, and how many each has."""
        if size <= self.granule:
            return flat // self.granule, 1
        count = size // self.granule
        return (flat[:, None] // self.granule + np.arange(count)).ravel(), count

    def _spread(self, agent: np.ndarray, count: int) -> np.ndarray:
        return agent if count == 1 else np.repeat(agent, count)

    def _place(self, granule: int) -> str:
        block, inside = divmod(int(granule), self.stride)
        byte = inside * self.granule - FIRST_SHARED_BYTE
        return f"shared byte {byte} of block {block} of the batch"

    def _name(self, agent: int) -> str:
        return "a bulk copy" if agent == self.agents - 1 else f"warp {agent}"

    def read(
        self,
        instruction: Instruction,
        flat: np.ndarray,
        size: int,
        agent: np.ndarray,
        *,
        by_async_proxy: bool = False,
    ) -> None:
        """A read of `size` bytes at each flat address by the agent beside it."""
        index, count = self.granules(flat, size)
        who = self._spread(agent, count)
        writer, moment = self._check_written(instruction, index, who)
        if by_async_proxy and self.proxy_fence:
            self._check_fence(instruction, index, who, writer, moment)
        if self.atomics is not None:
            self._check_known(instruction, index, who, self.atomics, "reads", "changes atomically")
        local = who % self.agents
        self.readers[index, local] = self.clock[who, local]

    def _check_written(self, instruction, index, who) -> tuple[np.ndarray, np.ndarray]:
        """Writer and moment of granules whose last write the reader knows of."""
        writer, moment = self.writer[index], self.moment[index]
        if index.size and writer.min() < 0:
            at = int(np.flatnonzero(writer < 0)[0])
            state = "uninitialised shared memory"
            if writer[at] == IN_FLIGHT:
                state = "shared memory that an asynchronous copy is still writing"
            raise fault(instruction, f"read of {state}: {self._place(index[at])}")
        late = moment > self.clock[who, writer]
        if late.any():
            at = int(np.flatnonzero(late)[0])
            raise fault(
                instruction,
                f"shared race: {self._name(who[at] % self.agents)} reads {self._place(index[at])} "
                f"that {self._name(writer[at])} wrote, with no barrier between",
            )
        return writer, moment

    def _check_fence(self, instruction, index, who, writer, moment) -> None:
        fenced = self.fenced[index]
        by_writer = (fenced > 0) & (fenced <= self.clock[who, writer])
        by_reader = self.own_fence[who, writer] >= moment
        bad = ~(by_writer | by_reader | self.by_async[index])
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            raise fault(
                instruction,
                f"the async proxy reads {self._place(index[at])} that "
                f"{self._name(writer[at])} wrote, without fence.proxy.async between",
            )

    def _check_known(
        self,
        instruction: Instruction,
        index: np.ndarray,
        who: np.ndarray,
        moments: np.ndarray,
        does: str,
        did: str,
    ) -> None:
        unknown = moments[index] > self.clock[who]
        if unknown.any():
            at, other = (int(x) for x in np.argwhere(unknown)[0])
            raise fault(
                instruction,
                f"shared race: {self._name(who[at] % self.agents)} {does} "
                f"{self._place(index[at])} that {self._name(other)} {did}, with no barrier between",
            )

    def check_write(
        self, instruction: Instruction, flat: np.ndarray, size: int, agent: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Granules and agents of a write that conflicts with nothing earlier."""
        index, count = self.granules(flat, size)
        who = self._spread(agent, count)
        writer = self.writer[index]
        if index.size and writer.min() == IN_FLIGHT:
            at = int(np.flatnonzero(writer == IN_FLIGHT)[0])
            raise fault(
                instruction,
                f"write to {self._place(index[at])}, which an asynchronous copy is still writing",
            )
        late = (self.moment[index] > self.clock[who, writer]) & (writer >= 0)
        if late.any():
            at = int(np.flatnonzero(late)[0])
            raise fault(
                instruction,
                f"shared race: {self._name(who[at] % self.agents)} overwrites "
                f"{self._place(index[at])} that {self._name(writer[at])} wrote, with no barrier "
                "between",
            )
        if self.num_in_use and self.in_use[index].any():
            at = int(np.flatnonzero(self.in_use[index])[0])
            raise fault(
                instruction,
                f"write to {self._place(index[at])}, which a wgmma or a bulk store in flight reads",
            )
        self._check_known(instruction, index, who, self.readers, "overwrites", "reads")
        if self.atomics is not None:
            did = "changes atomically"
            self._check_known(instruction, index, who, self.atomics, "overwrites", did)
        return index, who

    def write(
        self, instruction: Instruction, flat: np.ndarray, size: int, agent: np.ndarray
    ) -> None:
        self.wrote(*self.check_write(instruction, flat, size, agent))

    def wrote(self, index: np.ndarray, who: np.ndarray, clock: np.ndarray | None = None) -> None:
        local = who % self.agents
        self.writer[index] = local
        self.moment[index] = (self.clock if clock is None else clock)[who, local]
        self.fenced[index], self.by_async[index] = 0, False

    def start_copy(
        self, instruction: Instruction, flat: np.ndarray, size: int, agent: np.ndarray
    ) -> np.ndarray:
        """Marks the bytes of an asynchronous copy; its granules."""
        index, _ = self.check_write(instruction, flat, size, agent)
        self.writer[index] = IN_FLIGHT
        return index

    def finish_bulk_copy(self, index: np.ndarray, block: int) -> int:
        """The bytes are written by the block's asynchronous agent; the moment."""
        agent = block * self.agents + self.agents - 1
        self.clock[agent, -1] += 1
        moment = int(self.clock[agent, -1])
        self.writer[index], self.moment[index] = self.agents - 1, moment
        self.by_async[index], self.fenced[index] = True, 0
        return moment

    def access_atomically(
        self, instruction: Instruction, flat: np.ndarray, size: int, agent: np.ndarray
    ) -> None:
        """Atomics conflict with plain accesses but not with each other."""
        index, count = self.granules(flat, size)
        who = self._spread(agent, count)
        self._check_known(instruction, index, who, self.readers, "changes", "reads")
        self._check_written(instruction, index, who)
        if self.atomics is None:
            self.atomics = np.zeros_like(self.readers)
        local = who % self.agents
        self.atomics[index, local] = self.clock[who, local]

    def start_use(self, index: np.ndarray) -> None:
        """An asynchronous read (wgmma, bulk store) of distinct granules begins."""
        self.in_use[index] += 1
        self.num_in_use += 1

    def finish_use(self, index: np.ndarray, agents: np.ndarray) -> None:
        """It is over, and these agents know."""
        self.in_use[index] -= 1
        self.num_in_use -= 1
        for agent in agents:
            local = agent % self.agents
            self.readers[index, local] = self.clock[agent, local]

    def fence_proxy(self, agents: np.ndarray) -> None:
        """fence.proxy.async of some agents: their own writes, and all that they know of."""
        for agent in agents:
            block, local = divmod(int(agent), self.agents)
            part = slice(block * self.stride, (block + 1) * self.stride)
            mine = (self.writer[part] == local) & (self.fenced[part] == 0)
            self.fenced[part][mine] = self.clock[agent, local]
            self.own_fence[agent] = self.clock[agent]
        self.tick(agents)

    def tick(self, agents: np.ndarray) -> None:
        self.clock[agents, agents % self.agents] += 1

    def acquire(self, agents: np.ndarray, known: np.ndarray) -> None:
        self.clock[agents] = np.maximum(self.clock[agents], known)
