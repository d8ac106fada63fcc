"""Instructions through which threads reach memory and each other: each becomes a function of the machine.

Those that need a whole warp (shuffles, votes, mma, ldmatrix) raise PtxError in one whose lanes have parted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.emulator import tensor_cores
from bench.emulator.arithmetic import CONTAINER, KIND, Step, Values, reader, writer
from bench.emulator.memory import Copy
from bench.emulator.ptx import SHARED, WIDTH, Imm, Instr, Mem, Operand, PtxError, Reg, Symbol, TwoResults, items

_HINTS = frozenset((
    *("nc", "evict_first", "evict_last", "evict_normal", "no_allocate", "cache_hint", "ca", "cg", "cs", "cv", "wb", "wt"),
    *("lu", "L2::cache_hint", "L1::evict_last", "L1::evict_first", "L1::no_allocate", "L1::evict_unchanged", "L1", "L2"),
    *("L2::128B", "L2::256B", "weak", "relaxed", "gpu", "cta", "sys"),
))  # fmt: skip
"""Modifiers that change no value."""


def build(ins: Instr) -> Step | None:
    """A function of the machine; None if there is nothing to do. Raises PtxError for an instruction that is not known."""
    builder = _BUILDERS.get(ins.parts[0])
    if builder is None:
        raise PtxError("unknown instruction")
    return builder(ins)


# ---------------------------------------------------------------- loads and stores


def _address(operand: Operand) -> Callable[[Any], Values]:
    """int64 addresses, of shared memory from 0 on."""
    base = operand.base if isinstance(operand, Mem) else None
    if not isinstance(operand, Mem):
        raise PtxError(f"address {operand}")
    offset = np.int64(operand.offset)
    if isinstance(base, Reg):
        name = base.name
        if base.width == 8:
            return lambda m: m.get(name).view(np.int64) + offset
        return lambda m: m.get(name).astype(np.int64) + offset
    if isinstance(base, Symbol) and base.name == SHARED:
        value = np.int64(base.offset) + offset
        return lambda m: np.full(m.n, value)
    raise PtxError(f"address {operand}")


def _space(ins: Instr, parts: int) -> str:
    """The memory space. Raises PtxError for a modifier that is not known, and if there are not ``parts`` operands."""
    spaces = [part for part in ins.parts[1:-1] if part in ("global", "shared", "param")]
    unknown = set(ins.parts[1:-1]) - _HINTS - {*spaces, "v2", "v4", "v8"}
    count = next((int(part[1]) for part in ins.parts if part in ("v2", "v4", "v8")), 1)
    if len(spaces) != 1 or unknown or count != parts:
        raise PtxError(f"{', '.join(sorted(unknown)) or 'memory space'} of {ins.op}")
    return spaces[0]


def _ld(ins: Instr) -> Step:
    writes, kind = [writer(dest) for dest in items(ins.args[0])], ins.parts[-1]
    space, size, count = _space(ins, len(writes)), WIDTH[kind], len(writes)
    if space == "param":
        return _ld_param(ins, kind)
    address = _address(ins.args[1])

    def load(m: Any) -> None:
        memory, whose = (m.memory, m.cta) if space == "global" else (m.shared, m.slot)
        found = memory.load(ins, m.spread(address(m)), size, count, m.per_thread(whose), m.codes())
        for i, write in enumerate(writes):
            write(m, np.ascontiguousarray(found[:, i]).view(KIND[kind]))

    return load


def _ld_param(ins: Instr, kind: str) -> Step:
    mem, write = ins.args[1], writer(ins.args[0])
    if not isinstance(mem, Mem) or mem.offset or not isinstance(mem.base, Symbol):
        raise PtxError(ins.text)
    name = mem.base.name

    def load(m: Any) -> None:
        value = m.arguments[name]
        if value.dtype.itemsize != WIDTH[kind]:
            raise PtxError(f"parameter {name} of {value.dtype.itemsize} bytes read as {kind}")
        write(m, np.asarray(value).view(CONTAINER[WIDTH[kind]]).view(KIND[kind]))

    return load


def _st(ins: Instr) -> Step:
    size = WIDTH[ins.parts[-1]]
    reads, address = [reader(source, f"b{8 * size}") for source in items(ins.args[1])], _address(ins.args[0])
    space = _space(ins, len(reads))

    def store(m: Any) -> None:
        memory, whose = (m.memory, m.cta) if space == "global" else (m.shared, m.slot)
        values = np.stack([m.spread(read(m)) for read in reads], axis=1)
        memory.store(ins, m.spread(address(m)), values, size, m.per_thread(whose), m.codes())

    return store


# ---------------------------------------------------------------- matrices


def _matrices(ins: Instr) -> tuple[int, bool]:
    """How many, and whether they are transposed on the way."""
    if "m8n8" not in ins.parts or ins.parts[-1] != "b16":
        raise PtxError(ins.op)
    return int(next(part for part in ins.parts if part in ("x1", "x2", "x4"))[1]), "trans" in ins.parts


def _rows(m: Any, ins: Instr, address: Callable, matrices: int) -> tuple[np.ndarray, ...]:
    """(address, slot, code) of the rows: the first lanes of a warp name them."""
    m.whole_warps(ins)
    where, *who = (
        x.reshape(-1, 32)[:, : 8 * matrices].reshape(-1)
        for x in (m.spread(address(m)), m.per_thread(m.slot), m.codes())
    )
    misaligned = where & 15 != 0
    if misaligned.any():
        detail = f"row of a matrix at {int(where[misaligned][0])} of shared memory"
        m.findings.add("misaligned", ins, detail, int(misaligned.sum()))
    return where, *who


def _ldmatrix(ins: Instr) -> Step:
    (matrices, transposed), address = _matrices(ins), _address(ins.args[1])
    writes = [writer(dest) for dest in items(ins.args[0])]

    def run(m: Any) -> None:
        where, slot, code = _rows(m, ins, address, matrices)
        found = m.shared.load(ins, where, 8, 2, slot, code).view(np.uint16).reshape(-1, matrices, 8, 8)
        for write, value in zip(writes, tensor_cores.ldmatrix(found, transposed)):
            write(m, value)

    return run


def _stmatrix(ins: Instr) -> Step:
    (matrices, transposed), address = _matrices(ins), _address(ins.args[0])
    reads = [reader(source, "b32") for source in items(ins.args[1])]

    def run(m: Any) -> None:
        where, slot, code = _rows(m, ins, address, matrices)
        rows = tensor_cores.stmatrix([m.spread(read(m)) for read in reads], transposed)
        m.shared.store(ins, where, np.ascontiguousarray(rows).reshape(-1, 8).view(np.uint32), 4, slot, code)

    return run


def _mma(ins: Instr) -> Step:
    # mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
    _, *form, d_kind, a_kind, b_kind, c_kind = ins.parts
    shape = form[2]
    if [*form[:2], *form[3:]] != ["sync", "aligned", "row", "col"] or d_kind != c_kind:
        raise PtxError(ins.op)
    tensor_cores.check(shape, a_kind, b_kind, d_kind)
    writes = [writer(dest) for dest in items(ins.args[0])]
    fragments = [[reader(register, "b32") for register in items(operand)] for operand in ins.args[1:4]]

    def run(m: Any) -> None:
        m.whole_warps(ins)
        values = [[m.spread(read(m)) for read in fragment] for fragment in fragments]
        for write, value in zip(writes, tensor_cores.mma(shape, a_kind, b_kind, d_kind, *values)):
            write(m, value)

    return run


# ---------------------------------------------------------------- within a warp


def _shfl(ins: Instr) -> Step:
    mode, dest = ins.parts[2], ins.args[0]
    if ins.parts[1] != "sync" or ins.parts[-1] != "b32" or mode not in ("up", "down", "bfly", "idx"):
        raise PtxError(ins.op)
    write, flag = (writer(dest.first), writer(dest.second)) if isinstance(dest, TwoResults) else (writer(dest), None)
    a, b, c, mask = (reader(x, "u32") for x in ins.args[1:5])

    def run(m: Any) -> None:
        m.whole_warps(ins)
        if (m.spread(mask(m)) != 0xFFFFFFFF).any():
            raise PtxError("a mask that leaves lanes out")
        x, by, bounds = (m.spread(read(m)).reshape(-1, 32) for read in (a, b, c))
        by, bounds, lane = by.astype(np.int64) & 31, bounds.astype(np.int64), np.arange(32)
        clamp, segment = bounds & 31, bounds >> 8 & 31
        least = lane & segment
        most = least | (clamp & ~segment & 31)
        source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": least | (by & ~segment & 31)}[mode]
        valid = source >= most if mode == "up" else source <= most
        write(m, np.take_along_axis(x, np.where(valid, source, lane), axis=1).reshape(-1))
        if flag:
            flag(m, valid.reshape(-1))

    return run


_REDUX = {
    "min": np.minimum,
    "max": np.maximum,
    "add": np.add,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def _redux(ins: Instr) -> Step:
    _, _, what, kind = ins.parts
    read, write, function = reader(ins.args[1], kind), writer(ins.args[0]), _REDUX[what]

    def run(m: Any) -> None:
        m.whole_warps(ins)
        found = function.reduce(m.spread(read(m)).reshape(-1, 32), axis=1)
        write(m, np.repeat(found, 32).astype(KIND[kind]))

    return run


def _vote(ins: Instr) -> Step:
    mode, read, write = ins.parts[2], reader(ins.args[1], "pred"), writer(ins.args[0])
    if ins.parts[1] != "sync" or mode not in ("any", "all", "uni", "ballot"):
        raise PtxError(ins.op)

    def run(m: Any) -> None:
        m.whole_warps(ins)
        p = m.spread(read(m)).reshape(-1, 32)
        if mode == "ballot":
            found = (p.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)
        else:
            found = {"any": p.any(1), "all": p.all(1), "uni": p.all(1) | ~p.any(1)}[mode]
        write(m, np.repeat(found, 32))

    return run


def _bar(ins: Instr) -> Step:
    one = [*ins.parts[1:]] == ["sync"] and len(ins.args) == 1 and isinstance(ins.args[0], Imm)
    if not one and ins.parts[1:] != ["warp", "sync"]:
        raise PtxError("a named barrier" if ins.parts[1] == "sync" else ins.op)
    return lambda m: m.whole_warps(ins)  # the machine does the rest


# ---------------------------------------------------------------- cp.async


def _cp(ins: Instr) -> Step:
    if ins.parts[1] != "async":
        raise PtxError(ins.op)
    what, args = ins.parts[2], [arg.text for arg in ins.args if isinstance(arg, Imm)]
    if what == "commit_group":
        return _commit
    if what in ("wait_group", "wait_all"):
        outstanding = int(args[0]) if what == "wait_group" else None
        return lambda m: _wait(m, outstanding)
    if what not in ("ca", "cg"):
        raise PtxError(ins.op)
    to, source, nbytes = _address(ins.args[0]), _address(ins.args[1]), int(args[0], 0)
    taken = reader(ins.args[3], "u32") if len(ins.args) > 3 else None

    def copy(m: Any) -> None:
        where, data = m.spread(source(m)), np.zeros((m.n, nbytes), np.uint8)
        used = np.full(m.n, nbytes) if taken is None else m.spread(taken(m)).astype(np.int64)
        if (used > nbytes).any():
            m.findings.add("out of bounds", ins, "cp.async reads more than it writes")
        if (where[used > 0] & (nbytes - 1)).any():
            m.findings.add("misaligned", ins, f"cp.async of {nbytes} bytes")
        for size in np.unique(used[used > 0]):
            lanes = np.flatnonzero(used == size)
            word = 4 if size % 4 == 0 else 1
            who = m.per_thread(m.cta)[lanes], m.codes()[lanes]
            found = m.memory.load(ins, where[lanes], word, int(size) // word, *who)
            data[lanes, : int(size)] = found.view(np.uint8).reshape(len(lanes), -1)
        threads = np.arange(m.n_all) if m.active is None else m.active
        begun = Copy(threads, m.groups[threads], m.spread(to(m)), data, m.per_thread(m.slot))
        m.copies.append(m.shared.begin(ins, begun, m.codes()))

    return copy


def _commit(m: Any) -> None:
    m.groups[slice(None) if m.active is None else m.active] += 1


def _wait(m: Any, outstanding: int | None) -> None:
    """Until at most so many of a thread's groups are on their way; None: until no copy is, committed or not."""
    here = np.zeros(m.n_all, bool)
    here[slice(None) if m.active is None else m.active] = True
    codes, left = m.all_codes(), []
    for copy in m.copies:
        done = here[copy.threads]
        if outstanding is not None:
            done &= copy.group < m.groups[copy.threads] - outstanding
        if done.any():
            m.shared.end(copy.part(done), codes[copy.threads[done]])
        if not done.all():
            left.append(copy.part(~done))
    m.copies = left


# ---------------------------------------------------------------- the rest


def _trap(ins: Instr) -> Step:
    def run(m: Any) -> None:
        m.findings.add("trap", ins, f"{m.n} threads")
        m.taken = True

    return run


def _createpolicy(ins: Instr) -> Step:
    write = writer(ins.args[0])
    return lambda m: write(m, np.uint64(0))


_BUILDERS: dict[str, Callable[[Instr], Step | None]] = {
    **{"ld": _ld, "st": _st, "ldmatrix": _ldmatrix, "stmatrix": _stmatrix, "mma": _mma, "shfl": _shfl, "redux": _redux},
    **{"vote": _vote, "bar": _bar, "cp": _cp, "createpolicy": _createpolicy, "trap": _trap},
    **dict.fromkeys(("membar", "fence", "prefetch"), lambda ins: None),  # no value depends on them here
}
