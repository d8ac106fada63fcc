"""What the compiler made of a kernel: registers, spills, shared memory and occupancy, and the instructions it runs.

Read from the cubin with ``cuobjdump`` and ``nvdisasm``, which triton's wheel carries: no GPU and no CUDA toolkit needed.
"""

from __future__ import annotations

import functools
import os
import re
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from bench.compiler.capture import CapturedLaunch
from fastgpt.hardware.cards import ARCHS


@dataclass(frozen=True)
class Resources:
    """What one block of a kernel takes. Bytes, except registers (32-bit, per thread) and warps."""

    registers: int
    stack: int
    """Local memory per thread. Kernels declare no local arrays, so all of it is spilled registers."""
    static_shared: int
    dynamic_shared: int
    warps: int

    @property
    def shared(self) -> int:
        return self.static_shared + self.dynamic_shared


@functools.lru_cache(maxsize=4096)
def tool(name: str, cubin: bytes, *args: str) -> str:
    """Output of one of the binary tools in triton's wheel."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    # Closed before the tool opens it: Windows allows one opener at a time.
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(cubin)
    try:
        return subprocess.run([path, *args, file.name], capture_output=True, text=True, check=True).stdout
    finally:
        os.unlink(file.name)


def resources(compiled: Any) -> Resources:
    """Registers, spills and shared memory of a compiled kernel, from its cubin."""
    usage = tool("cuobjdump", compiled.asm["cubin"], "-res-usage")

    def figure(name: str) -> int:
        found = re.search(rf"\b{name}:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump -res-usage names no {name}:\n{usage}")
        return int(found[1])

    metadata = compiled.metadata
    # Cubins for sm_90 and later count the 1 KiB that every block gives to the system; earlier ones do not.
    reserved = 1024 if metadata.target.arch >= 90 else 0
    return Resources(
        registers=figure("REG"),
        stack=figure("STACK") + figure("LOCAL"),
        static_shared=max(figure("SHARED") - reserved, 0),
        dynamic_shared=metadata.shared,
        warps=metadata.num_warps,
    )


@dataclass(frozen=True)
class Occupancy:
    blocks: int
    """Resident blocks per SM; 0 if one does not fit."""
    limiter: str
    """What keeps it from more: "registers", "shared", "warps" or "blocks"."""
    warps: int

    @property
    def fits(self) -> bool:
        return self.blocks > 0


def occupancy(used: Resources, arch: int) -> Occupancy:
    """Resident blocks per SM of sm_``arch``, as CUDA's occupancy calculator counts them for compute capability >= 8.0.

    Registers are handed out per warp in units of 256, to warps in groups of 4 (one per sub-partition); shared memory in
    units of 128 bytes plus 1 KiB per block that the system keeps. The limits of an SM are hardware.ARCHS'. Raises
    ValueError for an unknown architecture.
    """
    if f"sm_{arch}" not in ARCHS:
        raise ValueError(f"arch is {arch}: the limits of {', '.join(ARCHS)} are known")
    limit = ARCHS[f"sm_{arch}"]
    registers_per_warp = _round_up(used.registers * 32, 256)
    warps_by_registers = limit.registers // registers_per_warp // 4 * 4
    fits_block = used.shared <= limit.shared_per_block
    candidates = {
        "registers": warps_by_registers // used.warps,
        "shared": limit.shared_per_sm // _round_up(used.shared + 1024, 128) if fits_block else 0,
        "warps": limit.max_warps // used.warps,
        "blocks": limit.max_blocks,
    }
    limiter = min(candidates, key=candidates.__getitem__)
    return Occupancy(candidates[limiter], limiter, candidates[limiter] * used.warps)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


# ---------------------------------------------------------------- what the binary runs

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", re.MULTILINE)
_counted: dict[str, Counter[str]] = {}  # by triton's hash


def sass(compiled: Any) -> Counter[str]:
    """How often each machine instruction stands in the kernel, with its modifiers: ``{"LDG.E.128": 8, ...}``."""
    disassemble([compiled])
    return _counted[compiled.hash]


def disassemble(kernels: Iterable[Any]) -> None:
    """Have ``sass`` ready of many compiled kernels. nvdisasm takes 0.3 s to start and next to nothing per kernel, so the code
    of all goes through it as one."""
    missing = {kernel.hash: kernel for kernel in kernels if kernel.hash not in _counted}.values()
    for arch in {kernel.metadata.target.arch for kernel in missing}:
        ends, code = [], b""
        for kernel in (of_arch := [kernel for kernel in missing if kernel.metadata.target.arch == arch]):
            code += _machine_code(kernel.asm["cubin"])
            ends.append(len(code))
            _counted[kernel.hash] = Counter()
        listing = tool("nvdisasm", code, "--binary", f"SM{arch}a" if arch >= 90 else f"SM{arch}")
        for at, name in _INSTRUCTION.findall(listing):
            _counted[of_arch[bisect_right(ends, int(at, 16))].hash][name] += 1


def _machine_code(cubin: bytes) -> bytes:
    """The instructions in a cubin: the .text sections of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, number, name_section = struct.unpack_from("<3H", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(number)]
    names = cubin[sections[name_section][4] :]
    code = [cubin[at : at + length] for name, _, _, _, at, length in sections if names[name:].startswith(b".text.")]
    return b"".join(code)


