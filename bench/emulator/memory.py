"""Memory with shadow state: what may be accessed, what has been written, and who wrote and read it last.

A ``Shadow`` knows of every granule (1, 2 or 4 bytes: the smallest access in the kernel) the CTA that wrote it in this launch,
and with which code = (barrier epoch << 8) | warp; and the CTAs and codes that read it. Two accesses of which one writes
conflict if they come from different CTAs of a launch, or from different warps of one CTA with no barrier between them. Both
orders are seen (a later read finds the writer, a later write finds the readers), so the order of emulation does not matter.
Writes of the value that is there already are counted apart, as "same-value write": harmless on any GPU.

CTAs count from 1 and so do epochs: 0 in a shadow is nobody, and memory that nobody touches takes none.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.emulator.arithmetic import CONTAINER
from bench.emulator.ptx import Instr

Array = np.ndarray
Mask = np.ndarray | None
"""Booleans, or None where all are False."""

MANY = 255
"""In place of a warp, or of a CTA (as -1): several."""
_SHIFT = {1: 0, 2: 1, 4: 2, 8: 3}
_BASE = 1 << 12
_EVERYTHING: Any = (ctypes.c_uint8 * ((1 << 47) - _BASE)).from_address(_BASE)
_FLAT = {size: np.frombuffer(_EVERYTHING, dtype=CONTAINER[size]) for size in _SHIFT}
"""This process's memory as arrays of 1, 2, 4 and 8 byte integers, from address _BASE on. Index only what has been checked."""


def raw(address: int, nbytes: int) -> Array:
    """A view of memory as bytes."""
    return _FLAT[1][address - _BASE : address - _BASE + nbytes]


def zeros(count: int, dtype: Any = np.uint8) -> Array:
    """As np.zeros; large ones take address space only, and of memory the pages that are touched."""
    nbytes = count * np.dtype(dtype).itemsize
    if nbytes < 2**24:
        return np.zeros(count, dtype)
    reserve_nothing = getattr(mmap, "MAP_NORESERVE", 0x4000)  # or an overcommitting kernel counts it against its memory
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing)
    return np.frombuffer(pages, dtype, count)


def _each(at: Array, count: int) -> Array:
    """(n, count): ``count`` places from each of ``at`` on."""
    return at[:, None] + np.arange(count)


# ---------------------------------------------------------------- findings


@dataclass
class Sighting:
    kind: str
    kernel: str
    line: int
    """Line of the PTX."""
    loc: str
    """file:line:column of the Python source."""
    text: str
    detail: str
    """Where it was seen first."""
    count: int = 1

    def __str__(self) -> str:
        where = f", PTX line {self.line} [{self.text}] from {self.loc}" if self.line else ""
        return f"{self.kind}: {self.kernel}{where}: {self.detail} ({self.count} x)"


NOTES = ("same-value write", "uninitialised shared read")
"""Kinds that are no faults: several warps write one value to one place, or read what nobody uses."""


@dataclass
class Findings:
    kernel: str = ""
    """The one that runs."""
    found: dict[tuple[str, str, int], Sighting] = field(default_factory=dict)

    def add(self, kind: str, ins: Instr | None, detail: str, count: int = 1) -> None:
        line, loc, text = (ins.line, ins.loc, ins.text) if ins is not None else (0, "", "")
        known = self.found.get((kind, self.kernel, line))
        if known:
            known.count += count
        else:
            self.found[kind, self.kernel, line] = Sighting(kind, self.kernel, line, loc, text, detail, count)

    def faults(self) -> list[Sighting]:
        return [finding for finding in self.found.values() if finding.kind not in NOTES]

    def notes(self) -> list[Sighting]:
        return [finding for finding in self.found.values() if finding.kind in NOTES]


# ---------------------------------------------------------------- shadow


