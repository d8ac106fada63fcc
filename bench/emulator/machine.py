"""Executes a kernel's grid: all threads of a batch of CTAs at once, each instruction one numpy operation.

Threads that stand at the same basic block run it together; of several blocks the first by ``ptx.ranks`` runs, so
that threads meet again where their ways join. CTAs come in the order given; results must not depend on it, nor on
how many run together, nor on which warps go first: with ``shuffle``, about half of the warps, others after every
barrier, run up to the next barrier before the rest start.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from bench.emulator import arithmetic, exchange, ptx
from bench.emulator.arithmetic import CONTAINER, Step, Values, reader
from bench.emulator.memory import Copy, Findings, GlobalMemory, SharedMemory
from bench.emulator.ptx import Instr, Kernel, PtxError

MAX_THREADS = 16384
"""Threads that are emulated together, at most (but at least one CTA)."""

_compiled: WeakKeyDictionary[Kernel, tuple[list[list[Step]], list[int]]] = WeakKeyDictionary()
"""The blocks of a kernel as functions of a machine, and their ranks."""


@dataclass(frozen=True)
class Grid:
    """What is executed, whatever the order."""

    kernel: Kernel
    arguments: dict[str, Values]
    """By parameter: numpy scalars."""
    grid: tuple[int, int, int]
    threads: int
    """In a CTA."""
    shared: int
    """Bytes of shared memory."""


class Emulator:
    """``garbage``: the byte that shared memory and registers are full of at first."""

    def __init__(
        self,
        launch: Grid,
        memory: GlobalMemory,
        findings: Findings,
        garbage: int = 0xFF,
        shuffle: np.random.Generator | None = None,
    ) -> None:
        self.launch, self.kernel, self.arguments = launch, launch.kernel, launch.arguments
        self.memory, self.findings, self.garbage, self.shuffle = memory, findings, garbage, shuffle
        self.granule = self.kernel.granule("shared")
        self._codes: np.ndarray | None = None
        self.instructions = 0
        """Executed, times threads."""
        if self.kernel not in _compiled:
            _compiled[self.kernel] = [_steps(block) for block in self.kernel.blocks], ptx.ranks(self.kernel.blocks)
        self.code, self.rank = _compiled[self.kernel]

    # ---------------------------------------------------------------- what instructions ask for

    def get(self, name: str) -> np.ndarray:
        """A register of all active threads."""
        value = self.registers.get(name)
        if value is None:  # threads that wrote it are elsewhere, or none: garbage, which nothing may depend on
            value = self.registers[name] = self._unwritten(CONTAINER[self.kernel.widths[name]])
        return value if self.active is None else value[self.active]

    def _unwritten(self, dtype: np.dtype) -> np.ndarray:
        if dtype == np.bool_:
            return np.full(self.n_all, self.garbage & 1, np.bool_)
        return np.full(self.n_all * np.dtype(dtype).itemsize, self.garbage, np.uint8).view(dtype)

    def put(self, name: str, value: Values) -> None:
        if self.active is None:
            self.registers[name] = self.spread(value)
            return
        if name not in self.registers:
            self.registers[name] = self._unwritten(value.dtype)
        self.registers[name][self.active] = value

    def spread(self, value: Values) -> np.ndarray:
        """One value per active thread."""
        return value if value.ndim else np.full(self.n, value)

    @property
    def n(self) -> int:
        """Active threads."""
        return self.n_all if self.active is None else len(self.active)

    def per_thread(self, array: np.ndarray) -> np.ndarray:
        return array if self.active is None else array[self.active]

    def special(self, name: str) -> np.ndarray:
        """%tid.x and its like."""
        kind, _, letter = name[1:].partition(".")
        axis = "xyz".index(letter or "x")
        if kind in ("laneid", "tid"):
            thread = self.per_thread(self.thread)
            return thread & 31 if kind == "laneid" else thread if axis == 0 else np.zeros(self.n, np.int64)
        if kind == "ntid":
            return np.full(self.n, self.launch.threads if axis == 0 else 1)
        if kind == "nctaid":
            return np.full(self.n, self.launch.grid[axis])
        x, y, _ = self.launch.grid
        index = self.per_thread(self.cta).astype(np.int64) - 1
        return (index % x, index // x % y, index // (x * y))[axis]

    def whole_warps(self, ins: Instr) -> None:
        """Raise PtxError if some lanes of a warp are elsewhere."""
        if self.active is not None:
            lanes = self.active.reshape(-1, 32) if len(self.active) % 32 == 0 else None
            if lanes is None or (lanes[:, 0] % 32).any() or (lanes[:, 31] - lanes[:, 0] != 31).any():
                raise PtxError(f"line {ins.line}: {ins.text} in a warp whose lanes have parted")

    def all_codes(self) -> np.ndarray:
        """What memory.py keeps of each thread: (barriers passed, warp)."""
        if self._codes is None:
            self._codes = ((self.epoch[self.slot] << 8) | (self.thread >> 5)).astype(np.int32)
        return self._codes

    def codes(self) -> np.ndarray:
        return self.per_thread(self.all_codes())

    # ---------------------------------------------------------------- execution

    def run(self, ctas: np.ndarray, batch: int | None = None) -> None:
        """``ctas``: linear numbers, in the order in which they run; ``batch``: how many at a time."""
        batch = batch or max(1, MAX_THREADS // self.launch.threads)
        with np.errstate(all="ignore"):
            for first in range(0, len(ctas), batch):
                self._run_batch(ctas[first : first + batch])

    def _run_batch(self, ctas: np.ndarray) -> None:
        count, threads = len(ctas), self.launch.threads
        self.n_all = count * threads
        self.thread = np.tile(np.arange(threads), count)
        self.slot = np.repeat(np.arange(count), threads)
        self.cta = np.repeat(ctas + 1, threads).astype(np.int32)
        self.epoch = np.ones(count, np.int64)
        self.registers: dict[str, np.ndarray] = {}
        self.shared = SharedMemory(count, self.launch.shared, self.findings, self.granule, self.garbage)
        self.groups = np.zeros(self.n_all, np.int64)  # cp.async groups committed, per thread
        self.copies: list[Copy] = []
        self.active: np.ndarray | None = None  # None: all
        self._codes = None
        self.waiting: dict[tuple[int, int, int], np.ndarray] = {}  # by (half, rank of the block, block)
        self.arrived = np.full(self.n_all, -1)  # the barrier's block, of threads that wait at one
        self.n_arrived = np.zeros(count, np.int64)
        self._set_off(0, np.arange(self.n_all))
        while self.waiting or (self.arrived >= 0).any():
            if self.waiting:
                self._run_block(min(self.waiting))
            else:
                self._release(self.n_arrived > 0, partial=True)
        if self.copies:
            self.findings.add("unfinished cp.async", None, f"{len(self.copies)} copies were never waited for")

    def _run_block(self, key: tuple[int, int, int]) -> None:
        lanes, half, at = self.waiting.pop(key), key[0], key[2]
        self.active = None if len(lanes) == self.n_all else lanes
        self.taken: bool | np.ndarray = False
        """Which of the active threads leave by the block's last instruction."""
        for step in self.code[at]:
            step(self)
        self.instructions += len(self.code[at]) * len(lanes)
        block, end = self.kernel.blocks[at], len(self.code)
        if block.barrier is not None:
            self.arrived[lanes] = at
            self.n_arrived += np.bincount(self.slot[lanes], minlength=len(self.n_arrived))
            if (self.n_arrived == self.launch.threads).any():
                self._release(self.n_arrived == self.launch.threads)
            return
        target, taken = end if block.target is None else block.target, np.broadcast_to(self.taken, lanes.shape)
        self._put(half, target, lanes[taken])
        self._put(half, at + 1, lanes[~taken])

    def _put(self, half: int, place: int, lanes: np.ndarray) -> None:
        if len(lanes) and place < len(self.code):
            key = half, self.rank[place], place
            there = self.waiting.get(key)
            self.waiting[key] = lanes if there is None else np.sort(np.concatenate((there, lanes)))

    def _set_off(self, place: int, lanes: np.ndarray) -> None:
        """Let these threads run on from a block: together, or one half of their warps after the other."""
        late = np.zeros(len(lanes), bool)
        if self.shuffle is not None:
            late = self.shuffle.integers(0, 2, self.n_all // 32).astype(bool)[lanes >> 5]
        self._put(0, place, lanes[~late])
        self._put(1, place, lanes[late])

    def _release(self, ctas: np.ndarray, partial: bool = False) -> None:
        """The barrier of these CTAs opens. ``partial``: although some of their threads never came."""
        lanes = np.flatnonzero(ctas[self.slot] & (self.arrived >= 0))
        places, one_of = self.arrived[lanes], np.zeros(len(ctas), np.int64)
        one_of[self.slot[lanes]] = places  # any one of a CTA's
        barrier = self.kernel.blocks[int(places[0])].barrier
        if partial:
            self.findings.add(
                "divergent barrier", barrier, f"{len(lanes)} threads wait, the others have left the kernel"
            )
        elif (places != one_of[self.slot[lanes]]).any():
            self.findings.add("divergent barrier", barrier, "threads of one CTA wait at different barriers")
        self.epoch[ctas] += 1
        self._codes = None
        self.arrived[lanes] = -1
        self.n_arrived[ctas] = 0
        for place in np.unique(places):
            self._set_off(int(place) + 1, lanes[places == place])


# ---------------------------------------------------------------- instructions to functions


def _steps(block: ptx.BasicBlock) -> list[Step]:
    found = []
    for ins in block.instrs:
        try:
            step = _step(ins)
        except Exception as error:
            raise PtxError(f"line {ins.line}, {ins.text}: {error}") from error
        if step is not None:
            found.append(step)
    return found


def _step(ins: Instr) -> Step | None:
    step = _leave if ins.parts[0] in ("bra", "ret", "exit") else arithmetic.build(ins) or exchange.build(ins)
    if ins.pred is None or step is None:
        return step
    read, negated = reader(ins.pred[0], "pred"), ins.pred[1]

    def run(m: Emulator) -> None:
        p = m.spread(read(m)) ^ negated
        if step is _leave:
            m.taken = p
        elif p.all():
            step(m)
        elif p.any():
            before = m.active
            m.active = np.flatnonzero(p) if before is None else before[p]
            try:
                step(m)
            finally:
                m.active = before

    return run


def _leave(m: Emulator) -> None:
    m.taken = True
