"""What a GPU can do: dense peak per arithmetic, memory, the limits of an SM.

A nominal peak is SMs x boost clock x FLOP per clock per SM (``ARCHS``): dense, never sparse. GeForce cards run their
tensor cores at half rate when they accumulate in fp32; workstation and data-centre cards do not. A card that is not in
``GPUS`` has no nominal peak: ``lookup`` returns None, never another card. Nothing here touches CUDA at import.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastgpt.common import UserError, packaged_toml

if TYPE_CHECKING:
    import torch

ARITHMETICS = ("bf16", "fp16", "fp16_fp16acc", "fp8", "fp8_fp16acc", "tf32", "fp32")
"""Operand type, accumulating in fp32 unless the name says fp16acc. "fp32" is the plain cores, without tensor cores."""

NANOGPT_PEAK = 312e12
"""What nanoGPT's mfu divides by, whatever the card: an A100's dense bf16 peak, FLOP per second."""

HALVED = frozenset({"bf16", "fp16", "fp8", "tf32"})
"""What a GeForce card does at half the architecture's rate: tensor-core arithmetic that accumulates in fp32."""


@dataclass(frozen=True)
class Arch:
    """One compute capability: dense FLOP per clock per SM at full rate, and the limits of an SM."""

    name: str
    rates: dict[str, int]
    shared_per_sm: int  # bytes
    shared_per_block: int  # bytes, after opting in
    max_warps: int  # per SM
    max_blocks: int  # per SM
    registers: int = 65536  # per SM, 32 bits each


