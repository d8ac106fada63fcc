"""Runs for the doctor's tests: the two real ones, and small ones made to order."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from fastgpt.doctor.diagnosis import Diagnosis, diagnose
from fastgpt.doctor.evidence import CheckpointFacts, ConfigFacts, Evals, Evidence, LogFacts, Note, Place, Steps
from fastgpt.doctor.findings import Finding
from fastgpt.doctor.reading.configs import parse_nanogpt
from fastgpt.doctor.reading.logs import read_log
from fastgpt.hardware import cards

REAL = Path(__file__).parents[2] / "docs" / "rtx4070-runs"
RTX4070 = cards.lookup("rtx4070")

SOUND = """
batch_size = 8
gradient_accumulation_steps = 64
block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 500
max_iters = 6000
lr_decay_iters = 6000
eval_interval = 500
eval_iters = 100
"""
"""A config with nothing wrong: 124M parameters, 3.1B tokens."""


@cache
def real(size: str, last_step: int | None = None) -> Evidence:
    """The real run, "40m" or "124m", as far as ``last_step``."""
    name = f"train_fineweb_{size}.py"
    config = parse_nanogpt((REAL / name).read_text(), name)
    log = read_log(REAL / f"nanogpt-{size}-fineweb.log")
    log.file = f"nanogpt-{size}-fineweb.log"
    if last_step is not None:
        for series in (log.steps, log.evals):
            kept = series.step <= last_step
            for field in vars(series):
                if isinstance(values := getattr(series, field), np.ndarray):
                    setattr(series, field, values[kept])
    return Evidence(config, log)


@cache
def real_report(size: str, last_step: int | None = None) -> Diagnosis:
    return diagnose(real(size, last_step), RTX4070)


def config(text: str = "", base: str = SOUND) -> ConfigFacts:
    """A nanoGPT config: the sound one with these lines after it."""
    return parse_nanogpt(base + text, "config.py")


def log(
    loss=None,
    *,
    every: int = 10,
    ms: float | np.ndarray = 9350.0,
    mfu: float | np.ndarray = np.nan,
    train=None,
    val=None,
    eval_every: int = 500,
    kind: str = "nanogpt",
    notes: tuple[Note, ...] = (),
    first_step: int = 0,
) -> LogFacts:
    """A log with the given iteration losses at every ``every``-th step and evaluations at every ``eval_every``-th."""
    loss = np.asarray([] if loss is None else loss, float)
    val = np.asarray([] if val is None else val, float)
    n = len(loss)
    nothing = np.full(n, np.nan)
    steps = Steps(
        step=first_step + every * np.arange(n),
        loss=loss,
        ms=np.broadcast_to(np.asarray(ms, float), n).copy(),
        mfu=np.broadcast_to(np.asarray(mfu, float), n).copy(),
        tokens_per_second=nothing,
        lr=nothing,
        grad_norm=nothing,
        line=1 + np.arange(n),
    )
    train = np.full(len(val), np.nan) if train is None else np.asarray(train, float)
    evals = Evals(eval_every * np.arange(len(val)), train, val, 10_001 + np.arange(len(val)))
    return LogFacts(kind, "run.log", steps, evals, list(notes))  # type: ignore[arg-type]


def note(kind: str, text: str, value=None, line: int = 3) -> Note:
    return Note(kind, Place("run.log", line), text, value)


def checkpoint(step: int = 1000, config: ConfigFacts | None = None, kind: str = "nanogpt", **shape) -> CheckpointFacts:
    whole = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304, "bias": False} | shape
    return CheckpointFacts(kind, "ckpt.pt", whole, step=step, best_val_loss=None, config=config)  # type: ignore[arg-type]


def examine(
    config_text: str | ConfigFacts | None = "", gpu=None, corpus: int | None = None, **evidence
) -> list[Finding]:
    """Findings on the sound config changed by some lines, and further evidence."""
    facts = config(config_text) if isinstance(config_text, str) else config_text
    return diagnose(Evidence(facts, **evidence), gpu, corpus).findings


def only(findings: list[Finding], check: str) -> Finding:
    """The one finding of this check."""
    (found,) = [finding for finding in findings if finding.check == check]
    return found


def names(findings: list[Finding]) -> list[str]:
    return [finding.check for finding in findings]


def curve(n: int, start: float = 10.82, floor: float = 3.3, noise: float = 0.05, seed: int = 0) -> np.ndarray:
    """An ordinary loss curve: a power law with noise, starting at ln(50304)."""
    t = np.arange(n) / n
    smooth = floor + (start - floor) * (1 + 200 * t) ** -0.7
    return smooth + noise * np.random.default_rng(seed).standard_normal(n) * (t > 0)
