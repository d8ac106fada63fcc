"""What the printed MFU means on this card, what slows the run down, and what does not."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastgpt.common import percent, teraflops
from fastgpt.doctor.checks import scaling
from fastgpt.doctor.evidence import LogFacts, Place, Seen
from fastgpt.doctor.figures import ABOVE_NOMINAL, Figures, holds_evaluation, steady
from fastgpt.doctor.findings import Finding, check
from fastgpt.hardware import cards
from fastgpt.hardware.cards import NANOGPT_PEAK, Gpu

MIN_SMS = 68
"""torch/_inductor/utils.py, is_big_gpu()."""
DOUBLE_RATE = (1.71, 1.87)
"""Measured speed of fp16-accumulating against fp32-accumulating matmuls on GeForce cards (not on a 4070)."""


def _other_card(figures: Figures) -> bool:
    """Whether the log reports more than the named card can do."""
    if figures.nominal_tflops is None or figures.mfu_nanogpt is None:
        return False
    return figures.mfu_nanogpt * NANOGPT_PEAK > ABOVE_NOMINAL * figures.nominal_tflops * 1e12


@check("mfu_denominator", section=5)
def mfu_denominator(log: LogFacts, figures: Figures, gpu: Gpu | None) -> Iterator[Finding]:
    """nanoGPT's mfu divides by an A100, whatever the card."""
    if log.kind != "nanogpt" or figures.mfu_printed_last is None:
        return
    if figures.mfu_nanogpt is None or figures.model_tflops is None or _other_card(figures):
        return
    row = int(np.flatnonzero(log.steps.mfu > 0)[-1])
    seen = [(log.place(log.steps.line[row]), f"mfu {log.steps.mfu[row]:.2f}%")]
    if gpu is None or figures.mfu_nominal is None or figures.ceiling_nanogpt is None:
        if log.steps.mfu[np.isfinite(log.steps.mfu)].max() <= 100:
            yield _of_an_a100(figures, seen)
        return
    assert figures.nominal_tflops is not None
    if abs(figures.nominal_tflops * 1e12 / NANOGPT_PEAK - 1) < 0.02:
        return  # an A100: nanoGPT's figure is right
    name = gpu.name.removeprefix("NVIDIA ").removeprefix("GeForce ")
    better = gpu.peak_flops("fp16_fp16acc") or 0.0
    gains = (
        f"{figures.out_of_reach}. "
        if figures.out_of_reach
        else f"At most {1 / figures.mfu_nominal:.2f} times is left in {figures.precision} with fp32 accumulation. "
        if figures.mfu_nominal < 1
        else "Nothing is left in this arithmetic at the nominal clock. "
    )
    if gpu.name == scaling.LARGE.gpu and figures.parameters and figures.parameters < 0.9 * scaling.LARGE.parameters:
        gains += f"On the same card {scaling.LARGE.name} reaches 82%: its matrices are larger. "
    if better > 1.5 * figures.nominal_tflops * 1e12:
        gains += (
            f"Only arithmetic at double rate goes further: fp16 accumulation has a peak of {teraflops(better)} "
            f"here, and elsewhere measured {DOUBLE_RATE[0]} to {DOUBLE_RATE[1]} times the speed of fp32 accumulation "
            "in matmuls."
        )
    yield Finding(
        check="mfu_denominator",
        severity="info",
        title=f"mfu {percent(figures.mfu_nanogpt)} is of an A100; of the {name}'s own peak the run reaches "
        f"{percent(figures.mfu_nominal)}",
        evidence=seen,
        explanation=f"nanoGPT divides by 312 TFLOP/s on every card. The {name}'s nominal dense "
        f"{figures.precision} peak is {figures.nominal_tflops:.1f} TFLOP/s: {percent(figures.ceiling_nanogpt)} "
        f"is the ceiling in nanoGPT's unit. Between evaluations this run does {figures.model_tflops:.1f} "
        f"TFLOP/s per GPU (6N + 12LCT per token): {percent(figures.mfu_nanogpt)} in that unit, "
        f"{percent(figures.mfu_nominal)} of the card. {gains}".strip(),
        advice="Read the figure against the card's ceiling; there is no bottleneck to look for in batch size or data "
        "loading."
        if figures.mfu_nominal > 0.6
        else f"Profile the step: {percent(figures.mfu_nominal)} of the card leaves room (micro-batch, torch.compile, "
        "fused kernels).",
    )


