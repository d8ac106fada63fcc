"""Turns triton's launches on CPU tensors into: compile for an absent GPU, then execute the PTX here, on these tensors.

    with emulated(89) as session:
        kernel[grid](x, y, n, BLOCK=128)      # any @triton.jit kernel, or host code that launches some
    session.findings.faults()                 # out of bounds, races, reads of nothing, ...

Every launch runs twice: in order and many CTAs at once, then in a random order, few at a time, half of the warps ahead of the
others, and with other garbage in shared memory. Both have to leave the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from unittest import mock

import numpy as np
import triton
from torch import Tensor
from triton.backends.nvidia.compiler import CUDABackend

from bench.compiler.capture import CompileOnlyDriver
from bench.emulator import machine, ptx, unwritten
from bench.emulator.memory import Findings, GlobalMemory, Span, Storage
from fastgpt.common import cache_dir
from fastgpt.kernels.offline import absent_gpu, launched_by

LARGEST_GRID = 2**31 - 1, 2**16 - 1
"""Programs along the first axis, and along either of the others: CUDA C++ Programming Guide, "Technical Specifications"."""
parse = lru_cache(maxsize=64)(ptx.parse)  # a kernel and its functions are megabytes


class Driver(CompileOnlyDriver):
    """As for an audit, but with device numbers of its own: what is compiled for them has no cubin."""

    def get_current_device(self) -> int:
        return -1000 - self.arch


@dataclass
class Ran:
    """One launch."""

    kernel: str
    module: str
    key: str
    """triton's hash of the binary."""
    ctas: int
    """How many ran, of ``grid``."""
    grid: tuple[int, ...]


@dataclass
class Emulation:
    twice: bool = True
    """Run each launch again in another order."""
    ctas: int | None = None
    """At most so many CTAs of a launch run. What they leave unwritten is then not known to be."""
    seed: int = 0
    rewrite: Callable[[str], str] = lambda text: text
    """Changes the PTX before it runs: to see whether a broken kernel is noticed."""
    findings: Findings = field(default_factory=Findings)
    launches: list[Ran] = field(default_factory=list)
    reachable: list[Tensor] = field(default_factory=list)
    """Tensors that kernels reach by addresses in memory, besides their arguments."""


@contextmanager
def emulated(arch: int = 89, sms: int | None = None, *, fill: bool = True, **options: Any) -> Iterator[Emulation]:
    """Inside, launches are executed by the emulator, as on a GPU of compute capability ``arch`` with ``sms`` SMs, and, with
    ``fill``, empty allocations are marked (unwritten.py). ``options``: fields of Emulation. Raises RuntimeError under
    triton's interpreter."""
    session, driver = Emulation(**options), triton.runtime.driver

    def run(function: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        compiled = run_jit(function, *args, grid=grid, warmup=True, **kwargs)
        if not warmup:
            binder = function.device_caches[driver.active.get_current_device()][4]
            bound = binder(*args, **kwargs)[0]
            sizes = tuple(int(size) for size in (grid(bound) if callable(grid) else grid))
            if all(size > 0 for size in sizes):
                _execute(session, function, compiled, bound, sizes)
        return compiled

    run_jit = triton.runtime.jit.JITFunction.run
    with absent_gpu(arch, sms), launched_by(run), _ptx_only(), unwritten.marked(fill):
        before = driver._active
        driver.set_active(Driver(arch))
        try:
            yield session
        finally:
            driver._active = before


@contextmanager
def _ptx_only() -> Iterator[None]:
    """ptxas takes longer than all else, and what it makes is not read: without it, in a cache apart from triton's own."""
    knobs = triton.knobs.cache
    with mock.patch.object(CUDABackend, "make_cubin", lambda *_, **__: b"none"):
        before, knobs.dir = knobs.dir, str(cache_dir() / "emulator")
        try:
            yield
        finally:
            knobs.dir = before


# ---------------------------------------------------------------- one launch

_SCALARS: dict[str, Any] = {f"i{bits}": getattr(np, f"int{bits}") for bits in (8, 16, 32, 64)}
_SCALARS |= {f"u{bits}": getattr(np, f"uint{bits}") for bits in (8, 16, 32, 64)}
_SCALARS |= {"i1": np.uint8, "fp16": np.float16, "fp32": np.float32, "f32": np.float32, "fp64": np.float64}


def _flatten(ty: Any, value: Any, name: str) -> Iterator[tuple[str, str, Any]]:
    if isinstance(ty, tuple):
        for i, (t, v) in enumerate(zip(ty, value)):
            yield from _flatten(t, v, f"{name}[{i}]")
    elif ty != "constexpr":
        yield name, ty, value


def _spans(tensors: list[tuple[str, Tensor]]) -> list[Span]:
    """The extent of each view."""
    storages: dict[int, Storage] = {}
    spans = []
    for name, x in tensors:
        if x.numel():
            owner = x.untyped_storage()
            base = owner.data_ptr()
            if base not in storages:
                storages[base] = Storage(base, owner.nbytes(), unwritten.written(owner), name)
            extent = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride())) + 1
            spans.append((x.data_ptr(), x.data_ptr() + extent * x.element_size(), storages[base]))
    return spans