class Shadow:
    def __init__(self, granules: int, across_ctas: bool) -> None:
        self.wcode, self.rcode = zeros(granules, np.int32), zeros(granules, np.int32)
        self.across = across_ctas
        if across_ctas:
            self.wcta, self.rcta = zeros(granules, np.int32), zeros(granules, np.int32)

    def read(self, at: Array, cta: Any, code: Array) -> tuple[Mask, Mask]:
        """Where reads conflict with writes of other CTAs, and of other warps."""
        wcode, old = self.wcode[at], self.rcode[at]
        across, mine = None, True
        several = (old >> 8 == code >> 8) & (old != code)
        new = np.where(several, code | MANY, code)
        if self.across:
            wcta, rcta = self.wcta[at], self.rcta[at]
            across, mine = (wcta != 0) & (wcta != cta), wcta == cta
            new = np.where(rcta == cta, new, code)
            readers = np.where((rcta == 0) | (rcta == cta), cta, -1)
            self.rcta[at] = readers
            self.rcta[at[self.rcta[at] != readers]] = -1
        within = (wcode >> 8 == code >> 8) & (wcode != code) & mine
        self.rcode[at] = new
        lost = self.rcode[at] != new
        self.rcode[at[lost]] = new[lost] | MANY
        return _any(across), _any(within)

    def write(self, at: Array, cta: Any, code: Array) -> list[tuple[Mask, bool, str]]:
        """Where writes conflict: (mask, with another CTA, how), for each of ``HOW``."""
        wcode, rcode = self.wcode[at], self.rcode[at]
        written = (wcode >> 8 == code >> 8) & (wcode != code)
        read = (rcode >> 8 == code >> 8) & (rcode != code)
        self.wcode[at] = code
        beside = self.wcode[at] != code  # another thread of this very instruction came later
        across: list[Mask] = [None, None, None]
        if self.across:
            wcta, rcta = self.wcta[at], self.rcta[at]
            written, read = written & (wcta == cta), read & (rcta == cta)
            self.wcta[at] = cta
            elsewhere = self.wcta[at] != cta
            beside = beside & ~elsewhere
            across = [_any((wcta != 0) & (wcta != cta)), _any((rcta != 0) & (rcta != cta)), _any(elsewhere)]
        within = [_any(written), _any(read), _any(beside)]
        return [
            (mask, other, how) for masks, other in ((across, True), (within, False)) for mask, how in zip(masks, HOW)
        ]


HOW = ("write over another's write", "write over what another read", "two writes at once")


def _any(mask: Array | None) -> Mask:
    return mask if mask is not None and mask.any() else None


# ---------------------------------------------------------------- global memory


class Storage:
    """The memory of one tensor storage in one launch. ``init``: 1 per written byte (unwritten.py keeps it from launch to
    launch), or None where that is not known."""

    def __init__(self, base: int, nbytes: int, init: Array | None, name: str) -> None:
        self.base, self.nbytes, self.init, self.name = base, nbytes, init, name
        self.shadow: Shadow | None = None
        self.written = False


Span = tuple[int, int, Storage]
"""(start, end, storage): the extent of a tensor that the kernel was given."""


