"""The figures of a run, computed once: each None where the evidence does not say. Formulas are in docs/doctor.md."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from fastgpt import anatomy
from fastgpt.anatomy import Shape
from fastgpt.config import EXPERIMENTAL, PLAIN
from fastgpt.doctor.evidence import ConfigFacts, Evidence, LogFacts, Seen
from fastgpt.hardware import cards
from fastgpt.hardware.cards import NANOGPT_PEAK, Gpu
from fastgpt.performance import flops

SETTLED = 3000
"""Losses are compared from this step on (from the middle of a shorter run): before it the curve is so steep that a
straight line between two evaluations lies visibly above it."""

ABOVE_NOMINAL = 1.15
"""Boards run a few percent above the clock of the nominal peak (a 4070 holds 2.6-2.8 GHz, the peak is for 2.475);
beyond this the log is of another card."""

KNOWN_CORPORA = {"openwebtext": 9_035_582_198, "shakespeare": 301_966, "shakespeare_char": 1_003_854}
"""Training tokens that nanoGPT's own preparation scripts give."""


@dataclass(frozen=True)
class Mean:
    """A mean with its standard error, over ``n`` values from step ``since`` on."""

    value: float
    error: float
    n: int
    since: int

    @classmethod
    def of(cls, values: np.ndarray, since: int) -> Mean | None:
        """The mean, with the standard error of independent values: those of a training log are (each is another batch; in
        the two real logs the autocorrelation at lag 1 is 0.04 and -0.12). None for fewer than three."""
        n = len(values)
        return None if n < 3 else cls(float(values.mean()), float(values.std(ddof=1) / math.sqrt(n)), n, since)

    def __str__(self) -> str:
        return f"{self.value:+.3f} +- {self.error:.3f}"

    @property
    def sigmas(self) -> float:
        """How many standard errors from zero."""
        return abs(self.value) / self.error if self.error else math.inf


def one_line(text: str) -> str:
    """A line of a config without the blanks that align its comment."""
    return re.sub(r"\s{3,}", "  ", text.strip())


def _figure(unit: str, what: str) -> Any:
    return field(default=None, metadata={"what": f"{what} [{unit}]" if unit else what})


