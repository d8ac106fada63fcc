"""The figures of a run, computed once: each None where the evidence does not say. Formulas are in docs/doctor.md."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args

import numpy as np

from fastgpt import anatomy
from fastgpt.anatomy import SHAPE, Shape
from fastgpt.config import EXPERIMENTAL, PLAIN, OptimConfig
from fastgpt.doctor.evidence import ConfigFacts, Evidence, LogFacts, Seen, Source
from fastgpt.hardware import cards
from fastgpt.hardware.cards import NANOGPT_PEAK, Gpu
from fastgpt.performance import flops
from fastgpt.schedule import micro_batches_until

SETTLED = 3000
"""Losses are compared from this step on (from the middle of a shorter run): before it the curve is so steep that a
straight line between two evaluations lies visibly above it."""

ABOVE_NOMINAL = 1.15
"""Boards run a few percent above the clock of the nominal peak (a 4070 holds 2.6-2.8 GHz, the peak is for 2.475);
beyond this the log is of another card."""

GEOMETRY = ("batch_size", "gradient_accumulation_steps", "block_size")
"""Their product is the tokens of a step."""
OF_AN_A100 = ("nanogpt", "llama2.c")
"""Whose logs give mfu as a running mean of an A100's peak, and time evaluations with their steps."""
COARSE = 0.25
"""Percent: nanoGPT prints mfu in hundredths of a percent, which below this are too few to tell a model by."""
LARGEST_VOCABULARY = 65_536
"""nanoGPT's data are numbers of 16 bits."""

KNOWN_CORPORA = {"openwebtext": 9_035_582_198, "shakespeare": 301_966, "shakespeare_char": 1_003_854}
"""Training tokens that nanoGPT's own preparation scripts give."""
KNOWN_VOCABULARIES = {"openwebtext": 50304, "shakespeare": 50304, "shakespeare_char": 65}
"""The model's vocabulary on these data: GPT-2's, padded, where there is no meta.pkl."""
PRETRAINED = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
    "distilgpt2": (6, 12, 768),
}
"""n_layer, n_head and n_embd of published weights: with ``init_from`` they replace the config's."""


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
    """Every number that the checks share. ``--json`` has those declared by ``_figure``, and the two means.

    Each knows where it comes from: ``put`` notes what it was computed of, ``sources`` follows that down to log, config, ...
    What a check reads is noted as well, and findings.weighed holds its findings against the weakest of these sources."""

    config: ConfigFacts
    """The run's settings: its config, else what its log or checkpoint says of them. Never None, perhaps empty."""
    shape: Shape | None = None
    """Shape of the model that was trained; None where that is not known, or not GPT-2."""
    shape_written: Shape | None = None
    """The same as the config has it, also where the log shows that another model ran."""
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
    flops_per_step_logged: float | None = _figure("FLOP", "on one GPU: nanoGPT's first mfu x 312 TFLOP/s x its ms")
    flops_per_token_logged: float | None = _figure("FLOP", "flops_per_step_logged / tokens_per_step")
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
    best_bpb: float | None = _figure("bits per byte", "lowest validation loss, where the log gives it so")
    last_bpb: float | None = _figure("bits per byte", "the last one")

    val_minus_train: Mean | None = None
    """Evaluations: validation minus train, nats."""
    iter_minus_train: Mean | None = None
    """`iter` losses minus the train evaluations interpolated at their steps, nats: what dropout costs in training."""

    origin: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Figure or setting -> what it was computed of: figures, settings, Sources. A setting that is not here is the config's."""
    assumed: dict[str, str] = field(default_factory=dict)
    """Figure or setting that nothing given says -> the sentence that names the assumption."""
    asked: set[str] = field(default_factory=set, compare=False, repr=False)
    """Every figure that was read."""

    def __getattribute__(self, name: str) -> Any:
        if name in TRACKED:
            object.__getattribute__(self, "asked").add(name)
        return object.__getattribute__(self, name)

    def put(self, name: str, value: Any, *of: str) -> None:
        """Set a figure, and note what it is computed ``of``."""
        setattr(self, name, value)
        self.origin[name] = of

    def leaves(self, names: Iterable[str]) -> set[str]:
        """What these figures and settings rest on in the end: settings, Sources, assumed names."""
        seen, left = set(), set(names)
        while left:
            name = left.pop()
            seen.add(name)
            left |= set(() if name in self.assumed else self.origin.get(name, ())) - seen
        return {name for name in seen if name in self.assumed or name not in self.origin}

    def assumptions(self) -> list[str]:
        """Sentences that name what the figures rest on and nothing given says."""
        known = (name for name in UNITS if getattr(self, name) is not None)
        leaves = self.leaves(known)
        return list(dict.fromkeys(sentence for name, sentence in self.assumed.items() if name in leaves))

    def sources(self, *names: str) -> set[Source]:
        """Where these figures and settings come from."""
        found = {self.source(leaf) for leaf in self.leaves(names)}
        return {source for source in found if source is not None}

    def source(self, leaf: str) -> Source | None:
        """Where one of ``leaves`` comes from."""
        if leaf in self.assumed:
            return "assumption"
        return leaf if leaf in SOURCES else self.config.source(leaf)  # type: ignore[return-value]

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
TRACKED = {*UNITS, "shape", "val_minus_train", "iter_minus_train"}
SOURCES = frozenset(get_args(Source))


