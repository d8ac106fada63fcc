"""The curve itself: what a loss must start at, what it must not do, and the speed it is traced at.

Checks use robust statistics (medians, and the scatter around them), so that a few odd lines of a log decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from fastgpt.common import rounded
from fastgpt.config import EXPERIMENTAL
from fastgpt.doctor.evidence import ConfigFacts, Evals, LogFacts, Place, Steps
from fastgpt.doctor.figures import Figures, learning_rate, steady
from fastgpt.doctor.findings import Finding, check
from fastgpt.hardware.cards import Gpu


def scatter(values: np.ndarray) -> float:
    """A standard deviation that outliers do not move: 1.4826 x the median absolute deviation (exact for a normal
    distribution)."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))


def _losses(log: LogFacts) -> Steps:
    """Steps with a finite loss."""
    return log.steps.where(np.isfinite(log.steps.loss))


@check("curve", section=10)
def not_a_number(log: LogFacts, figures: Figures, config: ConfigFacts, gpu: Gpu | None) -> Iterator[Finding]:
    """NaN or infinity in the loss."""
    notes = log.all("nan")
    if not notes:
        return
    steps, seen, lost = _losses(log), [(notes[0].place, notes[0].text)], 1.0
    before = steps.where(steps.line < (notes[0].place.line or 0))
    if len(before):
        seen.append(log.seen(before, -1))
        lost = max(0.0, 1 - float(before.step[-1]) / figures.steps_seen) if figures.steps_seen else 1.0
    experimental = figures.precision in EXPERIMENTAL
    doubtful = experimental or figures.precision == "fp16"
    has_bf16 = gpu is None or gpu.peak_flops("bf16") is not None
    warms_up = config.get("warmup_iters") and config.get("decay_lr", True)
    yield Finding(
        "nan",
        "critical",
        "The loss is not a number: nothing is learned from here on",
        seen,
        "A NaN in the weights stays there. Usual causes: a learning rate too high for the warmup, fp16 without loss "
        "scaling, token ids beyond vocab_size, a damaged shard."
        + (f" {figures.precision} is experimental: no GPU has confirmed it yet." if experimental else ""),
        (
            ""
            if not doubtful or not has_bf16
            else "dtype = 'bfloat16'\n"
            if gpu or experimental
            else "dtype = 'bfloat16'    # if the card has it\n"
        )
        + "Go back to the last checkpoint before it, with half the learning_rate"
        + (" or twice the warmup_iters." if warms_up else ".")
        + (
            f" In fp16, the only 16 bits that the {gpu.name} has: with loss scaling."
            if doubtful and gpu and not has_bf16
            else ""
        ),
        cost=lost,
        cost_text=figures.hours(lost),
    )


@check("curve", section=10)
def start(log: LogFacts, figures: Figures, config: ConfigFacts) -> Iterator[Finding]:
    """An untrained model guesses among V tokens: its loss is ln V."""
    steps = _losses(log)
    if figures.shape is None or not len(steps) or steps.step[0] > 1 or log.all("resume"):
        return
    if "vocab_size" in figures.assumed:  # nothing to start at
        return
    first, expected = steps.loss[0], math.log(figures.shape.vocab_size)
    if config.get("init_from", "scratch") != "scratch" or abs(first - expected) <= 0.5:
        return
    above = first > expected
    yield Finding(
        "start_far_from_uniform",
        "warning",
        f"The loss starts at {first:.2f}, not near ln({figures.shape.vocab_size:,}) = {expected:.2f}",
        [log.seen(steps, 0)],
        "Above: the initial weights are too large, and the first steps go into undoing that. "
        if above
        else "Below: the model already knows something: weights were loaded, targets leak into the inputs (are they "
        "shifted by one?), or vocab_size is not what the loss is taken over.",
        "Initialise with a standard deviation of 0.02, residual projections with 0.02 / sqrt(2 n_layer)."
        if above
        else "Check the data's shift, vocab_size and init_from.",
        confidence="likely",
        cost=0.02 if above else 0.5,
    )