@dataclass
class Figures:
    """Every number that the checks share. ``--json`` has those declared by ``_figure``, and the two means."""

    config: ConfigFacts
    """The run's settings: its config, else what its log or checkpoint says of them. Never None, perhaps empty."""
    shape: Shape | None = None
    precision: str = "bf16"
    """Arithmetic of the matmuls, by the name that users know: fastgpt's ``--precision``, or tf32."""

    parameters: int | None = _figure("", "parameters, head tied, excluding position embeddings (nanoGPT's count)")
    tokens_per_step: int | None = _figure("tokens", "micro-batch x accumulation x block size")
    steps_seen: int | None = _figure("steps", "last step of the log")
    tokens_seen: int | None = _figure("tokens", "steps_seen x tokens_per_step")
    tokens_planned: int | None = _figure("tokens", "max_iters x tokens_per_step")
    tokens_per_parameter: float | None = _figure("", "tokens_seen (without a log: tokens_planned) / parameters")
    corpus_tokens: int | None = _figure("tokens", "of the training data")
    epochs: float | None = _figure("", "tokens_seen (without a log: tokens_planned) / corpus_tokens")
    flops_per_token: float | None = _figure("FLOP", "6N + 12LCT (fastgpt.performance.flops.palm)")
    flops_per_token_logged: float | None = _figure("FLOP", "the same, worked back from the log's first mfu and ms")
    steady_ms_per_iter: float | None = _figure("ms", "median of the iterations that held no evaluation or checkpoint")
    evaluation_ms: float | None = _figure("ms", "what an iteration with an evaluation (and checkpoint) took longer")
    evaluation_share: float | None = _figure("share", "of wall time spent in evaluations and checkpoints")
    evaluation_minutes_per_day: float | None = _figure("min", "the same, of 24 h")
    wall_ms_per_iter: float | None = _figure("ms", "steady_ms_per_iter + evaluation_ms / eval_interval")
    hours_seen: float | None = _figure("h", "steps_seen x wall_ms_per_iter")
    tokens_per_second: float | None = _figure("tokens/s", "tokens_per_step / steady_ms_per_iter, all GPUs")
    gpus: int | None = _figure("", "GPUs, where the log's mfu gives them away; else 1")
    model_tflops: float | None = _figure("TFLOP/s", "flops_per_token x tokens_per_second, per GPU")
    mfu_nanogpt: float | None = _figure("share", "model_tflops / 312 (an A100): nanoGPT's unit, steady state")
    mfu_nominal: float | None = _figure("share", "model_tflops / the card's nominal dense peak")
    mfu_printed_first: float | None = _figure("share", "first mfu that the log prints")
    mfu_printed_last: float | None = _figure("share", "last mfu that the log prints")
    nominal_tflops: float | None = _figure("TFLOP/s", "the card's nominal dense peak in the run's precision")
    ceiling_nanogpt: float | None = _figure("share", "nominal_tflops / 312: the card's ceiling in nanoGPT's unit")
    best_val: float | None = _figure("nats", "lowest validation loss")
    best_val_step: int | None = _figure("", "its step")
    last_val: float | None = _figure("nats", "last validation loss")

    val_minus_train: Mean | None = None
    """Evaluations: validation minus train, nats."""
    iter_minus_train: Mean | None = None
    """`iter` losses minus the train evaluations interpolated at their steps, nats: what dropout costs in training."""

    @property
    def arithmetic(self) -> str:
        """What decides the speed of the matmuls: one of hardware.ARITHMETICS."""
        return cards.arithmetic_of(self.precision)

    @property
    def out_of_reach(self) -> str:
        """That no run reaches the peak of an experimental mode, in bench.mfu's words; "" of other precisions."""
        if self.precision not in PLAIN:
            return ""
        return (
            f"{self.precision}: part of the step is computed in {PLAIN[self.precision]}, so nothing could reach 100% of "
            f"the {self.precision} peak"
        )

    def place(self, *names: str) -> Seen:
        """The lines on which these settings are, as evidence."""
        found = (self.config.settings.get(name) for name in names)
        return [(s.place, one_line(s.text) or f"{name} = {s.value}") for name, s in zip(names, found) if s]

    def seen(self) -> int | None:
        """Tokens of the run as far as it got, or as planned."""
        return self.tokens_seen if self.tokens_seen is not None else self.tokens_planned

    def hours(self, share: float = 1.0) -> str:
        """That share of the run's time, for people: "21.8 h of training"; a percentage where no time is known."""
        if self.hours_seen is None:
            return f"{share:.0%} of the compute"
        hours = share * self.hours_seen
        return f"{hours:.1f} h of training" if hours >= 1 else f"{60 * hours:.0f} min of training"

    def to_json(self) -> dict[str, Any]:
        numbers: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.metadata:
                numbers[f.name] = float(f"{value:.6g}") if isinstance(value, float) else value
            elif f.name in ("val_minus_train", "iter_minus_train"):
                numbers[f.name] = None if value is None else round(value.value, 5)
                numbers[f.name + "_error"] = None if value is None else round(value.error, 5)
        return numbers


UNITS = {f.name: f.metadata["what"] for f in fields(Figures) if f.metadata}
"""Name of each figure -> what it is, and its unit."""


def compute(evidence: Evidence, gpu: Gpu | None, corpus_tokens: int | None = None) -> Figures:
    """All figures that the evidence allows."""
    log = evidence.log
    stored = evidence.checkpoint.config if evidence.checkpoint else None
    config = evidence.config or stored or ConfigFacts("nanogpt")
    figures = Figures(config, _shape(evidence, config), evidence.said("precision") or _precision(config, gpu))
    _size(figures, evidence)
    _tokens(figures, evidence, corpus_tokens)
    if log is not None:
        _speed(figures, log)
        _losses(figures, log)
    _utilisation(figures, log, gpu)
    return figures


def _shape(evidence: Evidence, config: ConfigFacts) -> Shape | None:
    """Shape of the model that is trained: the config's, else the checkpoint's."""
    kept = evidence.checkpoint.shape if evidence.checkpoint else {}
    names = ("n_layer", "n_head", "n_embd", "block_size")
    found: dict[str, Any] = {name: config.get(name, kept.get(name)) for name in names}
    if None in found.values():
        return None
    vocab = config.settings["vocab_size"].value if config.is_set("vocab_size") else kept.get("vocab_size")
    vocab = vocab or evidence.said("vocab") or config.get("vocab_size", 50304)
    return Shape(**found, vocab_size=vocab, bias=bool(config.get("bias", kept.get("bias", False))))


