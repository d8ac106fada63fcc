"""What a training step would take on a GPU that is not here: a projection, with its known error.

The model is in performance/step_time.py. Here it is compared with measurements: the clock is fitted on one of two real runs of
an RTX 4070 and predicts the other, both ways round, and public figures of other cards and models show the model's error there.
The largest error among the cases that a fit has not seen is every figure's interval. The calibration covers nanoGPT under
torch.compile in bf16 on an RTX 4070, between the sizes of the two runs; any other projection says ``calibrated: false``. The
fitted clocks are in constants.toml; ``python -m bench.project --calibration`` fits them again. Details: docs/projection.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from fastgpt.anatomy import GPT2_40M, GPT2_124M, Shape
from fastgpt.common import UserError, teraflops
from fastgpt.hardware import cards
from fastgpt.hardware.cards import NANOGPT_PEAK, Gpu
from fastgpt.performance import flops
from fastgpt.performance.operations import operations
from fastgpt.performance.step_time import CONSTANTS, DESCRIBED, RANGES, Constants, OperationTime, step_ms, step_times

# ---------------------------------------------------------------- what is known


@dataclass(frozen=True)
class MeasuredRun:
    """A measured speed, and the step that the model projects for comparison. ``low`` and ``high`` in tokens per second."""

    name: str
    gpu: str
    shape: Shape
    low: float
    high: float
    micro_batch: int
    dropout: float = 0.0
    tokens_per_step: int = 524_288
    note: str = ""
    kernels: str = "nanogpt-compile"
    optimizer: str = "adamw"

    @property
    def measured(self) -> float:
        """Tokens per second: the middle of ``low`` and ``high``."""
        return (self.low + self.high) / 2

    def predicted(self, constants: Constants = CONSTANTS) -> float:
        """Tokens per second, as the model projects them."""
        gpu, T = cards.card(self.gpu), self.shape.block_size
        accum = self.tokens_per_step // (self.micro_batch * T)
        step = (self.shape, gpu, self.kernels, "bf16", self.micro_batch, accum, T, self.dropout)
        return 1e3 * self.tokens_per_step / step_ms(*step, constants, self.optimizer)

    def error(self, constants: Constants = CONSTANTS) -> float:
        """Relative error of the predicted step time: above 0, the model is too slow."""
        return self.measured / self.predicted(constants) - 1


MEDIAN_MS = {"40M": 3911.0, "124M": 9350.0}
"""Median duration of a step of 524,288 tokens, from the logs in docs/rtx4070-runs/, without steps that evaluate."""


def _real(name: str, shape: Shape, micro_batch: int, dropout: float) -> MeasuredRun:
    rate = 524_288 / MEDIAN_MS[name] * 1e3
    return MeasuredRun(f"RTX 4070, {name}", "rtx4070", shape, rate, rate, micro_batch, dropout)


RTX_4070 = cards.card("rtx4070")
RUN_40M = _real("40M", GPT2_40M, 16, 0.1)
RUN_124M = _real("124M", GPT2_124M, 8, 0.0)

_ROTARY = replace(GPT2_124M, family="modern", rotary_base=10_000.0, activation="relu2")
_LIKE_MODERN = replace(_ROTARY, block_size=2048, qk_norm=True, tied_head=False, softcap=30.0)
_MUON: dict[str, Any] = {"kernels": "compile", "optimizer": "muon"}
# One program, a card of each kind (rented, PyTorch 2.8): GPT-2's linears and norms have biases there, unlike nanoGPT's runs.
WITH_BIASES = replace(GPT2_124M, bias=True)
ANCHORS = (
    MeasuredRun("H100, 124M", "h100", WITH_BIASES, 466_440, 466_440, 64),
    MeasuredRun("H200, 124M", "h200", WITH_BIASES, 495_147, 495_147, 64),
    MeasuredRun("A100, 124M", "a100", WITH_BIASES, 208_962, 208_962, 64),
    # 6N + 12LCT = 887 MFLOP at T = 2048 says 12 blocks of 768 and one matrix of 32,768 tokens.
    MeasuredRun(
        *("RTX 4070, nanochat d12", "rtx4070", Shape(12, 6, 768, 2048, 32768), 55.7e3, 55.7e3, 8),
        note="assumed; as a GPT-2 of its FLOPs: no Muon, rotary positions, QK norm, ReLU^2 or untied embedding",
    ),
    MeasuredRun(
        *("RTX 4090, rotary 124M", "rtx4090", _ROTARY, 108e3, 108e3, 32),
        **_MUON,
        tokens_per_step=262_144,
        note="half of what two cards reach, one exchange of gradients per step in it: tyler-romero/nanogpt-speedrun, d59944d",
    ),
    MeasuredRun(
        *("A100, rotary 124M", "a100", _LIKE_MODERN, 195e3, 195e3, 32),
        **_MUON,
        note="without the skips between blocks that it has: ashrafs1/nanogpt",
    ),
)
KNOWN = (RUN_124M, RUN_40M, *ANCHORS)


FITTED_CLOCKS: dict[str, float] = DESCRIBED["clock"]["fitted"]
"""The clock that a fit finds on each run."""


@lru_cache
def left_out_errors() -> dict[str, float]:
    """Relative error of the step time of every known case, the clock fitted without it: that of the 124M run, or of the 40M run
    for the 124M run itself."""
    without = replace(CONSTANTS, clock=FITTED_CLOCKS["40M"])
    return {run.name: run.error(without if run == RUN_124M else CONSTANTS) for run in KNOWN}


def calibration_error() -> float:
    """The larger error of the two real runs, each predicted from the other, without its sign."""
    return max(abs(left_out_errors()[run.name]) for run in (RUN_124M, RUN_40M))


def known_errors(gpu: Gpu, without: MeasuredRun | None = None) -> dict[str, float]:
    """Those on the RTX 4070, whose clock is fitted, or for another card those on all other cards. ``without``: as if this run
    were not known. If it is one of the two real runs, the clock is fitted on the other, which is then no case."""
    fitted = gpu == RTX_4070
    same = [run for run in KNOWN if (cards.card(run.gpu) == RTX_4070) == fitted and run != without]
    if without in (RUN_124M, RUN_40M):
        constants = replace(CONSTANTS, clock=FITTED_CLOCKS["40M"]) if without == RUN_124M else CONSTANTS
        return {run.name: run.error(constants) for run in same if run in ANCHORS}
    return {run.name: left_out_errors()[run.name] for run in same}


# ---------------------------------------------------------------- the interval


@dataclass(frozen=True)
class Sensitivity:
    """How the projected step time changes if one constant is at either end of its range, over how nanoGPT's step on the same
    card does: that much of its effect no known error shows, as all known cases are steps of a library's kernels."""

    constant: str
    at_low: float
    at_high: float