def _sample(total: int, most: int | None, chance: np.random.Generator) -> np.ndarray:
    """Which CTAs run: all, or the first and the last two, and neighbours from between."""
    if most is None or total <= most:
        return np.arange(total)
    pairs = chance.integers(0, total - 1, max(most // 2 - 2, 0))
    return np.unique(np.concatenate([[0, 1, total - 2, total - 1], pairs, pairs + 1]))


def _execute(session: Emulation, function: Any, compiled: Any, bound: dict[str, Any], grid: tuple[int, ...]) -> None:
    text = session.rewrite(compiled.asm["ptx"])
    kernel, findings = parse(text), session.findings
    given = [each for name, ty in compiled.src.signature.items() for each in _flatten(ty, bound[name], name)]
    arguments: dict[str, Any] = dict.fromkeys(kernel.params, np.uint64(0))  # the last ones are triton's scratch memory
    if not 0 <= len(kernel.params) - len(given) <= 2:
        raise RuntimeError(f"{kernel.name}: {len(kernel.params)} parameters, {len(given)} arguments")
    for parameter, (_, ty, value) in zip(kernel.params, given):
        if ty.startswith("*"):
            arguments[parameter] = np.uint64(value.data_ptr() if isinstance(value, Tensor) else value or 0)
        else:
            arguments[parameter] = np.asarray(value).astype(_SCALARS[ty])[()]
    threads = compiled.metadata.num_warps * 32
    if kernel.threads not in (None, threads):
        raise RuntimeError(f"{kernel.name}: .reqntid {kernel.threads}, but {threads} threads")
    tensors = [(name, value) for name, _, value in given if isinstance(value, Tensor)]
    spans = _spans([*tensors, *((f"reachable[{i}]", x) for i, x in enumerate(session.reachable))])
    x, y, z = (*grid, 1, 1)[:3]
    if x > LARGEST_GRID[0] or max(y, z) > LARGEST_GRID[1]:
        raise RuntimeError(
            f"{kernel.name}: a grid of {x} x {y} x {z}, and a GPU has at most 2^31 - 1 x 65,535 x 65,535"
        )
    launch = machine.Grid(kernel, arguments, (x, y, z), threads, compiled.metadata.shared)
    chance = np.random.default_rng(session.seed)
    total = int(np.prod(grid, dtype=np.int64))
    ctas = _sample(total, session.ctas, chance)
    findings.kernel = kernel.name

    def run(order: np.ndarray, **options: Any) -> GlobalMemory:
        batch = options.pop("batch", None)
        memory = GlobalMemory(spans, findings, kernel.granule("global"))
        try:
            machine.Emulator(launch, memory, findings, **options).run(order, batch)
        except ptx.PtxError as error:
            raise ptx.PtxError(f"{kernel.name}: {error}") from error
        return memory

    memory = run(ctas)
    if session.twice:
        places, values = memory.written()
        memory.undo()
        few = max(1, min(len(ctas) // 3, 4096 // threads))
        memory = run(chance.permutation(ctas), batch=few, garbage=0x3C, shuffle=chance)
        places_again, values_again = memory.written()
        if not np.array_equal(places, places_again):
            findings.add("depends on the order", None, "it writes elsewhere when CTAs and warps run in another order")
        elif not np.array_equal(values, values_again):
            differ = np.flatnonzero(values != values_again)
            where = f"{memory.name_of(int(places[differ[0]]))}: {len(differ)} of {len(places)} values differ"
            findings.add("depends on the order", None, f"{where} when CTAs and warps run in another order")
    if len(ctas) < total:
        for _, _, storage in spans:
            if storage.written:
                unwritten.forget(storage.base)
    session.launches.append(Ran(kernel.name, function.module.rpartition(".")[2], compiled.hash, len(ctas), grid))
