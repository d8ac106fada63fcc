"""What this machine reaches, measured in process: copy bandwidth and matmul rates. The nominal figures are in
fastgpt/hardware/cards.py.
"""

from __future__ import annotations

import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fastgpt.common import cache_dir, read_json, write_json
from fastgpt.config import PLAIN
from fastgpt.hardware import cards
from fastgpt.hardware.cards import ARITHMETICS
from fastgpt.hardware.device import device_name


def arithmetics(precision: str) -> tuple[str, ...]:
    """Which of cards.ARITHMETICS the matmuls of a step use at this --precision. MFU is a share of the first one's peak."""
    rest = (PLAIN[precision],) if precision in PLAIN else ()
    return cards.arithmetic_of(precision), *rest


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached: the roofs that a step of ours is judged by, beside the nominal ones."""

    device: str
    host: str
    torch: str
    threads: int  # of torch on a CPU; 0 on a GPU
    copy_gbs: float  # bytes read + bytes written, per second
    matmul_tflops: dict[str, float | None]  # per arithmetic; None where torch cannot run it here

    def peak_flops(self, arithmetic: str) -> float | None:
        """Measured FLOP per second, or None where this arithmetic was not measured."""
        tflops = self.matmul_tflops.get(arithmetic)
        return None if tflops is None else tflops * 1e12


def measured_ceilings(device: torch.device | str, refresh: bool = False) -> Ceilings:
    """Copy bandwidth and matmul rate per arithmetic of ``device``.

    Measured once per machine, torch version and thread count (about three seconds) and kept as JSON in ``cache_dir()``;
    ``refresh`` measures again. A cache file that does not parse is replaced; a message says so where none can be written.
    """
    device = torch.device(device)
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    name, host, version = device_name(device), platform.node(), str(torch.__version__)
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", f"{name}-{host}-{version}-{threads}")
    path = cache_dir() / f"ceilings-{slug}.json"
    if not refresh and (kept := _read(path)) is not None:
        return kept
    rates = {arithmetic: _matmul_tflops(arithmetic, device) for arithmetic in ARITHMETICS}
    ceilings = Ceilings(name, host, version, threads, _copy_gbs(device), rates)
    try:
        write_json(path, asdict(ceilings))
    except OSError as error:
        print(f"measured ceilings are not kept: {error}", file=sys.stderr)
    return ceilings


def _read(path: Path) -> Ceilings | None:
    """The cached figures; None if the file is absent or not what ``measured_ceilings`` writes."""
    try:
        kept = Ceilings(**(read_json(path) or {}))
        figures = [kept.copy_gbs, *(rate for rate in kept.matmul_tflops.values() if rate is not None)]
        return kept if set(kept.matmul_tflops) == set(ARITHMETICS) and min(figures) > 0 else None
    except (TypeError, AttributeError):
        return None


def _fastest(work: Callable[[], object], device: torch.device, budget_s: float) -> float:
    """Seconds of the fastest of at least three runs, and of more while the budget lasts."""
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    times: list[float] = []
    work()
    wait()
    while len(times) < 3 or sum(times) < budget_s:
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)


def _copy_gbs(device: torch.device) -> float:
    """Copy between two buffers far larger than any cache."""
    size = 2**29 if device.type == "cuda" else 2**27
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source), device, budget_s=0.3) / 1e9


def _matmul_tflops(arithmetic: str, device: torch.device) -> float | None:
    """Best rate over square matmuls that grow until one takes long enough; None if torch refuses the arithmetic."""
    cuda = device.type == "cuda"
    if not cuda and arithmetic not in ("bf16", "fp16", "fp32"):
        return None
    best, long_enough_s = 0.0, 0.02
    try:
        with _matmul_mode(arithmetic):
            for n in (2048, 4096, 8192) if cuda else (256, 512, 1024, 2048):
                seconds = _fastest(_matmul(arithmetic, n, device), device, budget_s=0.1)
                best = max(best, 2 * n**3 / seconds / 1e12)
                if seconds > long_enough_s:
                    break
    except (RuntimeError, ValueError, AttributeError):  # no such arithmetic here, or no memory for a larger one
        pass
    return best or None


def _matmul(arithmetic: str, n: int, device: torch.device) -> Callable[[], object]:
    """One n x n x n matmul. Random operands: zeros draw less power and run at a higher clock."""
    a, b = torch.randn(2, n, n, device=device)
    if arithmetic == "fp8_fp16acc":
        raise RuntimeError("torch has no fp8 matmul that accumulates in fp16")
    if arithmetic == "fp8":
        a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t(), torch.ones((), device=device)
        return lambda: torch._scaled_mm(a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    dtype = torch.bfloat16 if arithmetic == "bf16" else torch.float16 if "fp16" in arithmetic else torch.float32
    a, b = a.to(dtype), b.to(dtype)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


@contextmanager
def _matmul_mode(arithmetic: str) -> Iterator[None]:
    """torch's switches for tf32 and for fp16 accumulation, put back afterwards."""
    flags = torch.backends.cuda.matmul
    precision, fp16_accumulation = torch.get_float32_matmul_precision(), flags.allow_fp16_accumulation
    try:
        torch.set_float32_matmul_precision("high" if arithmetic == "tf32" else "highest")
        flags.allow_fp16_accumulation = arithmetic == "fp16_fp16acc"
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        flags.allow_fp16_accumulation = fp16_accumulation