def count(ops: Counter[str], *names: str) -> int:
    """Instructions with one of these base names, whatever their modifiers: ``count(ops, "HMMA", "HGMMA")``."""
    return sum(number for op, number in ops.items() if op.split(".")[0] in names)


TENSOR_CORE = ("HMMA", "HGMMA", "QMMA", "QGMMA", "IMMA", "IGMMA", "DMMA")
"""Tensor-core instructions: 16-bit and tf32 (H), fp8 (Q), int8 (I), fp64 (D); with G, a warp group's of sm_90."""


def tensor_core(ops: Counter[str]) -> dict[str, int]:
    """The tensor-core instructions among them, by kind: ``{"HMMA.16816.F32.BF16": 64}``, most frequent first."""
    return {op: number for op, number in ops.most_common() if op.split(".")[0] in TENSOR_CORE}


def dots(compiled: Any) -> tuple[int, int]:
    """How many ``tl.dot`` the kernel has, and how many of them tensor cores must compute: all but those in true fp32
    (``input_precision="ieee"``) or fp64, which tensor cores would round or do not know on every chip."""
    found = re.findall(r"^.*\btt\.dot(?:_scaled)? .*$", compiled.asm["ttir"], re.MULTILINE)
    exact = [dot for dot in found if re.search(r": tensor<[0-9x]+f(32|64)>", dot) and "inputPrecision" not in dot]
    return len(found), len(found) - len(exact)


def access_widths(ops: Counter[str], *names: str) -> dict[int, int]:
    """Global-memory instructions by the bits that each thread moves: {128: 12, 32: 2}. ``names``: default all three,
    LDG, STG and LDGSTS."""
    widths: Counter[int] = Counter()
    for op, number in ops.items():
        base, *modifiers = op.split(".")
        if base in (names or ("LDG", "STG", "LDGSTS")):
            sizes = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
            widths[next((sizes[m] for m in modifiers if m in sizes), 32)] += number
    return dict(widths)


# ---------------------------------------------------------------- the figures


@dataclass(frozen=True)
class Row:
    """The figures of one binary, launched with one grid, as plain values."""

    case: str
    module: str
    kernel: str
    dtype: str
    config: str
    arch: int
    grid: list[int]
    launches: int
    """How often this binary was launched with this grid."""
    registers: int
    stack: int
    """Bytes of local memory per thread: spilled registers."""
    spill_loads: int
    spill_stores: int
    """LDL and STL instructions."""
    shared: int
    warps: int
    fp_fusion: bool
    """Whether a product and the sum that it goes into are rounded once."""
    blocks_per_sm: int
    limiter: str
    dots: int
    """tl.dot operations in the kernel, as compiled; of these, ``tensor_dots`` are tensor cores' (see cubin.dots)."""
    tensor_dots: int
    tensor_core: dict[str, int]
    """Tensor-core instructions by kind."""
    wide_share: float
    """Share of global-memory instructions that move 128 bits per thread."""
    wide_loads: int
    wide_stores: int
    """LDG (or LDGSTS) and STG of 128 bits."""
    key: str


def row(launch: CapturedLaunch, launches: int = 1) -> Row:
    used, ops = resources(launch.compiled), sass(launch.compiled)
    fit, widths = occupancy(used, launch.arch), access_widths(ops)
    all_dots, tensor_dots = dots(launch.compiled)
    return Row(
        case=launch.case,
        module=launch.module,
        kernel=launch.kernel,
        dtype=launch.dtype,
        config=launch.config,
        arch=launch.arch,
        grid=list(launch.grid),
        launches=launches,
        registers=used.registers,
        stack=used.stack,
        spill_loads=count(ops, "LDL"),
        spill_stores=count(ops, "STL"),
        shared=used.shared,
        warps=used.warps,
        fp_fusion=launch.compiled.metadata.enable_fp_fusion,
        blocks_per_sm=fit.blocks,
        limiter=fit.limiter,
        dots=all_dots,
        tensor_dots=tensor_dots,
        tensor_core=tensor_core(ops),
        wide_share=round(widths.get(128, 0) / max(sum(widths.values()), 1), 3),
        wide_loads=access_widths(ops, "LDG", "LDGSTS").get(128, 0),
        wide_stores=access_widths(ops, "STG").get(128, 0),
        key=launch.key,
    )


def rows(launches: Iterable[CapturedLaunch]) -> list[Row]:
    """A row per case, binary and grid, in order of first launch."""
    groups: dict[tuple, list[CapturedLaunch]] = {}
    for launch in launches:
        groups.setdefault((launch.case, launch.key, launch.grid), []).append(launch)
    disassemble(group[0].compiled for group in groups.values())
    return [row(group[0], len(group)) for group in groups.values()]