class GlobalMemory:
    """What one execution of a grid may access."""

    def __init__(self, spans: list[Span], findings: Findings, granule: int) -> None:
        merged: list[Span] = []
        for start, end, storage in sorted(spans, key=lambda span: span[:2]):
            if merged and start <= merged[-1][1] and merged[-1][2] is storage:
                merged[-1] = merged[-1][0], max(merged[-1][1], end), storage
            else:
                merged.append((start, end, storage))
        self.spans, self.findings = merged, findings
        self.starts = [start for start, _, _ in merged]
        self.start_array, self.end_array = (np.array([span[i] for span in merged], np.int64) for i in (0, 1))
        self.granule, self.shift = granule, _SHIFT[granule]
        self.journal: list[tuple[int, Array, Array]] = []
        """(bytes of an element, places in _FLAT, what was there) of every store."""
        for _, _, storage in merged:
            storage.shadow = Shadow((storage.nbytes >> self.shift) + 1, True)

    def _locate(self, address: Array, nbytes: int, ins: Instr, what: str) -> Iterator[tuple[Storage, Any]]:
        """(storage, lanes) for each storage that is accessed. Faulty lanes are reported and left out."""
        if address.size == 0:
            return
        misaligned = address & (nbytes - 1) != 0
        if misaligned.any():
            detail = f"address {int(address[misaligned][0]):#x} of {nbytes} bytes"
            self.findings.add("misaligned", ins, detail, int(misaligned.sum()))
        low, high = int(address.min()), int(address.max())
        i = bisect.bisect_right(self.starts, low) - 1
        if i >= 0 and high + nbytes <= self.spans[i][1]:
            yield self.spans[i][2], slice(None)
            return
        which = np.searchsorted(self.start_array, address, side="right") - 1
        fine = (which >= 0) & (address + nbytes <= self.end_array[np.maximum(which, 0)])
        if not fine.all():
            self._report_outside(address[~fine], nbytes, ins, what)
        for j in np.unique(which[fine]):
            yield self.spans[j][2], np.flatnonzero(fine & (which == j))

    def _report_outside(self, address: Array, nbytes: int, ins: Instr, what: str) -> None:
        first = int(address[0])
        inside = any(s.base <= first and first + nbytes <= s.base + s.nbytes for _, _, s in self.spans)
        nearest = min(self.spans, key=lambda span: min(abs(first - span[0]), abs(first - span[1])), default=None)
        where = f"address {first:#x}"
        if nearest is not None:
            start, end, storage = nearest
            where = f"offset {first - start:,} of {storage.name} of {end - start:,} bytes"
        kind = "outside of the view" if inside else "out of bounds"
        self.findings.add(kind, ins, f"{what} of {nbytes} bytes at {where}", len(address))

    def _granules(self, storage: Storage, address: Array, nbytes: int, cta: Array, code: Array) -> tuple[Array, ...]:
        each = max(nbytes >> self.shift, 1)
        at = (address - storage.base) >> self.shift
        return (
            (at, cta, code) if each == 1 else (_each(at, each).reshape(-1), np.repeat(cta, each), np.repeat(code, each))
        )

    def _conflict(self, across: bool, how: str, mask: Mask, storage: Storage, at: Array, ins: Instr, who: Any) -> None:
        if mask is None or not mask.any():
            return
        i, (cta, code) = int(np.flatnonzero(mask)[0]), who
        detail = (
            f"{how}: {storage.name} at byte {int(at[i]) << self.shift}, CTA {int(cta[i]) - 1} warp {int(code[i]) & 255}"
        )
        self.findings.add("race between CTAs" if across else "race between warps", ins, detail, int(mask.sum()))

    def load(self, ins: Instr, address: Array, size: int, count: int, cta: Array, code: Array) -> Array:
        """(threads, count) integers of ``size`` bytes. ``address``: int64."""
        out = np.full((len(address), count), np.iinfo(CONTAINER[size]).max, CONTAINER[size])
        for storage, lanes in self._locate(address, size * count, ins, "read"):
            where = address[lanes]
            out[lanes] = _FLAT[size][_each((where - _BASE) >> _SHIFT[size], count)]
            self._check_written(storage, where, size, count, ins)
            assert storage.shadow is not None
            at, *who = self._granules(storage, where, size * count, cta[lanes], code[lanes])
            across, within = storage.shadow.read(at, *who)
            self._conflict(True, "read of what another wrote", across, storage, at, ins, who)
            self._conflict(False, "read of what another wrote", within, storage, at, ins, who)
        return out

    def _check_written(self, storage: Storage, address: Array, size: int, count: int, ins: Instr) -> None:
        if storage.init is None:
            return
        at = _each((address - storage.base) >> _SHIFT[size], count)
        written = (storage.init.view(CONTAINER[size])[at] == all_ones(size)).all(axis=1)
        if not written.all():
            detail = (
                f"{storage.name} at byte {int(address[~written][0]) - storage.base}, allocated empty and never written"
            )
            self.findings.add("uninitialised read", ins, detail, int((~written).sum()))

    def store(self, ins: Instr, address: Array, values: Array, size: int, cta: Array, code: Array) -> None:
        """values (threads, count)."""
        count, flat = values.shape[1], _FLAT[size]
        for storage, lanes in self._locate(address, size * count, ins, "write"):
            where, data = address[lanes], values[lanes]
            at = _each((where - _BASE) >> _SHIFT[size], count)
            before = flat[at]
            flat[at] = data
            same, lasting = before == data, flat[at] == data  # not lasting: a later thread wrote something else
            self.journal.append((size, at.reshape(-1), before.reshape(-1)))
            storage.written = True
            if storage.init is not None:
                view = storage.init.view(CONTAINER[size])
                view[_each((where - storage.base) >> _SHIFT[size], count)] = all_ones(size)
            if not lasting.all():
                byte = int(where[~lasting.all(1)][0]) - storage.base
                detail = f"two threads of one instruction write different values to {storage.name} at byte {byte}"
                self.findings.add("conflicting store", ins, detail, int((~lasting).sum()))
            assert storage.shadow is not None
            g, *who = self._granules(storage, where, size * count, cta[lanes], code[lanes])
            each = len(g) // same.size
            equal = dict(zip(HOW, (same, None, lasting)))
            for mask, across, how in storage.shadow.write(g, *who):
                alike = equal[how]
                if mask is not None and alike is not None:
                    alike = np.repeat(alike.reshape(-1), each)
                    if (mask & alike).any():
                        self.findings.add("same-value write", ins, storage.name, int((mask & alike).sum()))
                    mask = mask & ~alike
                self._conflict(across, how, mask, storage, g, ins, who)

    def written(self) -> tuple[Array, Array]:
        """Every granule that was written, in order, and what is there now."""
        storages = {storage.base: storage for _, _, storage in self.spans if storage.written}
        places = [
            np.flatnonzero(storage.shadow.wcta) + (storage.base - _BASE >> self.shift)
            for storage in storages.values()
            if storage.shadow is not None
        ]
        at = np.concatenate(places) if places else np.zeros(0, np.int64)
        return at, _FLAT[self.granule][at]

    def undo(self) -> None:
        """Put back what was there before."""
        for size, at, before in reversed(self.journal):
            _FLAT[size][at] = before

    def name_of(self, place: int) -> str:
        """The index of a granule among those of ``written``."""
        address = (place << self.shift) + _BASE
        _, _, storage = self.spans[bisect.bisect_right(self.starts, address) - 1]
        return f"{storage.name} at byte {address - storage.base}"