def compute(evidence: Evidence, gpu: Gpu | None, corpus_tokens: int | None = None) -> Figures:
    """All figures that the evidence allows."""
    log = evidence.log
    stored = evidence.checkpoint.config if evidence.checkpoint else None
    config = evidence.config or stored or ConfigFacts("nanogpt")
    figures = Figures(config, precision=evidence.said("precision") or _precision(config, gpu))
    if config.foreign and (left := [name for name in config.defaults if not config.is_set(name)]):
        figures.assumed = dict.fromkeys(
            left, f"{', '.join(left)} assumed: nanoGPT's default, in the config of a fork, which may have others"
        )
    _model(figures, evidence)
    _tokens(figures, evidence)
    if log is not None:
        _printed(figures, log)
        _settle(figures, evidence)
    _ratios(figures, corpus_tokens)
    if log is not None:
        _speed(figures, log)
        _losses(figures, log)
    _utilisation(figures, log, gpu)
    return figures


def _model(figures: Figures, evidence: Evidence) -> None:
    """Shape and parameters: the shape's, unless the log or the checkpoint counted a model that is not of this shape."""
    figures.shape_written = shape = _shape(figures, evidence)
    counted, by = evidence.said("parameters"), "log"
    if evidence.log is None and evidence.checkpoint:
        counted, by = evidence.checkpoint.parameters, "checkpoint"
    if shape is not None and counted and "vocab_size" in figures.assumed:  # the count tells it
        rest = anatomy.n_params(replace(shape, vocab_size=0), positions=False)
        vocabulary = round((counted - rest) / shape.n_embd)
        if 2 <= vocabulary <= LARGEST_VOCABULARY:
            shape = replace(shape, vocab_size=vocabulary)
            figures.put("vocab_size", vocabulary, by)
            del figures.assumed["vocab_size"]
    if shape is not None:
        figures.put("shape", shape, *SHAPE)
        figures.put("flops_per_token", flops.palm(shape), "shape")
        figures.put("parameters", anatomy.n_params(shape, positions=False), "shape")
    elif said := evidence.said("flops_per_token"):
        figures.put("flops_per_token", float(said), "log")
    if counted and (figures.parameters is None or abs(counted / figures.parameters - 1) > 0.01):
        if shape is not None and evidence.log is not None:
            figures.shape = figures.flops_per_token = None  # the log is of another model than the config
        figures.put("parameters", int(counted), by)


def _shape(figures: Figures, evidence: Evidence) -> Shape | None:
    """Shape of the model as it is written: of published weights that it begins with, else the config's or the checkpoint's."""
    config, kept = figures.config, evidence.checkpoint.shape if evidence.checkpoint else {}
    if config.foreign_model:
        return None
    weights = PRETRAINED.get(str(config.get("init_from")))
    if weights is not None and config.get("block_size"):
        figures.origin |= dict.fromkeys(SHAPE, ("known", "init_from"))
        figures.origin["block_size"] = ("config",) if config.is_set("block_size") else ("default",)
        return Shape(*weights, block_size=config.get("block_size"), vocab_size=50257, bias=True)
    found: dict[str, Any] = {
        name: config.get(name, kept.get(name)) for name in ("n_layer", "n_head", "n_embd", "block_size")
    }
    if None in found.values():
        return None
    figures.origin |= {name: ("checkpoint",) for name in SHAPE if config.source(name) is None and name in kept}
    begins = config.get("init_from")
    if config.kind == "nanogpt" and begins not in (None, "scratch") and not kept and not evidence.said("parameters"):
        where = "takes it from the checkpoint, which was not given" if begins == "resume" else "may bring its own"
        figures.assumed["n_layer"] = (
            f"shape L{found['n_layer']} H{found['n_head']} C{found['n_embd']} assumed: init_from = {begins!r} {where}"
        )
    vocab = _vocabulary(figures, evidence, kept)
    if config.get("family", "gpt2") != "gpt2":
        more = {f.name: config.get(f.name, f.default) for f in fields(Shape) if f.name not in SHAPE}
        return Shape(**found, vocab_size=vocab, **more)
    return Shape(**found, vocab_size=vocab, bias=bool(config.get("bias", kept.get("bias", False))))