def sensitivities(shape: Shape, gpu: Gpu, *step: Any, optimizer: str = "adamw") -> list[Sensitivity]:
    """One for every fixed constant, largest effect first. The arguments are those of step_time.step_ms before ``constants``."""
    plain = "bf16" if gpu.peak_flops("bf16") else "fp16"
    usual = (GPT2_124M, gpu, "nanogpt-compile", plain, 8, 64, 1024, 0.0)

    def beyond(name: str, end: float) -> float:
        moved = replace(CONSTANTS, **{name: end})
        this = step_ms(shape, gpu, *step, moved, optimizer) / step_ms(shape, gpu, *step, CONSTANTS, optimizer)
        return this / (step_ms(*usual, moved) / step_ms(*usual, CONSTANTS)) - 1

    found = [Sensitivity(name, *(beyond(name, end) for end in ends)) for name, ends in RANGES.items()]
    return sorted(found, key=lambda s: -max(abs(s.at_low), abs(s.at_high)))


def jackknife(errors: Iterable[float]) -> float:
    """How far a measured step may be from its projection, as a factor: the largest of these errors.

    They are leave-one-out residuals (the jackknife). Where nothing was fitted on the n cases, and the next one could as well
    have been any of them, it lies inside with probability n / (n + 1), as each of the n + 1 is as likely to be the worst.
    Where something was, nothing of the kind is proven (Barber et al. 2021).
    """
    return max(max(1 + error, 1 / (1 + error)) for error in errors)


def interval_without(run: MeasuredRun) -> tuple[float, bool]:
    """The factor that the model states when it does not know of ``run``, and whether that is inside."""
    factor = jackknife(known_errors(cards.card(run.gpu), run).values())
    return factor, jackknife([left_out_errors()[run.name]]) <= factor


def is_calibrated(shape: Shape, gpu: Gpu, kernels: str, precision: str, T: int) -> bool:
    """Whether the two runs say something about this: their card, program and precision, and a size between theirs."""
    between = GPT2_40M.n_embd <= shape.n_embd <= GPT2_124M.n_embd and shape.n_layer == 12 and T == 1024
    return gpu == RTX_4070 and (kernels, precision) == ("nanogpt-compile", "bf16") and between


# ---------------------------------------------------------------- a projection