def all_ones(size: int) -> int:
    return int.from_bytes(b"\1" * size, "little")


# ---------------------------------------------------------------- shared memory


@dataclass
class Copy:
    """A cp.async that some threads have begun and not yet waited for."""

    threads: Array
    group: Array
    """How many groups each of them had committed before it."""
    address: Array
    data: Array
    """(threads, bytes) uint8."""
    slot: Array

    def part(self, chosen: Array) -> Copy:
        return Copy(
            self.threads[chosen], self.group[chosen], self.address[chosen], self.data[chosen], self.slot[chosen]
        )


class SharedMemory:
    """The shared memory of a batch of CTAs, side by side. Full of ``garbage`` at first: results must not depend on
    it. ``slot``: the place of a
    thread's CTA in the batch."""

    def __init__(self, ctas: int, nbytes: int, findings: Findings, granule: int, garbage: int) -> None:
        self.nbytes, self.pitch = nbytes, -(-max(nbytes, 16) // 16) * 16
        content = np.full(ctas * self.pitch, garbage, np.uint8)
        self.view = {size: content.view(CONTAINER[size]) for size in _SHIFT}
        self.findings, self.shift = findings, _SHIFT[granule]
        granules = ctas * self.pitch >> self.shift
        self.shadow = Shadow(granules, False)
        self.init = np.zeros(granules, bool)
        self.pending = np.zeros(granules, np.int16)
        """Copies by cp.async on their way here, that nobody has waited for."""

    def _fine(self, ins: Instr, address: Array, nbytes: int) -> Any:
        """The lanes that may access what they want to; others are reported."""
        inside = (address >= 0) & (address + nbytes <= self.nbytes)
        fine = inside & (address & (nbytes - 1) == 0)
        if fine.all():
            return slice(None)
        kind = "misaligned" if inside[~fine][0] else "out of bounds"
        detail = f"shared memory at {int(address[~fine][0])}, {nbytes} bytes, of {self.nbytes}"
        self.findings.add(kind, ins, detail, int((~fine).sum()))
        return np.flatnonzero(fine)

    def _at(self, address: Array, slot: Array, size: int, count: int) -> Array:
        return _each((slot * self.pitch + address) >> _SHIFT[size], count)

    def _granules(self, address: Array, slot: Array, nbytes: int, code: Array) -> tuple[Array, Array]:
        each = max(nbytes >> self.shift, 1)
        return _each((slot * self.pitch + address) >> self.shift, each).reshape(-1), np.repeat(code, each)

    def _race(self, what: str, mask: Mask, at: Array, ins: Instr, code: Array) -> None:
        if mask is None or not mask.any():
            return
        i = int(np.flatnonzero(mask)[0])
        byte = (int(at[i]) << self.shift) % self.pitch
        detail = f"{what}: shared memory at byte {byte}, warp {int(code[i]) & 255}"
        self.findings.add("shared race", ins, detail, int(mask.sum()))

    def load(self, ins: Instr, address: Array, size: int, count: int, slot: Array, code: Array) -> Array:
        """(threads, count) integers of ``size`` bytes."""
        fine = self._fine(ins, address, size * count)
        out = np.full((len(address), count), np.iinfo(CONTAINER[size]).max, CONTAINER[size])
        address, slot = address[fine], slot[fine]
        out[fine] = self.view[size][self._at(address, slot, size, count)]
        at, code = self._granules(address, slot, size * count, code[fine])
        _, within = self.shadow.read(at, None, code)
        self._race("read of what another warp wrote, with no barrier between", within, at, ins, code)
        self._race("read of what a cp.async, not waited for, writes", self.pending[at] > 0, at, ins, code)
        never = ~self.init[at]
        if never.any():
            self.findings.add("uninitialised shared read", ins, "never written", int(never.sum()))
        return out

    def store(self, ins: Instr, address: Array, values: Array, size: int, slot: Array, code: Array) -> None:
        """values (threads, count)."""
        fine, count, view = self._fine(ins, address, size * values.shape[1]), values.shape[1], self.view[size]
        address, slot, values = address[fine], slot[fine], values[fine]
        at = self._at(address, slot, size, count)
        same = view[at] == values
        view[at] = values
        lasting = view[at] == values
        if not lasting.all():
            place = int(address[~lasting.all(1)][0])
            detail = f"two threads of one instruction write different values to shared memory at byte {place}"
            self.findings.add("conflicting store", ins, detail, int((~lasting).sum()))
        g, code = self._granules(address, slot, size * count, code[fine])
        self._note_write(ins, g, code, same, lasting)
        self.init[g] = True

    def _note_write(self, ins: Instr, at: Array, code: Array, same: Mask = None, lasting: Mask = None) -> None:
        """``same``, ``lasting``: where the value was there before, and where it is there now; None of both: not known."""
        equal = dict(zip(HOW, (same, None, lasting)))
        for mask, _, how in self.shadow.write(at, None, code):
            alike = equal[how]
            if mask is not None and alike is not None:
                alike = np.repeat(alike.reshape(-1), len(at) // alike.size)
                if (mask & alike).any():
                    self.findings.add("same-value write", ins, "shared memory", int((mask & alike).sum()))
                mask = mask & ~alike
            self._race(f"{how.replace('another', 'another warp', 1)}, with no barrier between", mask, at, ins, code)
        self._race("write over what a cp.async, not waited for, writes", self.pending[at] > 0, at, ins, code)

    # ---- cp.async: data lands when its thread waits; to others it is visible after the next barrier

    def begin(self, ins: Instr, copy: Copy, code: Array) -> Copy:
        """Returns what of the copy may be done."""
        fine = self._fine(ins, copy.address, copy.data.shape[1])
        copy = copy.part(fine)
        at, repeated = self._granules(copy.address, copy.slot, copy.data.shape[1], code[fine])
        self._note_write(
            ins, at, repeated
        )  # it may land at once: it conflicts with what others did since the last barrier
        self.pending[at] += 1
        return copy

    def end(self, copy: Copy, code: Array) -> None:
        """``copy`` has landed: it counts as written now, with ``code``."""
        nbytes = copy.data.shape[1]
        word = min(nbytes, 8)
        data = np.ascontiguousarray(copy.data).view(CONTAINER[word])
        self.view[word][self._at(copy.address, copy.slot, word, nbytes // word)] = data
        at, repeated = self._granules(copy.address, copy.slot, nbytes, code)
        self.pending[at] -= 1
        self.shadow.wcode[at] = repeated
        self.init[at] = True