def _precision(config: ConfigFacts, gpu: Gpu | None) -> str:
    """The config's; float32 runs as tf32 in nanoGPT, which switches that on. fastgpt takes bf16, or fp16 on a card without it,
    for auto and where an experimental mode does not run (ops.usable_precision)."""
    name = str(config.get("dtype"))
    auto = "fp16" if gpu is not None and gpu.peak_flops("bf16") is None else "bf16"
    if config.kind == "fastgpt" and name in EXPERIMENTAL:
        runs = config.get("kernels", "triton") == "triton" and (gpu is None or cards.gains(name, gpu))
        return name if runs else auto
    if config.kind == "fastgpt" and not config.is_set("dtype"):
        return auto
    return {"float16": "fp16", "float32": "tf32" if config.kind == "nanogpt" else "fp32"}.get(name, "bf16")


def _size(figures: Figures, evidence: Evidence) -> None:
    """Parameters: the shape's, unless the log or the checkpoint counted a model that is not of this shape."""
    counted = evidence.said("parameters")
    if evidence.log is None and evidence.checkpoint:
        counted = evidence.checkpoint.parameters
    if figures.shape is not None:
        figures.flops_per_token = flops.palm(figures.shape)
        figures.parameters = anatomy.n_params(figures.shape, positions=False)
    if counted and (figures.parameters is None or abs(counted / figures.parameters - 1) > 0.01):
        if figures.shape is not None and evidence.log is not None:
            figures.shape = figures.flops_per_token = None  # the log is of another model than the config
        figures.parameters = int(counted)


def _tokens(figures: Figures, evidence: Evidence, corpus_tokens: int | None) -> None:
    parts = [figures.config.get(name) for name in ("batch_size", "gradient_accumulation_steps", "block_size")]
    if None not in parts:
        figures.tokens_per_step = math.prod(parts)
    if (log := evidence.log) is not None:
        rate, ms = log.steps.tokens_per_second, log.steps.ms
        if said := evidence.said("tokens_per_step"):
            figures.tokens_per_step = int(said)
        elif figures.tokens_per_step is None and np.isfinite(rate * ms).any():
            figures.tokens_per_step = round(float(np.nanmedian(rate * ms)) / 1e3)
        last = [int(steps.step[-1]) for steps in (log.steps, log.evals) if len(steps)]
        figures.steps_seen = max(last, default=None)  # type: ignore[type-var]
    planned, per_step = figures.config.get("max_iters"), figures.tokens_per_step
    if per_step is not None:
        if figures.steps_seen is not None:
            figures.tokens_seen = figures.steps_seen * per_step
        if planned is not None:
            figures.tokens_planned = planned * per_step
    tokens = figures.seen()
    if tokens is not None and figures.parameters:
        figures.tokens_per_parameter = tokens / figures.parameters
    figures.corpus_tokens = corpus_tokens or KNOWN_CORPORA.get(str(figures.config.get("dataset", "")))
    if tokens is not None and figures.corpus_tokens:
        figures.epochs = tokens / figures.corpus_tokens


def holds_evaluation(log: LogFacts) -> np.ndarray:
    """Which logged steps have an evaluation, a checkpoint or compilation in their time (bool, one per step).

    nanoGPT's clock runs through all three; nanochat, llm.c and fastgpt stop theirs."""
    if log.kind not in ("nanogpt", "unknown"):
        return np.zeros(len(log.steps), bool)
    return np.isin(log.steps.step, log.evals.step) | (log.steps.step == 0)


def steady(log: LogFacts) -> np.ndarray:
    """Which logged steps show the speed of training alone (bool, one per step)."""
    return np.isfinite(log.steps.ms) & (log.steps.ms > 0) & ~holds_evaluation(log) & (np.arange(len(log.steps)) > 0)


def _speed(figures: Figures, log: LogFacts) -> None:
    steps = log.steps
    usual = steady(log)
    if not usual.any():
        return
    figures.steady_ms_per_iter = float(np.median(steps.ms[usual]))
    figures.wall_ms_per_iter = figures.steady_ms_per_iter
    slow = np.isfinite(steps.ms) & holds_evaluation(log) & (steps.step > 0)
    interval = evaluation_interval(figures.config, log)
    if slow.any() and interval:
        extra = max(0.0, float(np.median(steps.ms[slow])) - figures.steady_ms_per_iter)
        figures.evaluation_ms = extra
        figures.wall_ms_per_iter += extra / interval
        figures.evaluation_share = extra / interval / figures.wall_ms_per_iter
        figures.evaluation_minutes_per_day = figures.evaluation_share * 24 * 60
    if figures.steps_seen:
        figures.hours_seen = figures.steps_seen * figures.wall_ms_per_iter / 3.6e6