def _vocabulary(figures: Figures, evidence: Evidence, kept: Mapping[str, Any]) -> int:
    """nanoGPT takes it from the data's meta.pkl, or 50,304 where there is none."""
    config, dataset = figures.config, str(figures.config.get("dataset", ""))
    said = [
        (config.settings["vocab_size"].value if config.is_set("vocab_size") else None, "config"),
        (kept.get("vocab_size"), "checkpoint"),
        (evidence.said("vocab"), "log"),
        (evidence.data_vocabulary, "data"),
    ]
    if config.kind == "nanogpt":
        said.append((KNOWN_VOCABULARIES.get(dataset), "dataset"))
    else:
        said.append((config.get("vocab_size"), "default"))
    for value, source in said:
        if value:
            figures.origin["vocab_size"] = (source,)
            return int(value)
    where = f"data/{dataset}/meta.pkl" if dataset else "the data's meta.pkl"
    figures.assumed["vocab_size"] = f"vocabulary 50,304 assumed: {where} is not here, and nothing else says it"
    return 50304


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


def _tokens(figures: Figures, evidence: Evidence) -> None:
    """Tokens of a step as the config has them; as the log says them, if it does."""
    parts = [figures.config.get(name) for name in GEOMETRY]
    if None not in parts:
        figures.put("tokens_per_step", math.prod(parts), *GEOMETRY)
    log = evidence.log
    if log is None:
        return
    if said := evidence.said("tokens_per_step"):
        figures.put("tokens_per_step", int(said), "log")
    elif figures.tokens_per_step is None and (found := _by_rate(log)):
        figures.put("tokens_per_step", found, "log")
    last = [int(steps.step[-1]) for steps in (log.steps, log.evals) if len(steps)]
    figures.put("steps_seen", max(last, default=None), "log")  # type: ignore[type-var]


