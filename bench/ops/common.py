"""What the files of this folder share: sizes, timed entries, launch cases and tuning families.

Every file names, for its operation,

* launch cases: (name, callable) for each shipped launch config. A callable runs one public operation forward and backward on
  CPU tensors; inside ``capture_launches`` its launches only compile. Tensors are then nothing but pointers, strides and
  dtypes (``torch.empty``, pages never touched), so shapes that decide a launch config are real ones; only sizes that plain
  PyTorch has to compute with inside an operation (the GEMMs of the loss) are kept small. What is varied is what makes another
  binary or another config: dtype, head dimension, width, and the options that are compiled in. The heaviest combination of
  options comes for every head dimension: that is the one that spills first;
* tuning families: per kernel and dtype, the launches to compile and the operation to time, for every bucket of shapes;
* a timing entry: inputs, least work, parity check, and the peers that bench.kernels times beside ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.compiler import ranking
from bench.reports.timing import Work
from fastgpt.hardware.cards import Gpu
from fastgpt.kernels import tuning
from fastgpt.performance import flops

SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
BF16, FP16, FP32 = SHORT
TUNED_WIDTHS = (384, 768, 1024, 1600)
"""GPT-2 40M's, 124M's, 350M's, 1.5B's."""
OURS = "triton"

# ---------------------------------------------------------------- launch cases

Case = tuple[str, Callable[[], None]]


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def backward(outputs: Tensor | tuple[Tensor, ...]) -> None:
    """A backward pass with contiguous upstream gradients, as autograd hands them over within a model."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])


# ---------------------------------------------------------------- tuning families


@dataclass(frozen=True)
class Family:
    """Buckets of one kernel and dtype that compile alike. ``cases`` launch the kernel, the usual options first, then those that
    a config of these buckets must also be good for."""

    kernel: str
    """Its name in the tables (``tuning.space``)."""
    dtype: torch.dtype
    buckets: tuple[str, ...]
    cases: tuple[Callable[[], None], ...]
    timed: Callable[[str, torch.device], Callable[[], Any]]
    """For a bucket: the public operation around the kernel, at the size that stands for it. Returns its results."""
    clocks: Callable[[str, ranking.Facts, Gpu], list[tuple[float, float]]]
    """(clocks, fill) of a config by the model of bench/compiler/ranking.py, at each size that stands for a bucket."""
    worth: Callable[[tuning.Config], bool] = lambda config: True
    """Whether a config is worth compiling."""
    rest: tuple[Callable[[], None], ...] = ()
    """Cases that a config which ships must be good for, too: compiled by the gate of bench.audit only."""

    @property
    def dtype_name(self) -> str:
        return tuning.DTYPES[self.dtype]

    @property
    def name(self) -> str:
        """Such as "attention.forward bf16 D64 dropout"; --kernel picks by it."""
        alike = "" if self.kernel.startswith("linear") else f" {self.buckets[0].split(' rows')[0]}"
        return f"{self.kernel} {self.dtype_name}{alike}"

    @property
    def function(self) -> str:
        """The kernel's name in its file."""
        return tuning.spaces()[self.kernel].function.__name__

    def configs(self) -> list[tuning.Config]:
        """Those worth compiling; cuBLAS is not compiled."""
        return [
            config for config in tuning.spaces()[self.kernel].configs if config != tuning.CUBLAS and self.worth(config)
        ]

    def rank(self, bucket: str, found: list[ranking.Facts], default: tuning.Config, gpu: Gpu) -> list[ranking.Ranked]:
        """What was compiled of ``configs()``, best first."""
        return ranking.rank(found, default, lambda facts: self.clocks(bucket, facts, gpu))


def pass_of(kernel: str, op: Callable[..., Any], inputs: list[Tensor]) -> Callable[[], Any]:
    """The forward pass of ``op`` over its inputs, or its backward pass, as the name of ``kernel`` ends."""
    if kernel.endswith(".forward"):

        def forward() -> Any:
            with torch.no_grad():
                torch.manual_seed(0)  # the same dropout for every config
                return op(*inputs)

        return forward
    inputs = [x.requires_grad_() for x in inputs]
    found = op(*inputs)
    outputs: tuple[Tensor, ...] = found if isinstance(found, tuple) else (found,)
    upstream = [torch.randn_like(out) for out in outputs]
    return lambda: torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)


# ---------------------------------------------------------------- timing entries


@dataclass(frozen=True)
class Sizes:
    """Shapes of the entries: GPT-2 124M's at a micro-batch of 8 x 1024 and, for attention, 16 x 1024. ops.SWEEPS has more."""

    rows: int = 8192
    C: int = 768
    V: int = 50304
    B: int = 16
    T: int = 1024
    H: int = 12
    D: int = 64
    n_layer: int = 12
    dtype: torch.dtype = BF16


TINY = Sizes(rows=64, C=64, V=256, B=1, T=64, H=2, D=32, n_layer=1, dtype=FP32)


@dataclass(frozen=True)
class Entry:
    """One operation. ``parity`` (at the timed shape) raises AssertionError; ``variants`` are makers of what is timed, by
    name, ours first."""

    name: str
    shape: str
    work: flops.Work
    parity: Callable[[], None]
    variants: dict[str, Callable[[], Work]]


def forward_backward(op: Callable, make: Callable[[], dict[str, Tensor]]) -> Work:
    """``op(**inputs)`` and the gradients of all its floating inputs."""
    inputs = {key: x.requires_grad_(x.is_floating_point()) for key, x in make().items()}
    wanted = [x for x in inputs.values() if x.requires_grad]

    def forward() -> tuple[Tensor, ...]:
        outputs = op(**inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    upstream = tuple(torch.randn_like(out) for out in forward())  # with gradients: torch.compile then compiles once
    return lambda: torch.autograd.grad(forward(), wanted, upstream)


def timed(ops: dict[str, Callable], inputs: Callable) -> dict[str, Callable[[], Work]]:
    """The variants of an entry that are given these inputs."""
    return {name: partial(forward_backward, op, inputs) for name, op in ops.items()}


def peers(eager: Callable, compiled: bool, **others: Callable | None) -> dict[str, Callable]:
    """The functions to compare with: eager, torch.compile of it if asked, and those of the others that are available."""
    found = {"eager": eager}
    if compiled:
        found["compile"] = torch.compile(eager, dynamic=False)  # a step's shapes are static, too
    return found | {name: op for name, op in others.items() if op is not None}


def liger_function(name: str) -> Any:
    """A function of Liger-Kernel, or None where it is not installed."""
    try:
        from liger_kernel.transformers import functional
    except ImportError:
        return None
    return getattr(functional, name, None)


def total(*parts: flops.Work) -> flops.Work:
    return flops.Work(sum(p.flops for p in parts), sum(p.bytes for p in parts))