@check("curve", section=10)
def divergence(log: LogFacts, figures: Figures) -> Iterator[Finding]:
    """The run ends well above where it has been: median of the last tenth against the lowest median of a tenth."""
    steps = _losses(log)
    step, loss = steps.step, steps.loss
    if len(loss) < 20:
        return
    width = max(5, len(loss) // 10)
    starts = np.unique(np.linspace(0, len(loss) - width, 400).astype(int))  # enough places for a log of any length
    medians = np.array([np.median(loss[i : i + width]) for i in starts])
    lowest = int(np.argmin(medians))
    noise = scatter(np.diff(loss[len(loss) // 2 :])) / math.sqrt(2)  # a difference has the noise of two losses
    rise = float(medians[-1] - medians[lowest])
    if rise <= max(0.3, 3 * noise):
        return
    since = int(starts[lowest]) + width // 2
    lost = 1 - float(step[since]) / max(1.0, float(step[-1]))
    yield Finding(
        "divergence",
        "critical",
        f"The loss diverged: {medians[-1]:.2f} at the end, {medians[lowest]:.2f} around step {step[since]:,.0f}",
        [log.seen(steps, since), log.seen(steps, -1)],
        f"The median of the last {width} logged losses lies {rise:.2f} nat above the lowest such median; single "
        f"losses scatter by {noise:.2f}. It does not come back by itself at the same learning rate.",
        "Go back to a checkpoint before it and halve learning_rate; keep grad_clip = 1.0.",
        confidence="likely",
        cost=lost,
        cost_text=figures.hours(lost),
    )


@check("curve", section=10)
def spikes(log: LogFacts) -> Iterator[Finding]:
    """Single losses far above their neighbours, that come back."""
    steps, half = _losses(log), 5
    loss = steps.loss
    if len(loss) < 40:
        return
    padded = np.pad(loss, half, mode="edge")
    around = np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)
    above = loss - around
    noise = scatter(above[len(above) // 10 :])
    out = np.flatnonzero((above > max(0.3, 6 * noise)) & (np.arange(len(loss)) >= len(loss) // 10))
    if not len(out) or len(out) > len(loss) // 5:
        return
    yield Finding(
        "spikes",
        "warning" if len(out) >= 3 else "info",
        f"{len(out)} loss spike{'s' if len(out) > 1 else ''}, the largest {above[out].max():.2f} nat at step "
        f"{steps.step[out[np.argmax(above[out])]]:,}",
        [log.seen(steps, i) for i in out[:5]],
        f"Each lies more than 6 times the usual scatter ({noise:.2f} nat) above the median of the 10 losses around "
        "it, and the loss comes back. The first tenth of the log is left out.",
        "grad_clip = 1.0\nif it is not; a longer warmup or beta2 = 0.95 if they come often; look at the data if "
        "always at one place.",
        "likely",
    )


@check("curve", section=10)
def plateau(log: LogFacts, figures: Figures, config: ConfigFacts) -> Iterator[Finding]:
    """No progress over the last third of the run, judged by a line through the validation losses."""
    evals = log.evals.where(np.isfinite(log.evals.val))
    late = evals.where(slice(2 * len(evals) // 3, None))
    x, y = late.step.astype(float), late.val
    if len(y) < 8 or x[-1] <= x[0]:
        return
    span = x[-1] - x[0]
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    fall, sure = -float(slope) * span, 2 * math.sqrt(covariance[0, 0]) * span
    rate, peak = learning_rate(int(x[0]), config), config.get("learning_rate")
    if fall + sure >= 0.02 or y[-3:].mean() > y[:3].mean() + max(sure, 0.02):
        return
    decayed = rate is not None and bool(peak) and rate < 0.2 * peak
    lost = span / max(1.0, x[-1])
    yield Finding(
        "plateau",
        "warning",
        f"No progress since step {x[0]:,.0f}: val fell by {fall:.3f} +- {sure / 2:.3f} nat in {span:,.0f} steps",
        [log.seen(late, 0), log.seen(late, -1)],
        f"A straight line through the last third of the validation losses ({len(y)}) falls by {fall:.3f} nat, and by "
        "less than 0.02 even at two standard errors: that is what is called a plateau here. "
        + ("The learning rate is near its floor, which alone explains it. " if decayed else ""),
        "Stop here, or lower the learning rate (lr_decay_iters): a plateau at a constant rate often ends with its "
        "decay.",
        "likely",
        lost,
        figures.hours(lost),
    )


@check("curve", section=10)
def overfitting(log: LogFacts, figures: Figures) -> Iterator[Finding]:
    """Validation rises while train falls."""
    both = log.evals.where(np.isfinite(log.evals.val) & np.isfinite(log.evals.train))
    step, train, val = both.step, both.train, both.val
    best = int(np.argmin(val)) if len(val) else 0
    few = len(val) < 8 or len(val) - best < 4
    if few or val[-3:].mean() - val[best] < 0.05 or train[-3:].mean() > train[best] - 0.02:
        if len(both):
            yield from _memorised(log, both, figures)
        return
    lost = 1 - float(step[best]) / max(1.0, float(step[-1]))
    yield Finding(
        "overfitting",
        "warning",
        f"Overfitting since step {step[best]:,}: val rises from {val[best]:.3f} to {val[-1]:.3f} while train falls",
        [log.seen(both, best), log.seen(both, -1)],
        "The model learns the training text by heart: more epochs of it make it worse.",
        "Take the checkpoint of the lowest val; more data, a smaller model, or dropout = 0.1 to 0.2 (here it helps).",
        "likely",
        lost,
        figures.hours(lost),
    )


def _memorised(log: LogFacts, evals: Evals, figures: Figures) -> Iterator[Finding]:
    """Validation far above train after many epochs, without a rise that the evaluations would show."""
    gap = float(evals.val[-1] - evals.train[-1])
    if figures.epochs is None or figures.epochs < 3 or gap < 0.3:
        return
    yield Finding(
        "memorised",
        "warning",
        f"val lies {gap:.2f} nat above train after {figures.epochs:,.0f} epochs: the training text is memorised",
        [log.seen(evals, -1)],
        f"The run has read its {rounded(figures.corpus_tokens or 0)} tokens {figures.epochs:,.0f} times. "
        "What it still gains on them is text learned by heart, which new text does not share.",
        "Take the checkpoint of the lowest val loss, and stop earlier; more data, a smaller model or more dropout put it off.",
        "likely",
        0.5,
    )


@check("curve", section=10)
def throughput_drift(log: LogFacts, figures: Figures) -> Iterator[Finding]:
    """Steps that become slower over the run, or some that are far slower than the rest."""
    rows = np.flatnonzero(steady(log))
    if len(rows) < 20:
        return
    ms, fifth = log.steps.ms[rows], len(rows) // 5
    early, late = float(np.median(ms[:fifth])), float(np.median(ms[-fifth:]))
    noise = scatter(ms - np.median(ms))

    def seen(row: int) -> tuple[Place, str]:
        return log.place(log.steps.line[row]), f"step {log.steps.step[row]}: {log.steps.ms[row]:,.0f} ms"

    if late > 1.03 * early and late - early > 2 * noise / math.sqrt(fifth):
        lost = (1 - early / late) / 2
        yield Finding(
            "throughput_drift",
            "warning",
            f"Steps became {late / early - 1:.0%} slower: {early:,.0f} ms in the first fifth of the log, {late:,.0f} "
            "in the last",
            [seen(int(rows[0])), seen(int(rows[-1]))],
            "Medians of iterations without an evaluation. A card that heats up lowers its clock; another program may "
            "have come, or memory spilled into the host's (Windows does that in silence).",
            "nvidia-smi -q -d PERFORMANCE,TEMPERATURE while it runs: look for 'Thermal Slowdown' or 'Power Cap', and "
            "for other processes.",
            "likely",
            lost,
            figures.hours(lost),
        )
    outliers = rows[ms > 1.25 * np.median(ms)]
    if len(outliers) >= 3 and len(outliers) >= 0.02 * len(rows):
        extra = float((log.steps.ms[outliers] - np.median(ms)).sum() / ms.sum())
        yield Finding(
            "slow_steps",
            "warning" if extra > 0.03 else "info",
            f"{len(outliers)} of {len(rows)} steady steps took more than 1.25 times the median of "
            f"{np.median(ms):,.0f} ms",
            [seen(int(row)) for row in outliers[:4]],
            "Steps of one run do the same work. Something else took the time now and then: a slow disk under the "
            "data (np.memmap reads from it inside the step), another program, a garbage collection.",
            "Keep the training data on a local disk, or in memory. fastgpt's log has the wait for data ('data wait').",
            "possible",
            extra,
            figures.hours(extra),
        )
