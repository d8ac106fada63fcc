"""Every launch that host code makes, compiled for a GPU that is not here: what the audit and the tuning tables are made from.

::

    with capture_launches(89) as launches:              # host code runs on CPU tensors; each launch only compiles
        layer_norm(torch.empty(64, 768, dtype=torch.bfloat16), ...)
    for launch in unique(launches):
        used = cubin.resources(launch.compiled)         # registers, stack (= spills), shared memory, warps
        fit = cubin.occupancy(used, 89)                 # resident blocks per SM, and what limits them
        ops = cubin.sass(launch.compiled)               # Counter({"HMMA.16816.F32.BF16": 64, "LDG.E.128": 8, ...})

Outputs of captured code are whatever lay in memory: only the compiled kernels mean something.
``python -m bench.audit`` compiles all that a training step launches, and prints the figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from fastgpt.kernels.offline import absent_gpu, launched_by

GRID_LIMITS = 2**31 - 1, 65535, 65535
"""Most blocks of a CUDA grid, in each direction."""


class CompileOnlyDriver(DriverBase):
    """What triton asks of a GPU driver before it launches, answered for an absent GPU of compute capability ``arch``. It can
    compile, with the ``ptxas`` of triton's wheel; it has no launcher."""

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

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty  # asked for by launchers only

    def get_benchmarker(self) -> Any:
        raise RuntimeError("a compile-only driver cannot time kernels")


@contextmanager
def compile_for(arch: int, sms: int | None = None) -> Iterator[None]:
    """Inside, triton compiles for sm_``arch``, and launchers see a GPU of it with ``sms`` SMs. Raises RuntimeError under the
    interpreter."""
    driver = triton.runtime.driver
    with absent_gpu(arch, sms):
        before = driver._active
        driver.set_active(CompileOnlyDriver(arch))
        try:
            yield
        finally:
            driver._active = before


@dataclass(frozen=True)
class CapturedLaunch:
    """One launch of a kernel that captured host code made. Launches that run the same binary have equal ``key``."""

    kernel: str
    module: str
    """The file that defines it: "fused_attn"."""
    arch: int
    case: str
    """What was being run: the ``case`` argument of capture_launches, or ""."""
    constexprs: dict[str, Any]
    signature: dict[str, Any]
    """Types of the other arguments ("*bf16", "i32"; "constexpr" where an integer argument was 1; a tuple's are a tuple)."""
    options: dict[str, Any]
    """num_warps, num_stages, and maxnreg where set."""
    grid: tuple[int, ...]
    compiled: Any
    """triton's CompiledKernel; ``compiled.asm["cubin" | "ptx" | "ttgir"]``."""

    @property
    def key(self) -> str:
        """triton's hash of source, signature, alignments, constexprs, options and target."""
        return self.compiled.hash

    @property
    def dtype(self) -> str:
        """Element type of the first pointer argument: what the kernel reads."""
        types = tree_leaves(list(self.signature.values()))
        return next((ty[1:] for ty in types if ty.startswith("*")), "-")

    @property
    def config(self) -> str:
        """The choices that made this binary, in one line: ``BLOCK_M=128 BLOCK_N=64 CAUSAL w4 s3``."""
        parts = [
            key if value is True else f"{key}={getattr(value, '__name__', value)}"
            for key, value in self.constexprs.items()
            if value is not False and value is not None
        ]
        return " ".join([*parts, f"w{self.options['num_warps']}", f"s{self.options['num_stages']}"])


def _launch(function: JITFunction, arch: int, case: str, grid: tuple[int, ...], compiled: Any) -> CapturedLaunch:
    source, metadata = compiled.src, compiled.metadata
    declared = {param.name for param in function.params if param.is_constexpr}
    constants = {function.arg_names[path[0]]: value for path, value in source.constants.items() if len(path) == 1}
    options = {key: getattr(metadata, key, None) for key in ("num_warps", "num_stages", "maxnreg")}
    return CapturedLaunch(
        kernel=function.__name__,
        module=function.module.rpartition(".")[2],
        arch=arch,
        case=case,
        constexprs={key: value for key, value in constants.items() if key in declared},
        signature={key: ty for key, ty in source.signature.items() if key not in declared},
        options={key: value for key, value in options.items() if value is not None},
        grid=grid,
        compiled=compiled,
    )


def _innermost(error: BaseException) -> BaseException:
    """The error inside the helper function that caused it; triton raises one more per call on the way out."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def capture_launches(arch: int = 89, sms: int | None = None, case: str = "") -> Iterator[list[CapturedLaunch]]:
    """Turn every launch made inside into a compile for sm_``arch``, and list them in order.

    Equal launches compile once. A kernel that does not compile raises RuntimeError naming the kernel and its config, from
    the compiler's own error; so does a grid that CUDA would refuse.
    """
    launches: list[CapturedLaunch] = []
    run_jit = JITFunction.run

    def compile_one(self, *args, grid, warmup=False, **kwargs):
        try:
            compiled = run_jit(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:
            given = {key: value for key, value in kwargs.items() if isinstance(value, (int, float, str, type(None)))}
            raise RuntimeError(
                f"{self.__name__} does not compile for sm_{arch} with {given}: {_innermost(error)}"
            ) from error
        if callable(grid):
            defaults = {param.name: param.default for param in self.params if param.has_default}
            grid = grid({**defaults, **dict(zip(self.arg_names, args)), **kwargs})
        if any(blocks > most for blocks, most in zip(grid, GRID_LIMITS)):
            raise RuntimeError(
                f"{self.__name__} is launched over {tuple(grid)} blocks: CUDA takes {GRID_LIMITS} at most"
            )
        launches.append(_launch(self, arch, case, tuple(grid), compiled))
        return compiled

    with compile_for(arch, sms), launched_by(compile_one):
        yield launches


def unique(launches: Iterable[CapturedLaunch]) -> list[CapturedLaunch]:
    """The first launch of each binary."""
    return list({launch.key: launch for launch in reversed(list(launches))}.values())[::-1]
