"""What the tensor cores' rounding does to a matmul, on a CPU: a simulation to measure errors with, never to train fast.

The operands of A B are rounded to a format (bf16, fp16; e4m3 and e5m2 with scales), products are exact, and the sums are kept
as the mode says:

    fp32    the sum over K in fp32
    fp22    as fp32, cut to 13 fraction bits after every ``step`` products: what Ada and Hopper give fp8 for "fp32"
    fp16    as fp16, rounded after every ``step`` products

and with a chunk length the sums of chunks of K are added up in fp32. Triton's interpreter cannot show this: it rounds once per
tl.dot and misses an overflow inside a chunk.

What is assumed about the hardware, NVIDIA documenting none of it. Xie et al. 2025 (MMA-Sim, arXiv 2511.10909) give a model of
each generation that agreed with the chips bit by bit, and Fasi et al. 2021 (PeerJ CS 7:e330) what subnormals become:

- Ampere and Ada split an instruction's K in two: one rounding per 8 products of 16-bit operands, 16 of fp8. Hopper and
  Blackwell round per 16 and 32 (``step``). Subnormals are kept.
- fp16 accumulators round to nearest even and overflow to inf. ``toward_zero`` shows what truncation would do.
- fp32 accumulators lose nothing. The real ones truncate, so bf16, the yardstick, is flattered.
- fp8 on Ada and Hopper accumulates in e8m13. The chip also cuts each product to 13 bits below the largest, which is left out:
  that error has either sign, while cutting the sum always makes it smaller. RTX 50 cards keep fp32.

Formats: fp8 of Micikevicius et al. 2022 (arXiv 2209.05433), saturating; fp16 and bf16 as IEEE rounds, overflowing to inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FORMATS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
HALF_MAX = 65504.0
FP22_MASK = ~((1 << 10) - 1)  # fp32's 23 fraction bits less 10
BLOCK = 1 << 20
"""Elements of accumulators that are worked on together: they stay in a CPU's cache."""


@dataclass(frozen=True)
class Mode:
    """One way to multiply matrices. ``forward`` is the format of activations and weights, ``gradient`` that of gradients."""

    name: str
    forward: str = "bf16"
    gradient: str = "bf16"
    accumulate: str = "fp32"  # "fp32", "fp22" or "fp16"
    chunk: int | None = None  # of K; None: all of it
    scale: str | None = None  # of fp8 operands: "tensor", or "row" (each row of A, each column of B)
    output: str = "bf16"  # what activations and gradients are stored as
    step: int = 8  # of K, between two roundings: Ampere's and Ada's
    toward_zero: bool = False

    def __post_init__(self) -> None:
        for field, allowed in (
            ("forward", tuple(FORMATS)),
            ("gradient", tuple(FORMATS)),
            ("output", ("fp32", "bf16", "fp16")),
            ("accumulate", ("fp32", "fp22", "fp16")),
            ("scale", (None, "tensor", "row")),
        ):
            if getattr(self, field) not in allowed:
                names = ", ".join(map(str, allowed))
                raise ValueError(
                    f"{field} of mode {self.name!r} is {getattr(self, field)!r}: it must be one of {names}"
                )
        if self.step < 1 or (self.chunk is not None and (self.chunk < self.step or self.chunk % self.step)):
            raise ValueError(f"chunk of mode {self.name!r} is {self.chunk}: it must be a multiple of step, {self.step}")

    @property
    def needs_loss_scaling(self) -> bool:
        """Gradients are stored in fp16, whose smallest normal number is 6.1e-5. fp8's scales see to that themselves."""
        return self.output == "fp16"

    def with_chunk(self, chunk: int | None) -> Mode:
        return replace(self, name=f"{self.name}, {f'chunk {chunk}' if chunk else 'unchunked'}", chunk=chunk)


FP32 = Mode("fp32", "fp32", "fp32", output="fp32")
BF16 = Mode("bf16")
FP16 = Mode("fp16", "fp16", "fp16", output="fp16")
FP16_FAST = Mode("fp16-fast", "fp16", "fp16", "fp16", chunk=64, output="fp16")
FP8 = Mode("fp8", "e4m3", "e5m2", "fp22", scale="tensor", step=16)
FP8_PROMOTED = replace(FP8, name="fp8, promoted every 128", chunk=128)  # DeepSeek-V3's, section 3.3.2
FP8_FP32 = replace(FP8, name="fp8, fp32 sums", accumulate="fp32")
FP8_ROWS = replace(FP8_PROMOTED, name="fp8 by rows, promoted every 128", scale="row")
FP8_FAST = replace(FP8, name="fp8-fast, chunk 64", accumulate="fp16", chunk=64)
FP8_FAST_ROWS = replace(FP8_FAST, name="fp8-fast by rows, chunk 64", scale="row")
MODES = {
    mode.name: mode
    for mode in (FP32, BF16, FP16, FP16_FAST, FP8, FP8_PROMOTED, FP8_FP32, FP8_ROWS, FP8_FAST, FP8_FAST_ROWS)
}


def round_to(x: Tensor, form: str) -> Tensor:
    """x (fp32, any shape) rounded to a format and back, to nearest even. fp8 saturates, fp16 and bf16 overflow to inf."""
    if form == "fp32":
        return x
    dtype = FORMATS[form]
    if dtype.itemsize == 1:
        x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return x.to(dtype).to(torch.float32)