@dataclass(frozen=True)
class Projection:
    """A step as projected. Times in milliseconds per optimizer step; low and high are an interval, not a guarantee."""

    gpu: str
    kernels: str
    precision: str
    micro_batch: int
    grad_accum: int
    T: int
    ms_per_step: float
    ms_per_step_low: float
    ms_per_step_high: float
    tokens_per_second: float
    tokens_per_second_low: float
    tokens_per_second_high: float
    mfu: float
    """The share of the card's nominal peak in the arithmetic that ``mfu_of`` names, FLOPs by nanoGPT's formula (flops.palm)."""
    mfu_of: str
    mfu_nanogpt: float
    """The same FLOPs of an A100's 312 TFLOP/s: what nanoGPT prints."""
    operations: list[OperationTime]
    calibrated: bool
    calibration_error: float
    known_errors: dict[str, float]
    """``known_errors`` of the card."""
    sensitivities: list[Sensitivity]

    @property
    def tokens_per_step(self) -> int:
        return self.micro_batch * self.grad_accum * self.T

    @property
    def status(self) -> str:
        """What has to stand beside every figure."""
        text = f"projected{'' if self.calibrated else ', uncalibrated'}, calibration error {self.calibration_error:.1%}"
        worst = max(map(abs, self.known_errors.values()))
        return text if worst <= self.calibration_error else f"{text}, {worst:.0%} off in a known case on other cards"

    def to_json(self) -> dict[str, Any]:
        """Plain values, ``projected: true`` among them."""
        return {"projected": True, "status": self.status, "tokens_per_step": self.tokens_per_step, **asdict(self)}


def project(
    shape: Shape,
    gpu: Gpu,
    *,
    kernels: str = "triton",
    precision: str = "bf16",
    micro_batch: int,
    tokens_per_step: int,
    T: int | None = None,
    dropout: float = 0.0,
    optimizer: str = "adamw",
) -> Projection:
    """Predict one optimizer step of ``tokens_per_step`` tokens, in micro-batches of ``micro_batch`` sequences of ``T``.

    ``kernels``: nanogpt-compile, eager, compile or triton. ``precision``: bf16 or fp16; fp16-fast (fp16 accumulation in
    chunks) and fp8 take the matrix products of the linears to the measured, never the doubled, rate.
    Raises UserError for other names, for sizes that do not fit together, and where ``gpu`` lacks the arithmetic.
    """
    T = shape.block_size if T is None else T
    ops = operations(
        shape, kernels, micro_batch, T, precision, dropout=dropout, sm_count=gpu.sm_count, optimizer=optimizer
    )
    tokens = micro_batch * T
    if tokens_per_step < tokens or tokens_per_step % tokens:
        nearest = max(1, round(tokens_per_step / tokens)) * tokens
        raise UserError(
            f"tokens_per_step is {tokens_per_step}: it must be a multiple of micro_batch x T = {tokens}, such as {nearest}"
        )
    accum = tokens_per_step // tokens
    step = (shape, gpu, kernels, precision, micro_batch, accum, T, dropout)
    times = step_times(ops, accum, gpu, precision, CONSTANTS)
    ms = sum(op.ms for op in times)
    calibrated = is_calibrated(shape, gpu, kernels, precision, T)
    varied = sensitivities(*step, optimizer=optimizer)
    factor = 1 + calibration_error() if calibrated else jackknife(known_errors(gpu).values())
    ms_low = ms * math.exp(-math.hypot(math.log(factor), *(math.log1p(min(0.0, s.at_low, s.at_high)) for s in varied)))
    ms_high = ms * math.exp(math.hypot(math.log(factor), *(math.log1p(max(0.0, s.at_low, s.at_high)) for s in varied)))
    arithmetic = cards.arithmetic_of(precision)
    peak = gpu.peak_flops(arithmetic)
    assert peak is not None  # step_times has asked
    rate, per_token = 1e3 * tokens_per_step / ms, flops.palm(shape, T)
    return Projection(
        gpu=gpu.name,
        kernels=kernels,
        precision=precision,
        micro_batch=micro_batch,
        grad_accum=accum,
        T=T,
        ms_per_step=ms,
        ms_per_step_low=ms_low,
        ms_per_step_high=ms_high,
        tokens_per_second=rate,
        tokens_per_second_low=1e3 * tokens_per_step / ms_high,
        tokens_per_second_high=1e3 * tokens_per_step / ms_low,
        mfu=rate * per_token / peak,
        mfu_of=f"nominal dense {arithmetic} peak, {teraflops(peak)}",
        mfu_nanogpt=rate * per_token / NANOGPT_PEAK,
        operations=times,
        calibrated=calibrated,
        calibration_error=calibration_error(),
        known_errors=known_errors(gpu),
        sensitivities=varied,
    )
