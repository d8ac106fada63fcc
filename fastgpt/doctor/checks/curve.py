"""The curve itself: what a loss must start at, what it must not do, and the speed it is traced at.

Checks use robust statistics (medians, and the scatter around them), so that a few odd lines of a log decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import wraps

import numpy as np

from fastgpt.common import rounded
from fastgpt.config import EXPERIMENTAL
from fastgpt.doctor.evidence import Evidence, LogFacts, Place
from fastgpt.doctor.figures import Figures, evaluation_interval, learning_rate, steady
from fastgpt.doctor.findings import Check, Confidence, Finding, check
from fastgpt.hardware.cards import Gpu

MUCH_EVALUATION = 0.05


def scatter(values: np.ndarray) -> float:
    """A standard deviation that outliers do not move: 1.4826 x the median absolute deviation (exact for a normal
    distribution)."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))


def of_log(function: Callable[[LogFacts, Figures], Iterator[Finding]]) -> Check:
    """Register a check that looks at the log, where there is one."""

    @check("curve", section=10)
    @wraps(function)
    def checked(evidence: Evidence, figures: Figures, gpu: Gpu | None) -> Iterator[Finding]:
        if evidence.log is not None:
            yield from function(evidence.log, figures)

    return checked


def _losses(log: LogFacts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, losses and lines, finite ones only."""
    good = np.isfinite(log.steps.loss)
    return log.steps.step[good], log.steps.loss[good], log.steps.line[good]


def _at(log: LogFacts, line: int, step: int, loss: float) -> tuple[Place, str]:
    return log.place(line), f"step {step}: loss {loss:.4f}"


@check("curve", section=10)
def not_a_number(evidence: Evidence, figures: Figures, gpu: Gpu | None) -> Iterator[Finding]:
    """NaN or infinity in the loss."""
    log = evidence.log
    notes = log.all("nan") if log is not None else []
    if log is None or not notes:
        return
    step, loss, line = _losses(log)
    before = line < (notes[0].place.line or 0)
    seen = [(notes[0].place, notes[0].text)]
    if before.any():
        seen.append(_at(log, line[before][-1], step[before][-1], loss[before][-1]))
    lost = 1 - float(step[before][-1]) / figures.steps_seen if before.any() and figures.steps_seen else 1.0
    lost = max(0.0, lost)
    experimental = figures.precision in EXPERIMENTAL
    doubtful = experimental or figures.precision == "fp16"
    has_bf16 = gpu is None or gpu.peak_flops("bf16") is not None
    warms_up = figures.config.get("warmup_iters") and figures.config.get("decay_lr", True)
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


@of_log
def start(log: LogFacts, figures: Figures) -> Iterator[Finding]:
    """An untrained model guesses among V tokens: its loss is ln V."""
    step, loss, line = _losses(log)
    if figures.shape is None or not len(step) or step[0] > 1 or log.all("resume"):
        return
    if "vocab_size" in figures.assumed:  # nothing to start at
        return
    if figures.config.get("init_from", "scratch") != "scratch":
        return
    expected = math.log(figures.shape.vocab_size)
    if abs(loss[0] - expected) <= 0.5:
        return
    above = loss[0] > expected
    yield Finding(
        "start_far_from_uniform",
        "warning",
        f"The loss starts at {loss[0]:.2f}, not near ln({figures.shape.vocab_size:,}) = {expected:.2f}",
        [_at(log, line[0], step[0], loss[0])],
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


@of_log
def divergence(log: LogFacts, figures: Figures) -> Iterator[Finding]:
    """The run ends well above where it has been: median of the last tenth against the lowest median of a tenth."""
    step, loss, line = _losses(log)
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
        [_at(log, line[since], step[since], loss[since]), _at(log, line[-1], step[-1], loss[-1])],
        f"The median of the last {width} logged losses lies {rise:.2f} nat above the lowest such median; single "
        f"losses scatter by {noise:.2f}. It does not come back by itself at the same learning rate.",
        "Go back to a checkpoint before it and halve learning_rate; keep grad_clip = 1.0.",
        confidence="likely",
        cost=lost,
        cost_text=figures.hours(lost),
    )


@of_log
def spikes(log: LogFacts, figures: Figures) -> Iterator[Finding]:
    """Single losses far above their neighbours, that come back."""
    step, loss, line = _losses(log)
    if len(loss) < 40:
        return
    half = 5
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
        f"{step[out[np.argmax(above[out])]]:,}",
        [_at(log, line[i], step[i], loss[i]) for i in out[:5]],
        f"Each lies more than 6 times the usual scatter ({noise:.2f} nat) above the median of the 10 losses around "
        "it, and the loss comes back. The first tenth of the log is left out.",
        "grad_clip = 1.0\nif it is not; a longer warmup or beta2 = 0.95 if they come often; look at the data if "
        "always at one place.",
        "likely",
    )


@of_log
def plateau(log: LogFacts, figures: Figures) -> Iterator[Finding]:
    """No progress over the last third of the run, judged by a line through the validation losses."""
    good = np.isfinite(log.evals.val)
    step, val, line = log.evals.step[good], log.evals.val[good], log.evals.line[good]
    late = slice(2 * len(val) // 3, None)
    x, y, lines = step[late].astype(float), val[late], line[late]
    if len(y) < 8 or x[-1] <= x[0]:
        return
    span = x[-1] - x[0]
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    fall, sure = -float(slope) * span, 2 * math.sqrt(covariance[0, 0]) * span
    rate, peak = learning_rate(int(x[0]), figures.config), figures.config.get("learning_rate")
    if fall + sure >= 0.02 or y[-3:].mean() > y[:3].mean() + max(sure, 0.02):
        return
    decayed = rate is not None and bool(peak) and rate < 0.2 * peak
    lost = span / max(1.0, float(step[-1]))
    yield Finding(
        "plateau",
        "warning",
        f"No progress since step {x[0]:,.0f}: val fell by {fall:.3f} +- {sure / 2:.3f} nat in {span:,.0f} steps",
        [
            (log.place(lines[0]), f"step {x[0]:.0f}: val {y[0]:.4f}"),
            (log.place(lines[-1]), f"step {x[-1]:.0f}: val {y[-1]:.4f}"),
        ],
        f"A straight line through the last third of the validation losses ({len(y)}) falls by {fall:.3f} nat, and by "
        "less than 0.02 even at two standard errors: that is what is called a plateau here. "
        + ("The learning rate is near its floor, which alone explains it. " if decayed else ""),
        "Stop here, or lower the learning rate (lr_decay_iters): a plateau at a constant rate often ends with its "
        "decay.",
        "likely",
        lost,
        figures.hours(lost),
    )


@of_log
def overfitting(log: LogFacts, figures: Figures) -> Iterator[Finding]:
    """Validation rises while train falls."""
    good = np.isfinite(log.evals.val) & np.isfinite(log.evals.train)
    step, train, val, line = (a[good] for a in (log.evals.step, log.evals.train, log.evals.val, log.evals.line))
    best = int(np.argmin(val)) if len(val) else 0
    few = len(val) < 8 or len(val) - best < 4
    if few or val[-3:].mean() - val[best] < 0.05 or train[-3:].mean() > train[best] - 0.02:
        yield from _memorised(log, figures)
        return
    lost = 1 - float(step[best]) / max(1.0, float(step[-1]))
    yield Finding(
        "overfitting",
        "warning",
        f"Overfitting since step {step[best]:,}: val rises from {val[best]:.3f} to {val[-1]:.3f} while train falls",
        [
            (log.place(line[best]), f"step {step[best]}: train {train[best]:.4f}, val {val[best]:.4f}"),
            (log.place(line[-1]), f"step {step[-1]}: train {train[-1]:.4f}, val {val[-1]:.4f}"),
        ],
        "The model learns the training text by heart: more epochs of it make it worse.",
        "Take the checkpoint of the lowest val; more data, a smaller model, or dropout = 0.1 to 0.2 (here it helps).",
        "likely",
        lost,
        figures.hours(lost),
    )


def _memorised(log: LogFacts, figures: Figures) -> Iterator[Finding]:
    """Validation far above train after many epochs, without a rise that the evaluations would show."""
    both = np.flatnonzero(np.isfinite(log.evals.val) & np.isfinite(log.evals.train))
    if not len(both) or figures.epochs is None or figures.epochs < 3:
        return
    row = both[-1]
    train, val = float(log.evals.train[row]), float(log.evals.val[row])
    if val - train < 0.3:
        return
    yield Finding(
        "memorised",
        "warning",
        f"val lies {val - train:.2f} nat above train after {figures.epochs:,.0f} epochs: the training text is memorised",
        [(log.place(log.evals.line[row]), f"step {log.evals.step[row]}: train {train:.4f}, val {val:.4f}")],
        f"The run has read its {rounded(figures.corpus_tokens or 0)} tokens {figures.epochs:,.0f} times. "
        "What it still gains on them is text learned by heart, which new text does not share.",
        "Take the checkpoint of the lowest val loss, and stop earlier; more data, a smaller model or more dropout put it off.",
        "likely",
        0.5,
    )


@of_log
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


@check("curve", section=10)
def evaluation_time(evidence: Evidence, figures: Figures, gpu: Gpu | None) -> Iterator[Finding]:
    """More than a twentieth of the time spent on evaluations: as measured, else as counted from the config."""
    share, how = figures.evaluation_share, "measured in the log"
    confidence: Confidence = "certain"
    if share is None:
        share, confidence = counted_share(figures, evidence.log), "likely"
        each = "both splits" if figures.config.kind == "nanogpt" else "the validation split"
        how = f"forward passes of {each} at a third of a training step's FLOPs"
    if share is None or share <= MUCH_EVALUATION:
        return
    interval = evaluation_interval(figures.config, evidence.log)
    batches, total = figures.config.get("eval_iters"), figures.config.get("max_iters")
    fewer = (
        (1 / MUCH_EVALUATION - 1) * share / (1 - share) if share < 1 else math.inf
    )  # by which evaluations have to shrink
    longer = _round_up((interval or 1) * fewer) if fewer < 1e9 else 0
    advice = f"eval_interval = {longer}"
    if not longer or (total and longer > total / 2):  # too few would be left of them
        advice = f"eval_iters = {max(1, int(batches / fewer))}" if batches else "Fewer batches per evaluation."
    yield Finding(
        "evaluation_time",
        "warning",
        f"{share:.0%} of the time goes into evaluations ({share * 24 * 60:.0f} minutes per day)",
        figures.place("eval_interval", "eval_iters"),
        f"One every {interval} steps" + (f", {batches} batches a split" if batches else "") + f" ({how}).",
        advice,
        confidence,
        share,
        figures.hours(share),
    )


def _round_up(number: float) -> int:
    """The next number of two digits and zeros."""
    unit = 10 ** max(0, int(math.log10(max(number, 1.0))) - 1)
    return math.ceil(number / unit) * unit


def counted_share(figures: Figures, log: LogFacts | None) -> float | None:
    """Share of the time that evaluations will take, by their FLOPs; None where there is a log, or a setting is missing."""
    interval, iters, batch = (figures.config.get(name) for name in ("eval_interval", "eval_iters", "batch_size"))
    block, tokens = figures.config.get("block_size"), figures.tokens_per_step
    if log is not None or not (interval and iters and batch and block and tokens):
        return None
    splits = 2 if figures.config.kind == "nanogpt" else 1
    extra = splits * iters * batch * block / 3
    return extra / (extra + interval * tokens)