def fp8_target(form: str, mode: Mode) -> float:
    """What the largest element of an fp8 operand is scaled to: the format's largest number, or, where sums are in fp16, the
    largest at which a chunk of products cannot overflow even if all of them are as large as can be."""
    largest = torch.finfo(FORMATS[form]).max
    if mode.accumulate != "fp16" or mode.chunk is None:
        return largest
    limit = torch.tensor(math.sqrt(HALF_MAX / mode.chunk))
    target = round_to(limit, form)
    if target > limit:  # the neighbour below, in the format's own bits
        target = (target.to(FORMATS[form]).view(torch.uint8) - 1).view(FORMATS[form]).float()
    return min(largest, float(target))


def quantize(x: Tensor, form: str, mode: Mode, dim: int) -> tuple[Tensor, Tensor | None]:
    """The operand as the tensor core sees it, and the factor that undoes its scale (None without one).

    x (..., rows, columns) fp32. fp8 is scaled by the amax of the tensor at hand ("just in time"): of all of it, or
    ``scale="row"``, of each vector along ``dim``, the dimension that the matmul sums over.
    """
    if form not in ("e4m3", "e5m2") or mode.scale is None:
        return round_to(x, form), None
    amax = x.abs().amax() if mode.scale == "tensor" else x.abs().amax(dim, keepdim=True)
    factor = torch.where(amax > 0, amax / fp8_target(form, mode), 1.0)
    return round_to(x / factor, form), factor


def matmul(a: Tensor, b: Tensor, mode: Mode, *, forms: tuple[str, str] | None = None) -> Tensor:
    """A B in ``mode``: a (..., M, K), b (..., K, N) fp32 -> (..., M, N) fp32, as it leaves the accumulators (not rounded to
    ``mode.output``). ``forms``: the operands' formats, by default ``mode.forward`` of both. An overflow inside a chunk is inf
    or NaN in the result, as on the chip."""
    form_a, form_b = forms or (mode.forward, mode.forward)
    a, factor_a = quantize(a, form_a, mode, -1)
    b, factor_b = quantize(b, form_b, mode, -2)
    if mode.accumulate == "fp32":
        out = a @ b
    else:
        Z = math.prod(a.shape[:-2])
        out = _sum_in_chunks(a.reshape(Z, *a.shape[-2:]), b.reshape(Z, *b.shape[-2:]), mode)
        out = out.view(*a.shape[:-1], b.shape[-1])
    for factor in (factor_a, factor_b):
        out = out if factor is None else out * factor
    return out


def _rounding(mode: Mode) -> Callable[[Tensor], object]:
    """Rounds accumulators, held in fp32, in place."""
    if mode.accumulate == "fp22":
        return lambda acc: acc.view(torch.int32).bitwise_and_(FP22_MASK)
    if mode.toward_zero:
        return _half_toward_zero
    return lambda acc: acc.copy_(acc.to(torch.float16))


def _half_toward_zero(acc: Tensor) -> None:
    half = acc.to(torch.float16)
    beyond = half.to(torch.float32).abs() > acc.abs()
    acc.copy_((half.view(torch.int16) - beyond.to(torch.int16)).view(torch.float16))  # one less is nearer to zero


def _sum_in_chunks(a: Tensor, b: Tensor, mode: Mode) -> Tensor:
    """a (Z, M, K) times b (Z, K, N), ``mode.step`` products at a time, many chunks of K side by side.

    fp32 adds ``step`` products and an accumulator with a relative error of about 1e-7: nothing beside fp16's 4.9e-4."""
    (Z, M, K), N = a.shape, b.shape[-1]
    cut, chunk = _rounding(mode), mode.chunk or max(1, K)
    chunks = max(1, math.ceil(K / chunk))
    if chunks * chunk != K:  # zeros add nothing
        a = torch.nn.functional.pad(a, (0, chunks * chunk - K))
        b = torch.nn.functional.pad(b, (0, 0, 0, chunks * chunk - K))
    a = a.reshape(Z, M, chunks, chunk).transpose(1, 2).reshape(Z * chunks, M, chunk)
    b = b.reshape(Z * chunks, chunk, N)
    sums = torch.zeros(Z * chunks, M, N)
    together = max(1, BLOCK // max(1, M * N))
    for first in range(0, Z * chunks, together):
        x, y, acc = (tensor[first : first + together] for tensor in (a, b, sums))
        for k in range(0, chunk, mode.step):
            acc.baddbmm_(x[:, :, k : k + mode.step], y[:, k : k + mode.step])
            cut(acc)
    return sums.view(Z, chunks, M, N).sum(1)


@dataclass(frozen=True)
class Range:
    """Where the values of a tensor fall in a format: shares of its non-zero elements, 0..1."""

    to_zero: float
    subnormal: float
    overflow: float


def range_of(x: Tensor, form: str) -> Range:
    """What becomes of x (fp32) in a format without a scale: rounded to zero, to a subnormal number, or past the largest."""
    info = torch.finfo(FORMATS[form])
    values = x[x != 0].abs()
    if not len(values):
        return Range(0.0, 0.0, 0.0)
    rounded = values.to(torch.float64).clamp(max=2 * info.max).to(torch.float32)
    rounded = round_to(rounded, form) if form not in ("e4m3", "e5m2") else rounded.to(FORMATS[form]).float()
    over = ~rounded.isfinite() | (values > info.max)
    zero, small = rounded == 0, (rounded > 0) & (rounded < info.smallest_normal)
    return Range(*(float(part.double().mean()) for part in (zero, small, over)))


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Root-mean-square error over root-mean-square value, against an fp64 result; inf where anything overflowed."""
    if not bool(found.isfinite().all()):
        return math.inf
    return float((found.double() - exact).norm() / exact.norm())


def overflowed(found: Tensor) -> float:
    """The share of a result's elements that are inf or NaN."""
    return float((~found.isfinite()).double().mean())