def _rates(fp16: int, fp32: int, *, bf16: bool = True, fp8: bool = False) -> dict[str, int]:
    """tf32 runs at half the fp16 rate and fp8 at twice; chips without bf16 have no tf32 either."""
    rates = {"fp16": fp16, "fp16_fp16acc": fp16, "fp32": fp32}
    if bf16:
        rates |= {"bf16": fp16, "tf32": fp16 // 2}
    if fp8:
        rates |= {"fp8": 2 * fp16, "fp8_fp16acc": 2 * fp16}
    return rates


# Rates: NVIDIA's whitepapers (Volta, Turing, A100, GA102, Ada, Hopper, RTX Blackwell). Limits: CUDA C++ Programming
# Guide, "Technical Specifications per Compute Capability".
ARCHS = {
    "sm_70": Arch("Volta", _rates(1024, 128, bf16=False), 98304, 98304, 64, 32),
    "sm_75": Arch("Turing", _rates(1024, 128, bf16=False), 65536, 65536, 32, 16),
    "sm_80": Arch("Ampere", _rates(2048, 128), 167936, 166912, 64, 32),
    "sm_86": Arch("Ampere", _rates(1024, 256), 102400, 101376, 48, 16),
    "sm_89": Arch("Ada", _rates(1024, 256, fp8=True), 102400, 101376, 48, 24),
    "sm_90": Arch("Hopper", _rates(4096, 256, fp8=True), 233472, 232448, 64, 32),
    "sm_120": Arch("Blackwell", _rates(1024, 256, fp8=True), 102400, 101376, 48, 24),
}


@dataclass(frozen=True)
class Gpu:
    """One product. ``name`` is the string that torch.cuda.get_device_name gives, letter by letter."""

    name: str
    arch: str  # key of ARCHS
    sm_count: int
    boost_mhz: int  # the clock that NVIDIA's tensor-core figures are for
    memory_gbs: float
    vram_gb: int
    l2_mb: int
    power_w: int  # the board's limit
    source: str
    short: tuple[str, ...] = ()  # further short names
    fp32_mhz: int | None = None  # where NVIDIA's fp32 figure is for a clock of its own

    @property
    def chip(self) -> Arch:
        return ARCHS[self.arch]

    @property
    def full_rate(self) -> bool:
        """Whether tensor cores that accumulate in fp32 run at the architecture's rate; False on GeForce, see HALVED."""
        return "GeForce" not in self.name

    def peak_flops(self, arithmetic: str) -> float | None:
        """Dense FLOP per second, or None where the chip does not have this arithmetic."""
        if arithmetic not in ARITHMETICS:
            raise ValueError(f"arithmetic is {arithmetic!r}: it must be one of {', '.join(ARITHMETICS)}")
        rate = self.chip.rates.get(arithmetic)
        if rate is None:
            return None
        if arithmetic in HALVED and not self.full_rate:
            rate //= 2
        mhz = self.fp32_mhz if arithmetic == "fp32" and self.fp32_mhz else self.boost_mhz
        return self.sm_count * rate * mhz * 1e6

    def to_json(self) -> dict[str, Any]:
        peaks = {a: self.peak_flops(a) for a in ARITHMETICS}
        dense = {a: None if p is None else round(p / 1e12, 1) for a, p in peaks.items()}
        keys = ("name", "arch", "sm_count", "boost_mhz", "memory_gbs", "vram_gb", "l2_mb")
        return {key: getattr(self, key) for key in keys} | {"dense_tflops": dense, "source": self.source}


def _table() -> list[Gpu]:
    found = []
    for family in packaged_toml("fastgpt.hardware", "cards.toml")["family"]:
        for name, *figures in family["cards"]:
            more = figures.pop() if isinstance(figures[-1], dict) else {}
            more["short"] = tuple(more.get("short", ()))
            found.append(Gpu(family["prefix"] + name, family["arch"], *figures, family["source"], **more))  # type: ignore[call-arg]
    return found


GPUS = _table()
"""Every card of cards.toml, in its order."""


def _key(name: str) -> str:
    """Letters and digits of a name, without NVIDIA, Tesla and GeForce before it and GPU behind it."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    while words and words[0] in ("nvidia", "tesla", "geforce"):
        words.pop(0)
    return re.sub(r"(?<=laptop)gpu$", "", "".join(words))


def _short_names(gpu: Gpu) -> set[str]:
    """What may be typed for this card: its name without the maker, and without RTX if it is a number (4070)."""
    key = _key(gpu.name)
    return {key, re.sub(r"^rtx", "", key), *gpu.short}


def lookup(name: str, *, sm_count: int | None = None, vram_gb: float | None = None) -> Gpu | None:
    """The card of this name: torch's device string, or a short form (rtx4070, 4070, h100, a6000). None if unknown.

    Names match whole: a 4070 is not a 4070 Ti, and an H100's MIG slice is nothing in the table. ``sm_count`` must
    agree if given (an RTX 3080 has 68 SMs or 70); ``vram_gb`` then chooses between cards that share a name.
    """
    key = _key(name)
    # Short forms are for people: a driver that says "NVIDIA H100" means some card that is not in the table.
    from_driver = re.match(r"\s*(nvidia|tesla)\b", name, re.IGNORECASE)
    found = [g for g in GPUS if key == _key(g.name) or (not from_driver and key in _short_names(g))]
    if sm_count is not None:
        found = [g for g in found if g.sm_count == sm_count]
    if vram_gb is not None:
        found.sort(key=lambda g: abs(g.vram_gb - vram_gb))
    return found[0] if found else None


def nearest(name: str, count: int = 5) -> list[str]:
    """Names in the table that look most like ``name``."""
    known = {short: gpu.name for gpu in reversed(GPUS) for short in sorted(_short_names(gpu))}
    close = difflib.get_close_matches(_key(name), known, n=len(known), cutoff=0.0)
    return list(dict.fromkeys(known[short] for short in close))[:count]


def card(name: str, *, option: str = "gpu", otherwise: str = "") -> Gpu:
    """The card that a user named with ``option``, by ``lookup``. Raises UserError with the nearest names if there is none;
    ``otherwise``: what can be done instead of naming another."""
    found = lookup(name)
    if found is None:
        raise UserError(
            f"{option} is {name!r}, which is not in the table: nearest are {', '.join(nearest(name))}{otherwise}"
        )
    return found


def present(device: torch.device | str | int | None = None) -> Gpu | None:
    """The table's entry for the CUDA device that is here. None without one, or if it is not in the table."""
    import torch

    if not torch.cuda.is_available() or (device is not None and torch.device(device).type != "cuda"):
        return None
    props = torch.cuda.get_device_properties(device)
    return lookup(props.name, sm_count=props.multi_processor_count, vram_gb=props.total_memory / 2**30)


def arithmetic_of(precision: str) -> str:
    """The arithmetic that decides the speed of a --precision: "fp16-fast" accumulates in fp16."""
    arithmetic = {"fp16-fast": "fp16_fp16acc"}.get(precision, precision)
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"precision is {precision!r}: it must be one of fp32, tf32, bf16, fp16, fp16-fast, fp8")
    return arithmetic


def gains(precision: str, gpu: Gpu | None) -> bool:
    """Whether a --precision computes faster on ``gpu`` than its plain 16-bit arithmetic, by nominal peaks.

    "fp16-fast" does on GeForce, whose tensor cores accumulate in fp16 at twice the rate, and on no other card; "fp8" from Ada
    and Hopper on. False for a card that is not in the table, or does not have the arithmetic. Raises ValueError for a
    precision that ``arithmetic_of`` does not know."""
    arithmetic = arithmetic_of(precision)
    if gpu is None:
        return False
    plain, peak = gpu.peak_flops("bf16") or gpu.peak_flops("fp16"), gpu.peak_flops(arithmetic)
    return peak is not None and plain is not None and peak > plain


def peak_flops(device: torch.device | str, precision: str) -> float | None:
    """Nominal dense FLOP per second of the device at a --precision; None on a CPU and on a card not in the table."""
    arithmetic = arithmetic_of(precision)
    gpu = present(device)
    return None if gpu is None else gpu.peak_flops(arithmetic)