def _of_an_a100(figures: Figures, seen: Seen) -> Finding:
    """What can be said of the figure where the card is not known."""
    assert figures.mfu_nanogpt is not None
    return Finding(
        check="card_unknown",
        severity="info",
        title=f"mfu {percent(figures.mfu_nanogpt)} is of an A100's peak, whatever the card is",
        evidence=seen,
        explanation="nanoGPT divides by 312 TFLOP/s, an A100's dense bf16 peak, on every card. Between evaluations "
        f"this run does {figures.model_tflops:.1f} TFLOP/s per GPU (6N + 12LCT per token); what share of the card's "
        "own peak that is depends on the card.",
        advice="Name the card: --gpu rtx4070, for example.",
    )


@check("mfu_denominator", section=5)
def mfu_not_measured(log: LogFacts, figures: Figures, gpu: Gpu | None) -> Iterator[Finding]:
    """llm.c's -100% and nanochat's 0.00: figures that stand for "this card is not in my table"."""
    if (
        log.kind not in ("llm.c", "nanochat")
        or not np.isfinite(log.steps.ms).any()
        or np.nanmax(log.steps.mfu, initial=0) > 0
    ):
        return
    printed = "-100%" if log.kind == "llm.c" else "0.00"
    real = (
        f"Of the {gpu.name}'s nominal {figures.precision} peak the run reaches {percent(figures.mfu_nominal)} "
        f"({figures.model_tflops:.1f} TFLOP/s per GPU)."
        if gpu is not None and figures.mfu_nominal is not None
        else "With --gpu, and the FLOPs per token that nanochat prints, the doctor computes it; of llm.c also with a config."
    )
    yield Finding(
        check="mfu_not_measured",
        severity="info",
        title=f"MFU {printed} is not a measurement: {log.kind} does not know this card's peak",
        evidence=[(log.place(log.steps.line[-1]), f"step {log.steps.step[-1]}: MFU {printed}")],
        explanation=f"{log.kind} looks the card up in a table of its own and prints {printed} where it is not there. {real}",
        advice="Nothing: speed and loss are as printed.",
    )


@check("mfu_denominator", section=5)
def mfu_other_card(log: LogFacts, figures: Figures, gpu: Gpu | None) -> Iterator[Finding]:
    """A figure that the named card, or an A100, cannot reach: the log is of a faster card."""
    if log.kind != "nanogpt" or figures.mfu_printed_last is None:
        return
    highest = int(np.nanargmax(log.steps.mfu))
    printed = float(log.steps.mfu[highest]) / 100
    if not _other_card(figures) and (
        printed <= 1.0 or gpu is not None
    ):  # of a card that is named mfu_denominator speaks
        return
    rate = max(printed, figures.mfu_nanogpt or 0.0) * NANOGPT_PEAK
    able = [card.name for card in cards.GPUS if (card.peak_flops(figures.arithmetic) or 0) > rate]
    named = f"more than a {gpu.name} can do ({figures.nominal_tflops:.1f}). " if gpu and _other_card(figures) else ""
    yield Finding(
        check="other_card",
        severity="warning" if named else "info",
        title=f"mfu {percent(printed)} is in units of an A100's peak: this log is of "
        + ("another card than the one named" if named else "a faster card, not an impossible run"),
        evidence=[(log.place(log.steps.line[highest]), f"mfu {log.steps.mfu[highest]:.2f}%")],
        explanation="nanoGPT divides by an A100's 312 TFLOP/s on every card, so it prints more than 100% on faster "
        f"ones. {percent(printed)} is {printed * 312:.0f} TFLOP/s per GPU: {named}"
        + (f"Cards with a higher dense peak: {', '.join(able[:6])}." if able else "No card in the table is that fast."),
        advice=f"Name the log's own card in place of the {gpu.name}; if that is its card, give the config of this very run."
        if gpu and named
        else "Nothing."
        if gpu
        else "Name the log's own card: --gpu h100, for example.",
    )


