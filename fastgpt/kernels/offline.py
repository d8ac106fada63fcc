"""Compile for a GPU that is not here, and read from the result what the compiler made of a kernel.

No GPU, no CUDA driver: triton lowers a kernel to a cubin with the ``ptxas`` that its wheel carries, and ``cuobjdump``
and ``nvdisasm`` beside it say how many registers, spilled bytes and shared memory the kernel takes and which
instructions it runs. Three steps, each usable alone::

    with capture_launches(89) as launches:              # host code runs on CPU tensors; each launch only compiles
        layer_norm(torch.empty(64, 768, dtype=torch.bfloat16), ...)
    for launch in unique(launches):
        used = resources(launch.compiled)               # registers, stack (= spills), shared memory, warps
        fit = occupancy(used, 89)                       # resident blocks per SM, and what limits them
        ops = sass(launch.compiled)                     # Counter({"HMMA.16816.F32.BF16": 64, "LDG.E.128": 8, ...})

Outputs of captured code are whatever lay in memory: only the compiled kernels mean something. A process runs kernels
either in triton's interpreter or in its compiler: under ``TRITON_INTERPRET=1`` this module raises RuntimeError.

``python -m fastgpt.kernels.offline --arch sm_89`` prints the table for every launch in ``launch_cases.py``.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from fastgpt.hardware import ARCHS
from fastgpt.kernels import runtime


class CompileOnlyDriver(DriverBase):
    """What triton asks of a GPU driver before it launches, answered for an absent GPU of compute capability ``arch``
    (89 is 8.9). It can compile; it has no launcher."""

    def __init__(self, arch: int) -> None:
        super().__init__()
        self.arch = arch

    @classmethod
    def is_active(cls) -> bool:
        return False  # never picked by triton itself, only through compile_for

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        # A JITFunction keeps its compiled kernels, and the target they are for, per device number: one number per
        # architecture, none of them a real device's.
        return -self.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty  # asked for by launchers only

    def get_benchmarker(self):
        raise RuntimeError("a compile-only driver cannot time kernels")


@contextmanager
def compile_for(arch: int, sms: int | None = None) -> Iterator[CompileOnlyDriver]:
    """Inside, triton targets sm_``arch`` and CPU tensors take the Triton path (``runtime.compile_only``).

    Both are restored after. ``sms`` is the SM count that launchers see (default: the RTX 4070's 46). Raises
    RuntimeError under the interpreter.
    """
    if runtime.INTERPRET or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError(
            "TRITON_INTERPRET is set, so kernels of this process are interpreted and cannot be compiled: "
            "unset it, or compile in a child process without it"
        )
    active = triton.runtime.driver
    before = active._active, runtime.compile_only, runtime.compile_only_sms
    driver = CompileOnlyDriver(arch)
    active.set_active(driver)
    runtime.compile_only, runtime.compile_only_sms = True, sms or runtime.compile_only_sms
    try:
        yield driver
    finally:
        active._active, runtime.compile_only, runtime.compile_only_sms = before


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel that captured host code made. Launches that run the same binary have equal ``key``."""

    kernel: str
    module: str
    """The file that defines it: "fused_attn"."""
    arch: int
    case: str
    """What was being run: the ``case`` argument of capture_launches, or ""."""
    constexprs: dict[str, Any]
    signature: dict[str, str]
    """Types of the other arguments ("*bf16", "i32"; "constexpr" where an integer argument was 1)."""
    options: dict[str, Any]
    """num_warps, num_stages, and maxnreg where set."""
    compiled: Any
    """triton's CompiledKernel; ``compiled.asm["cubin" | "ptx" | "ttgir"]``."""

    @property
    def key(self) -> str:
        """triton's hash of source, signature, alignments, constexprs, options and target."""
        return self.compiled.hash

    @property
    def dtype(self) -> str:
        """Element type of the first pointer argument: what the kernel reads."""
        return next((ty[1:] for ty in self.signature.values() if ty.startswith("*")), "-")

    @property
    def config(self) -> str:
        """The choices that made this binary, in one line: ``BLOCK_M=128 BLOCK_N=64 CAUSAL w4 s3``."""
        parts = [
            key if value is True else f"{key}={getattr(value, '__name__', value)}"
            for key, value in self.constexprs.items()
            if value is not False and value is not None
        ]
        return " ".join([*parts, f"w{self.options['num_warps']}", f"s{self.options['num_stages']}"])


def _launch(function: JITFunction, arch: int, case: str, compiled: Any) -> Launch:
    source, metadata = compiled.src, compiled.metadata
    declared = {param.name for param in function.params if param.is_constexpr}
    constants = {function.arg_names[path[0]]: value for path, value in source.constants.items() if len(path) == 1}
    options = {key: getattr(metadata, key, None) for key in ("num_warps", "num_stages", "maxnreg")}
    return Launch(
        kernel=function.__name__,
        module=function.module.rpartition(".")[2],
        arch=arch,
        case=case,
        constexprs={key: value for key, value in constants.items() if key in declared},
        signature={key: ty for key, ty in source.signature.items() if key not in declared},
        options={key: value for key, value in options.items() if value is not None},
        compiled=compiled,
    )


def _innermost(error: BaseException) -> BaseException:
    """The error inside the helper function that caused it; triton raises one more per call on the way out."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def capture_launches(arch: int = 89, sms: int | None = None, case: str = "") -> Iterator[list[Launch]]:
    """Turn every launch made inside into a compile for sm_``arch``, and list them in order.

    Of an autotuned kernel every config (after pruning) is compiled, not only a winner. Equal launches compile once.
    A kernel that does not compile raises RuntimeError naming the kernel and its config, from the compiler's own error.
    """
    launches: list[Launch] = []
    run_jit, run_autotuner = JITFunction.run, Autotuner.run

    def compile_one(self, *args, grid, warmup=False, **kwargs):
        try:
            compiled = run_jit(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:
            given = {key: value for key, value in kwargs.items() if isinstance(value, (int, float, str, type(None)))}
            raise RuntimeError(
                f"{self.__name__} does not compile for sm_{arch} with {given}: {_innermost(error)}"
            ) from error
        launches.append(_launch(self, arch, case, compiled))
        return compiled

    def compile_configs(self, *args, **kwargs):
        self.nargs = dict(zip(self.arg_names, args))
        for config in self.prune_configs(kwargs):
            if config.pre_hook is not None:
                config.pre_hook({**self.nargs, **kwargs, **config.all_kwargs()})
            self.fn.run(*args, **kwargs, **config.all_kwargs())
        self.nargs = None

    with compile_for(arch, sms):
        JITFunction.run, Autotuner.run = compile_one, compile_configs
        try:
            yield launches
        finally:
            JITFunction.run, Autotuner.run = run_jit, run_autotuner


def unique(launches: Iterable[Launch]) -> list[Launch]:
    """The first launch of each binary."""
    return list({launch.key: launch for launch in reversed(list(launches))}.values())[::-1]


# ---------------------------------------------------------------- what the binary takes


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
def _tool(name: str, cubin: bytes, *args: str) -> str:
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
    usage = _tool("cuobjdump", compiled.asm["cubin"], "-res-usage")

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

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


def sass(compiled: Any) -> Counter[str]:
    """How often each machine instruction stands in the kernel, with its modifiers: ``{"LDG.E.128": 8, ...}``."""
    return Counter(_INSTRUCTION.findall(_tool("nvdisasm", compiled.asm["cubin"], "-c", "-ndf")))


def count(ops: Counter[str], *names: str) -> int:
    """Instructions with one of these base names, whatever their modifiers: ``count(ops, "HMMA", "HGMMA")``."""
    return sum(number for op, number in ops.items() if op.split(".")[0] in names)


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


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Row:
    """The figures of one binary, as plain values."""

    case: str
    module: str
    kernel: str
    dtype: str
    config: str
    arch: int
    registers: int
    spills: int
    """Bytes of local memory per thread."""
    local_accesses: int
    """LDL and STL instructions."""
    shared: int
    warps: int
    blocks_per_sm: int
    limiter: str
    dots: int
    """tl.dot operations in the kernel's source."""
    tensor_core: int
    """HMMA and HGMMA instructions."""
    wide_share: float
    """Share of global-memory instructions that move 128 bits per thread."""
    wide_loads: int
    wide_stores: int
    """LDG (or LDGSTS) and STG of 128 bits."""
    key: str


def row(launch: Launch) -> Row:
    used, ops = resources(launch.compiled), sass(launch.compiled)
    fit, widths = occupancy(used, launch.arch), access_widths(ops)
    return Row(
        case=launch.case,
        module=launch.module,
        kernel=launch.kernel,
        dtype=launch.dtype,
        config=launch.config,
        arch=launch.arch,
        registers=used.registers,
        spills=used.stack,
        local_accesses=count(ops, "LDL", "STL"),
        shared=used.shared,
        warps=used.warps,
        blocks_per_sm=fit.blocks,
        limiter=fit.limiter,
        dots=launch.compiled.asm["ttir"].count("tt.dot "),
        tensor_core=count(ops, "HMMA", "HGMMA"),
        wide_share=round(widths.get(128, 0) / max(sum(widths.values()), 1), 3),
        wide_loads=access_widths(ops, "LDG", "LDGSTS").get(128, 0),
        wide_stores=access_widths(ops, "STG").get(128, 0),
        key=launch.key,
    )


def print_table(rows: list[Row], arch: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(rows)} kernels compiled for sm_{arch}, triton {triton.__version__}")
    for name in ("kernel", "case", "config"):
        table.add_column(name, overflow="fold")
    for name in ("registers", "spills", "shared", "blocks/SM", "limiter", "HMMA", "128-bit"):
        table.add_column(name, justify="right")
    for r in sorted(rows, key=lambda r: (r.module, r.kernel)):
        figures = (r.registers, r.spills, f"{r.shared:,}", r.blocks_per_sm, r.limiter, r.tensor_core)
        style = "red" if r.spills or not r.blocks_per_sm else None
        table.add_row(f"{r.kernel} {r.dtype}", r.case, r.config, *map(str, figures), f"{r.wide_share:.0%}", style=style)
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def main(argv: list[str] | None = None) -> int:
    """Compile every kernel of a GPT step for a GPU that is not here, and print what each takes. No CUDA needed."""
    from fastgpt.kernels import launch_cases

    parser = argparse.ArgumentParser(prog="python -m fastgpt.kernels.offline", description=main.__doc__)
    parser.add_argument("--arch", default="sm_89", choices=[name for name in ARCHS if int(name[3:]) >= 80])
    parser.add_argument("--only", default="", metavar="REGEX", help="only the cases whose name matches this somewhere")
    parser.add_argument("--shard", default="1/1", metavar="K/N", help="every N-th case, from the K-th on")
    parser.add_argument("--json", action="store_true", help="print rows and errors as JSON")
    args = parser.parse_args(argv)
    arch, (k, n) = int(args.arch[3:]), map(int, args.shard.split("/"))
    launches: list[Launch] = []
    errors: dict[str, str] = {}
    for name, case in [c for c in launch_cases.cases() if re.search(args.only, c[0])][k - 1 :: n]:
        try:
            with capture_launches(arch, case=name) as captured:
                case()
        except RuntimeError as error:
            errors[name] = str(error)
        launches += captured
    rows = [row(launch) for launch in unique(launches)]
    if args.json:
        print(json.dumps({"rows": [asdict(r) for r in rows], "errors": errors}))
    else:
        print_table(rows, arch)
        for name, message in errors.items():
            print(f"{name}: {message}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