def evaluation_interval(config: ConfigFacts, log: LogFacts | None) -> int | None:
    """Steps between evaluations: as logged, else as configured."""
    if log is not None and len(log.evals) > 1 and (gaps := np.diff(log.evals.step)).max() > 0:
        return int(np.median(gaps[gaps > 0]))
    return config.get("eval_interval") or None


def learning_rate(step: int, config: ConfigFacts) -> float | None:
    """nanoGPT's get_lr: linear warmup, cosine to min_lr at lr_decay_iters, min_lr after. None if a value is missing."""
    peak, floor = config.get("learning_rate"), config.get("min_lr")
    warmup, end = config.get("warmup_iters"), config.get("lr_decay_iters")
    if peak is None or floor is None or warmup is None or end is None:
        return None
    if not config.get("decay_lr", True):
        return float(peak)
    if config.get("schedule", "cosine") != "cosine":
        return None  # fastgpt has others
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if step > end or end <= warmup:
        return float(floor)
    return floor + 0.5 * (1 + math.cos(math.pi * (step - warmup) / (end - warmup))) * (peak - floor)


def _losses(figures: Figures, log: LogFacts) -> None:
    evals, steps = log.evals, log.steps
    good = np.isfinite(evals.val)
    if good.any():
        best = int(np.nanargmin(evals.val))
        figures.best_val, figures.best_val_step = float(evals.val[best]), int(evals.step[best])
        figures.last_val = float(evals.val[good][-1])
    both = good & np.isfinite(evals.train)
    if both.sum() < 3:
        return
    step, train, val = evals.step[both], evals.train[both], evals.val[both]
    last = int(step[-1])
    since = SETTLED if last >= 2 * SETTLED else last // 2
    figures.val_minus_train = Mean.of((val - train)[step >= since], since)
    inside = (steps.step >= max(since, step[0])) & (steps.step <= last) & np.isfinite(steps.loss)
    around = np.interp(steps.step[inside], step, train)
    figures.iter_minus_train = Mean.of(steps.loss[inside] - around, since)


def _utilisation(figures: Figures, log: LogFacts | None, gpu: Gpu | None) -> None:
    peak = gpu.peak_flops(figures.arithmetic) if gpu else None
    if peak:
        figures.nominal_tflops, figures.ceiling_nanogpt = peak / 1e12, peak / NANOGPT_PEAK
    if log is None:
        return
    _printed(figures, log)
    if figures.steady_ms_per_iter is None or figures.tokens_per_step is None:
        return
    figures.tokens_per_second = figures.tokens_per_step / figures.steady_ms_per_iter * 1e3
    per_token = figures.flops_per_token or figures.flops_per_token_logged
    if per_token is None:
        return
    figures.gpus = _gpus(figures)
    rate = per_token * figures.tokens_per_second / figures.gpus
    figures.model_tflops, figures.mfu_nanogpt = rate / 1e12, rate / NANOGPT_PEAK
    if peak and rate <= ABOVE_NOMINAL * peak:  # else the log is of another card: speed.mfu_other_card
        figures.mfu_nominal = rate / peak


def _printed(figures: Figures, log: LogFacts) -> None:
    """nanoGPT's mfu is a running mean that starts with the first value it prints: only that one belongs to a time."""
    printed = np.flatnonzero(np.isfinite(log.steps.mfu) & (log.steps.mfu > 0))
    if not len(printed):
        return
    first = printed[0]
    figures.mfu_printed_first = float(log.steps.mfu[first]) / 100
    figures.mfu_printed_last = float(log.steps.mfu[printed[-1]]) / 100
    ms = float(log.steps.ms[first])
    if log.kind == "nanogpt" and math.isfinite(ms) and figures.tokens_per_step and first > 0:
        figures.flops_per_token_logged = figures.mfu_printed_first * NANOGPT_PEAK * ms / 1e3 / figures.tokens_per_step


def _gpus(figures: Figures) -> int:
    """nanoGPT's mfu is of one GPU, its tokens are of all: their ratio is the number of GPUs."""
    if figures.flops_per_token is None or figures.flops_per_token_logged is None:
        return 1
    ratio = figures.flops_per_token / figures.flops_per_token_logged
    return round(ratio) if ratio > 1.9 and abs(ratio / round(ratio) - 1) < 0.03 else 1