def _by_rate(log: LogFacts) -> int | None:
    """Tokens of a step, from its time and the tokens per second beside it: the roundest number that both of them, as printed,
    allow. llm.c's later rates are running means: there the first step counts."""
    ms, rate = log.steps.ms, log.steps.tokens_per_second
    good = np.flatnonzero(np.isfinite(rate * ms) & (rate > 0) & (ms > 0))
    if not len(good):
        return None
    if log.kind == "llm.c":
        good = good[:1]
    row = good[np.argsort(rate[good] * ms[good])[len(good) // 2]]  # the median, one that was printed
    tokens = float(rate[row] * ms[row]) / 1e3
    slack = tokens * (0.5 / float(rate[row]) + 0.005 / float(ms[row]))
    for unit in (2**k for k in range(20, -1, -1)):
        if 0 < (rounded := round(tokens / unit) * unit) and abs(rounded - tokens) <= slack:
            return rounded
    return round(tokens) or None


def _settle(figures: Figures, evidence: Evidence) -> None:
    """Where nanoGPT's mfu and time give other FLOPs per step than model and batch as written, the log's count for what ran.

    Its mfu is that of one GPU, its tokens are those of all: a ratio that is a whole number is the number of GPUs, or of an
    accumulation that was shorter."""
    logged, tokens, per_token = figures.flops_per_step_logged, figures.tokens_per_step, figures.flops_per_token
    if logged is None or not tokens:
        return
    figures.put("flops_per_token_logged", logged / tokens, "log", "tokens_per_step")
    if per_token is None:
        return
    ratio = tokens * per_token / logged
    if abs(1 / ratio - 1) <= 0.05:
        if figures.assumed.pop("vocab_size", None):
            figures.origin["vocab_size"] = ("log",)
        return
    several = round(ratio) if ratio > 1.9 and abs(ratio / round(ratio) - 1) < 0.03 else 0
    counted, said = evidence.said("parameters"), evidence.said("tokens_per_step")
    assert evidence.log is not None
    if several and (said or not _is_excerpt(evidence.log)):
        figures.put("gpus", several, "log", "flops_per_token", "tokens_per_step")
        return
    unit = math.prod(figures.config.get(name) or 1 for name in ("batch_size", "block_size"))
    ran = round(logged / per_token / unit) * unit
    if (several or counted) and not said and ran and abs(ran * per_token / logged - 1) <= 0.05:
        figures.put("tokens_per_step", ran, "log", "flops_per_token", "batch_size", "block_size")
        return
    figures.shape = None
    figures.put("flops_per_token", logged / tokens, "log", "tokens_per_step")
    if not counted:
        figures.parameters = None


def trained(steps: int, config: ConfigFacts, per_step: int) -> int:
    """Tokens of a run's first ``steps`` steps: fastgpt's may begin with fewer micro-batches than they have later."""
    rising, accum = config.get("batch_warmup_iters"), config.get("gradient_accumulation_steps")
    if not (isinstance(rising, int) and rising > 0 and isinstance(accum, int) and accum > 0):
        return steps * per_step
    return micro_batches_until(steps, OptimConfig(batch_warmup_iters=rising), accum) * per_step // accum


def _ratios(figures: Figures, corpus_tokens: int | None) -> None:
    config, per_step = figures.config, figures.tokens_per_step
    planned = None if evaluates_only(config) else config.get("max_iters")
    if per_step is not None:
        if figures.steps_seen is not None:
            figures.put("tokens_seen", trained(figures.steps_seen, config, per_step), "steps_seen", "tokens_per_step")
        if planned is not None:
            figures.put("tokens_planned", trained(planned, config, per_step), "max_iters", "tokens_per_step")
    tokens, of = figures.seen(), "tokens_seen" if figures.tokens_seen is not None else "tokens_planned"
    known = KNOWN_CORPORA.get(str(config.get("dataset", "")))
    figures.put("corpus_tokens", corpus_tokens or known, "data" if corpus_tokens else "dataset")
    if tokens is not None and figures.corpus_tokens:
        figures.put("epochs", tokens / figures.corpus_tokens, of, "corpus_tokens")
    if tokens is not None and figures.parameters and config.get("init_from") not in PRETRAINED:  # else it has seen more
        figures.put("tokens_per_parameter", tokens / figures.parameters, of, "parameters")


def evaluates_only(config: ConfigFacts) -> bool:
    """Whether the run trains nothing."""
    return bool(config.get("eval_only", False))


def holds_evaluation(log: LogFacts) -> np.ndarray:
    """Which logged steps have an evaluation, a checkpoint or compilation in their time (bool, one per step).

    nanoGPT's clock runs through all three; nanochat, llm.c and fastgpt stop theirs."""
    if log.kind not in (*OF_AN_A100, "unknown"):
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
    between = wall = float(np.median(steps.ms[usual]))
    figures.put("steady_ms_per_iter", between, "log")
    slow = np.isfinite(steps.ms) & holds_evaluation(log) & (steps.step > 0)
    interval = evaluation_interval(figures.config, log)
    if slow.any() and interval:
        extra = max(0.0, float(np.median(steps.ms[slow])) - between)
        wall += extra / interval
        share = extra / interval / wall
        figures.put("evaluation_ms", extra, "log")
        figures.put("evaluation_share", share, "log")
        figures.put("evaluation_minutes_per_day", share * 24 * 60, "log")
    figures.put("wall_ms_per_iter", wall, "log")
    if figures.steps_seen:
        figures.put("hours_seen", figures.steps_seen * wall / 3.6e6, "log")


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
    figures.origin |= dict.fromkeys(("best_val", "best_val_step", "last_val", "last_bpb", "best_bpb"), ("log",))
    if bits := [note.value for note in log.all("bits_per_byte") if note.value]:
        figures.last_bpb, figures.best_bpb = bits[-1], min(bits)
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
    figures.put("val_minus_train", Mean.of((val - train)[step >= since], since), "log")
    inside = (steps.step >= max(since, step[0])) & (steps.step <= last) & np.isfinite(steps.loss)
    around = np.interp(steps.step[inside], step, train)
    figures.put("iter_minus_train", Mean.of(steps.loss[inside] - around, since), "log")


def _utilisation(figures: Figures, log: LogFacts | None, gpu: Gpu | None) -> None:
    peak = gpu.peak_flops(figures.arithmetic) if gpu else None
    if peak:
        for name, unit in (("nominal_tflops", 1e12), ("ceiling_nanogpt", NANOGPT_PEAK)):
            figures.put(name, peak / unit, "known")
    if log is None or figures.steady_ms_per_iter is None or figures.tokens_per_step is None:
        return
    tokens_per_second = figures.tokens_per_step / figures.steady_ms_per_iter * 1e3
    figures.put("tokens_per_second", tokens_per_second, "log", "tokens_per_step")
    of = "flops_per_token" if figures.flops_per_token else "flops_per_token_logged"
    per_token, gpus = getattr(figures, of), figures.gpus
    if per_token is None:
        return
    if gpus is None:
        gpus = _gpus(figures, log)
        figures.put("gpus", gpus, "log")
    rate = per_token * tokens_per_second / gpus
    if "gpus" in figures.assumed and rate > max(card.peak_flops(figures.arithmetic) or 0 for card in cards.GPUS):
        figures.gpus = None
        figures.assumed["gpus"] = (
            f"MFU: {rate / 1e12:,.0f} TFLOP/s are of several GPUs; the log does not say of how many."
        )
        return
    for name, unit in (("model_tflops", 1e12), ("mfu_nanogpt", NANOGPT_PEAK)):
        figures.put(name, rate / unit, of, "tokens_per_second", "gpus")
    if peak and rate <= ABOVE_NOMINAL * peak:  # else the log is of another card: speed.mfu_other_card
        figures.put("mfu_nominal", rate / peak, of, "tokens_per_second", "gpus")


def _printed(figures: Figures, log: LogFacts) -> None:
    """What the log prints of mfu, and the FLOPs of a step that it shows: of nanoGPT's running mean the first value is that of
    one iteration; in an excerpt the mean has to have come to rest."""
    printed = np.flatnonzero(np.isfinite(log.steps.mfu) & (log.steps.mfu > 0))
    if not len(printed):
        return
    figures.put("mfu_printed_first", float(log.steps.mfu[printed[0]]) / 100, "log")
    figures.put("mfu_printed_last", float(log.steps.mfu[printed[-1]]) / 100, "log")
    row = _told_by_mfu(log)
    if row is not None:
        mfu, ms = float(log.steps.mfu[row]) / 100, float(log.steps.ms[row])
        figures.put("flops_per_step_logged", mfu * NANOGPT_PEAK * ms / 1e3, "log")


def _is_excerpt(log: LogFacts) -> bool:
    """Whether a log of nanoGPT begins in the middle: its first line has an mfu already."""
    return bool(len(log.steps) and log.steps.mfu[0] > 0)


def _told_by_mfu(log: LogFacts) -> int | None:
    """The row whose mfu belongs to its time; None if there is none."""
    mfu, ms = log.steps.mfu, log.steps.ms
    rows = np.flatnonzero(np.isfinite(mfu * ms) & (mfu > 0) & (ms > 0))
    if log.kind not in OF_AN_A100 or not len(rows) or mfu[rows[0]] < COARSE:
        return None
    if not _is_excerpt(log):
        return int(rows[0])
    rows = rows[steady(log)[rows]]
    change = np.abs(np.diff(mfu[rows]) / mfu[rows[1:]]) < 0.004
    still = rows[1:-1][change[:-1] & change[1:]] if len(rows) >= 3 else rows[:0]
    return int(still[np.argmax(mfu[still])]) if len(still) else None


def _gpus(figures: Figures, log: LogFacts) -> int:
    """GPUs of the run: as the log says; one where it does not, which is an assumption but in nanoGPT's, whose mfu tells."""
    said = [note.value for note in log.all("gpus") if note.value]
    micro, of_rank = (
        [note.value for note in log.all(kind) if note.value] for kind in ("micro_batch", "micro_batch_of_rank")
    )
    if not said and micro and of_rank and micro[-1] % of_rank[-1] == 0:
        said = [micro[-1] // of_rank[-1]]
    if not said and log.kind not in (*OF_AN_A100, "fastgpt", "unknown"):
        figures.assumed["gpus"] = "one GPU assumed: the log does not say how many there were"
    return int(said[-1]) if said else 1
