"""Errors of simulated matmuls against fp64: on operands drawn from distributions, and on operands recorded from training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.numerics.simulation import (
    BF16,
    FP16,
    FP16_FAST,
    MODES,
    Mode,
    matmul,
    overflowed,
    range_of,
    relative_error,
    round_to,
)
from bench.numerics.training import Operands

KS = (64, 256, 768, 1024, 3072, 8192, 16384, 50304, 65536)
SIDE = 64  # rows and columns of a drawn product
CHUNKS = (32, 64, 128, 256, None)

FP16_MODES = (FP16, *(FP16_FAST.with_chunk(chunk) for chunk in CHUNKS))
FP8_MODES = tuple(mode for name, mode in MODES.items() if name.startswith("fp8"))
COMPARED = (BF16, *FP16_MODES, *FP8_MODES)


def readings(chunk: int) -> tuple[Mode, ...]:
    """fp16-fast rounded otherwise: as other chips do, and as none is known to."""
    return tuple(
        replace(FP16_FAST, name=name, chunk=chunk, step=step, toward_zero=name.startswith("truncated"))
        for name, step in (
            ("every 16 products (Hopper, Blackwell)", 16),
            ("every 8 products (Ampere, Ada)", 8),
            ("every 4 products", 4),
            ("truncated every 8 products", 8),
        )
    )


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape)


def _student(*shape: int, freedom: float = 2.5) -> Tensor:
    """Heavy tails: of 65,536 values the largest is about 100 times the standard deviation of a normal."""
    return torch.distributions.StudentT(freedom).sample(shape)


def _outliers(*shape: int) -> Tensor:
    """One channel in 64 is 30 times as large, as in trained transformers (Dettmers et al. 2022)."""
    x = torch.randn(*shape)
    x[..., ::64] *= 30
    return x


def _dlogits(rows: int, vocabulary: int) -> Tensor:
    """p - 1 at the target of a model that is unsure: logits N(0, 2)."""
    p = F.softmax(2 * torch.randn(rows, vocabulary), -1)
    p[torch.arange(rows), torch.randint(0, vocabulary, (rows,))] -= 1
    return p


def _attention(rows: int, keys: int) -> Tensor:
    s = 2 * torch.randn(rows, keys)
    return torch.exp(s - s.amax(-1, keepdim=True))


@dataclass(frozen=True)
class Values:
    """A pair of operands, (SIDE, K) and (K, SIDE), drawn for a K. ``gradient``: whether the first is a gradient."""

    name: str
    draw: Callable[[int], tuple[Tensor, Tensor]]
    gradient: bool = False


VALUES = (
    Values("activation x weight: N(0, 1) x N(0, 0.02)", lambda K: (_normal(SIDE, K), 0.02 * _normal(K, SIDE))),
    Values("after GELU x weight", lambda K: (F.gelu(1.5 * _normal(SIDE, K)), 0.02 * _normal(K, SIDE))),
    Values("outlier channels x weight", lambda K: (_outliers(SIDE, K), 0.02 * _normal(K, SIDE))),
    Values("heavy tails (t, 2.5) x weight", lambda K: (_student(SIDE, K), 0.02 * _normal(K, SIDE))),
    Values("dW: gradient (t, 2.5) x N(0.3, 1)", lambda K: (_student(SIDE, K), _normal(K, SIDE) + 0.3), True),
    Values("head dX: p - 1(target) x N(0, 0.02)", lambda K: (_dlogits(SIDE, K), 0.02 * _normal(K, SIDE)), True),
    Values("attention: P x N(0, 1)", lambda K: (_attention(SIDE, K), _normal(K, SIDE))),
    Values("all of one sign: |N(0, 1)| x |N(0, 1)|", lambda K: (_normal(SIDE, K).abs(), _normal(K, SIDE).abs())),
)


@dataclass(frozen=True)
class Point:
    """Relative rms error of a mode's product at a K, and the share of its elements that overflowed."""

    values: str
    K: int
    mode: str
    error: float
    overflow: float


def drawn(ks: Iterable[int], modes: Iterable[Mode] = COMPARED, values: Iterable[Values] = VALUES) -> list[Point]:
    """Every mode on the same operands; the exact product is of the operands before they are rounded."""
    modes, points = tuple(modes), []
    for kind in values:
        for K in ks:
            torch.manual_seed(K)
            a, b = kind.draw(K)
            exact = a.double() @ b.double()
            for mode in modes:
                found = matmul(a, b, mode, forms=(mode.gradient if kind.gradient else mode.forward, mode.forward))
                points.append(Point(kind.name, K, mode.name, relative_error(found, exact), overflowed(found)))
    return points


FIRST_IS_GRADIENT = ("dX", "dW", "dP", "dQ", "dK", "head dX", "head dW")
KINDS = ("forward", "dX", "dW", "Q K", "P V", "dP", "dV", "dQ", "dK", "head forward", "head dX", "head dW")