@check("mfu_includes_eval", section=5)
def mfu_includes_eval(log: LogFacts, figures: Figures) -> Iterator[Finding]:
    """nanoGPT's running mean takes in the iterations that evaluated: what it shows is not the speed of training."""
    if log.kind != "nanogpt" or figures.evaluation_ms is None or figures.steady_ms_per_iter is None:
        return
    slow = np.flatnonzero(np.isfinite(log.steps.ms) & holds_evaluation(log) & (log.steps.step > 0))
    last, usual = figures.mfu_printed_last, figures.mfu_nanogpt
    if last is None or usual is None or not len(slow) or last > 0.97 * usual or percent(last) == percent(usual):
        return
    assert figures.evaluation_share is not None and figures.evaluation_minutes_per_day is not None
    every = round(len(log.steps.step[1:]) / len(slow))
    yield Finding(
        check="mfu_includes_eval",
        severity="info",
        title=f"The printed mfu sags to {percent(last)} because it averages evaluations in; training runs at "
        f"{percent(usual)}",
        evidence=[_step(log, int(slow[-1])), *_usual_step(log)],
        explanation="An iteration with an evaluation and a checkpoint takes "
        f"{_seconds(figures.steady_ms_per_iter + figures.evaluation_ms)}, the others "
        f"{_seconds(figures.steady_ms_per_iter)}. nanoGPT's running mean (0.9 old + 0.1 new) sees logged iterations "
        f"only, and 1 in {every} of those evaluated: far more than in the run. Really lost to evaluations and "
        f"checkpoints: {figures.evaluation_minutes_per_day:.0f} minutes per day, {percent(figures.evaluation_share)} of "
        f"the time. Over the whole run, evaluations and all, it is {percent(usual * (1 - figures.evaluation_share))} in "
        "nanoGPT's unit.",
        advice="Nothing to change for speed. To read the mfu of training, look at iterations without an evaluation.",
        cost=figures.evaluation_share,
        cost_text=f"{figures.evaluation_minutes_per_day:.0f} min per day",
    )


def _seconds(ms: float) -> str:
    return f"{ms / 1e3:.1f} s" if ms >= 1000 else f"{ms:.0f} ms"


def _step(log: LogFacts, row: int) -> tuple[Place, str]:
    s = log.steps
    return log.place(s.line[row]), f"iter {s.step[row]}: {s.ms[row]:,.0f} ms, mfu {s.mfu[row]:.2f}%"


def _usual_step(log: LogFacts) -> Seen:
    rows = np.flatnonzero(steady(log))
    return [_step(log, int(rows[-1]))] if len(rows) else []


@check("sm_gate", section=6)
def sm_gate(log: LogFacts, gpu: Gpu | None) -> Iterator[Finding]:
    """ "Not enough SMs to use max_autotune_gemm mode": harmless, and not about the batch."""
    notes = log.all("sm_gate")
    if not notes:
        return
    sms = f"this {gpu.name} has {gpu.sm_count}" if gpu else "smaller cards have fewer"
    yield Finding(
        check="sm_gate",
        severity="info",
        title="'Not enough SMs to use max_autotune_gemm mode' is about the chip, not about the batch or the model",
        evidence=[(notes[0].place, notes[0].text)],
        explanation=f"torch.compile's is_big_gpu() wants {MIN_SMS} SMs (an RTX 3080's) before it generates matmuls of "
        f"its own, and {sms}. It then uses cuBLAS for them and fuses nothing into a matmul; the rest is still "
        "compiled. No batch size, model size or environment variable changes the number of SMs. The kernels of this "
        "library have no such gate: they are tuned per chip.",
        advice="Change nothing in batch or model. With fastgpt: python train.py --kernels triton.",
    )