def _forms(what: str, mode: Mode) -> tuple[str, str]:
    first = mode.gradient if what in FIRST_IS_GRADIENT else mode.forward
    return first, mode.gradient if what == "dV" else mode.forward


def multiply(pair: Operands, mode: Mode, scale: float) -> tuple[Tensor, Tensor]:
    """The product, with its gradient times a loss scale that is then taken out again: as it leaves the accumulators, and as it
    is stored, rounded to the 16 bits that the next operation reads (weight gradients and scores stay fp32)."""
    a, b = pair.a, pair.b
    factor = scale if mode.output == "fp16" and (pair.what in FIRST_IS_GRADIENT or pair.what == "dV") else 1.0
    a, b = (a, b * factor) if pair.what == "dV" else (a * factor, b)
    product = matmul(a, b, mode, forms=_forms(pair.what, mode))
    stored = product if pair.what in ("dW", "head dW", "Q K") else round_to(product, mode.output)
    return product / factor, stored / factor


@dataclass(frozen=True)
class Kind:
    """One mode's errors over all matmuls of a kind that were recorded: the median, the largest, and the largest divided by
    bf16's on the very same operands, of the sum as it leaves the accumulators and ``as_stored``, rounded to the 16 bits that
    the next operation reads (weight gradients and scores stay fp32); the share of elements that overflowed."""

    what: str
    mode: str
    K: int
    count: int
    median: float
    worst: float
    beside_bf16: float
    as_stored: float
    overflow: float


def recorded(pairs: list[Operands], scale: float, modes: Iterable[Mode] = COMPARED) -> list[Kind]:
    """By kind and mode. ``scale`` is the loss scale of fp16 modes; gradients of logits have their own, ``SCALE_HEAD``."""
    rows: dict[tuple[str, str], list[tuple[float, float, float, float]]] = defaultdict(list)
    longest: dict[str, int] = defaultdict(int)
    modes = tuple(modes)
    for pair in pairs:
        exact = pair.a.double() @ pair.b.double()
        if not bool(exact.any()):
            continue
        longest[pair.what] = max(longest[pair.what], pair.a.shape[-1])
        bf16, bf16_stored = (relative_error(found, exact) for found in multiply(pair, BF16, 1.0))
        for mode in modes:
            found, stored = multiply(pair, mode, scale_for(pair, scale))
            error = relative_error(found, exact)
            beside = error / bf16, relative_error(stored, exact) / bf16_stored
            rows[pair.what, mode.name].append((error, *beside, overflowed(found)))
    kinds = []
    for what, mode in ((what, mode) for what in KINDS for mode in modes if rows[what, mode.name]):
        errors, beside_bf16, as_stored, overflow = ([row[i] for row in rows[what, mode.name]] for i in range(4))
        figures = (median(errors), max(errors), max(beside_bf16), max(as_stored), max(overflow))
        kinds.append(Kind(what, mode.name, longest[what], len(errors), *figures))
    return kinds


SCALE_HEAD = 2.0**5
"""The loss scale of dlogits, which are at most 1: numerics/ops.py gives it to chunks of 128."""


def scale_for(pair: Operands, scale: float) -> float:
    return SCALE_HEAD if pair.what.startswith("head d") else scale


@dataclass(frozen=True)
class Scaled:
    """Gradients in fp16 at one loss scale: what becomes of them, and of the products, in the worst matmul recorded."""

    scale: float
    to_zero: float  # shares of the non-zero elements of a gradient that a layer hands to the one before
    subnormal: float
    overflow: float
    products_overflow: float  # share of a product's elements: inf or NaN, mostly from inside a chunk
    beside_bf16: float  # error, divided by bf16's


def over_scales(pairs: list[Operands], mode: Mode, exponents: Iterable[int], head: bool) -> list[Scaled]:
    """Gradients of the blocks (``head`` False), or of the logits, at the powers of two given."""
    chosen = [p for p in pairs if (p.what in FIRST_IS_GRADIENT or p.what == "dV") and p.what.startswith("head") == head]
    exact = [p.a.double() @ p.b.double() for p in chosen]
    yardstick = [relative_error(multiply(p, BF16, 1.0)[0], e) for p, e in zip(chosen, exact)]
    rows = []
    for exponent in exponents:
        scale = 2.0**exponent
        gone, small, over, products, beside = 0.0, 0.0, 0.0, 0.0, 0.0
        for pair, reference, bf16 in zip(chosen, exact, yardstick):
            if pair.what in ("dX", "head dX"):
                where = range_of(pair.a * scale, "fp16")
                gone, small, over = max(gone, where.to_zero), max(small, where.subnormal), max(over, where.overflow)
            product, _ = multiply(pair, mode, scale)
            products = max(products, overflowed(product))
            beside = max(beside, relative_error(product, reference) / bf16)
        rows.append(Scaled(scale, gone, small, over, products, beside))
    return rows
