"""What goes wrong when a run is continued: another shape, another schedule, a best_val_loss that is not the best."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from fastgpt.anatomy import SHAPE
from fastgpt.common import millions
from fastgpt.doctor.evidence import CheckpointFacts, ConfigFacts, Evidence, LogFacts, Place, Seen
from fastgpt.doctor.figures import GEOMETRY, Figures, learning_rate
from fastgpt.doctor.findings import Finding, Severity, check
from fastgpt.performance import flops


@check("resume_shape_mismatch", section=7)
def shape_mismatch(kept: CheckpointFacts, evidence: Evidence, figures: Figures) -> Iterator[Finding]:
    """A checkpoint of another shape than the config."""
    config = evidence.config
    if config is None:
        return
    nanogpt = kept.kind == "nanogpt"
    differing = [
        name
        for name in SHAPE  # nanoGPT takes these from the checkpoint on resume, whatever the config says
        if config.get(name) is not None and config.get(name) != kept.shape.get(name, config.get(name))
        if not nanogpt or name != "vocab_size" or config.is_set(name)  # else nanoGPT takes it from the data
    ]
    if not differing:
        return
    fields = "; ".join(
        f"{name}: {kept.shape[name]} in the checkpoint, {config.get(name)} in the config" for name in differing
    )
    yield Finding(
        check="resume_shape_mismatch",
        severity="critical",
        title=f"The checkpoint has another shape than the config: {', '.join(differing)}",
        evidence=[(Place(kept.file), fields), *figures.place(*differing)],
        explanation=(
            "With init_from = 'resume' nanoGPT takes n_layer, n_head, n_embd, block_size, bias and vocab_size from "
            "the checkpoint without a word: the run would go on training the old model."
            if nanogpt
            else "fastgpt refuses to resume it."
        )
        + (f" The checkpoint has {millions(kept.parameters)} parameters." if kept.parameters else ""),
        advice=(
            "init_from = 'scratch'    # with a new out_dir, for the model of the config\n"
            if nanogpt
            else "A new --out starts the model of the config; to continue the old one:\n"
        )
        + "\n".join(f"{name} = {kept.shape[name]!r}" for name in differing)
        + ("\nto go on with the old model and say so." if nanogpt else ""),
        cost=1.0 if config.get("init_from") == "resume" else 0.9,
        cost_text="everything that is trained after resuming" if nanogpt else "",
    )


@check("not_finite", section=7)
def not_finite(kept: CheckpointFacts) -> Iterator[Finding]:
    """NaN or infinity among the checkpoint's weights."""
    names = kept.not_finite
    if not names:
        return
    yield Finding(
        check="weights_not_finite",
        severity="critical",
        title=f"{len(names)} of the checkpoint's tensors hold NaN or infinity",
        evidence=[(Place(kept.file), ", ".join(names[:4]) + (", ..." if len(names) > 4 else ""))],
        explanation="Every loss that is computed with them is NaN, and no further step repairs them.",
        advice="Take an earlier checkpoint.",
        cost=1.0,
    )


@check("resume_schedule", section=7)
def schedule_after_resume(
    kept: CheckpointFacts, evidence: Evidence, figures: Figures, config: ConfigFacts
) -> Iterator[Finding]:
    """A learning rate that jumps on resume, has already ended, or a run with no steps left."""
    own = kept.config
    if evidence.config is None or kept.step is None:
        return
    step, end, stop = kept.step, config.get("lr_decay_iters"), config.get("max_iters")
    here = [(Place(kept.file), f"iter_num {step:,}")]

    def finding(check: str, severity: Severity, title: str, why: str, advice: str, *names: str, cost: float) -> Finding:
        seen = here + figures.place(*names)
        return Finding(check, severity, title, seen, why, advice, cost=cost)

    resumes = config.get("init_from") == "resume"
    if evidence.config is kept.config and config.source("init_from") != "override":
        return  # only the checkpoint was given: how its run began says nothing of how it goes on
    if stop is not None and step >= stop:
        title = f"The checkpoint has done {step:,} steps and max_iters is {stop:,}: there is nothing left to train"
        why = "nanoGPT resumes, evaluates once more and ends." if kept.kind == "nanogpt" else "fastgpt refuses this."
        more = f"max_iters = {2 * step}\nlr_decay_iters = {2 * step}"
        yield finding(
            "nothing_left", "critical" if resumes else "info", title, why, more, "max_iters", cost=float(resumes)
        )
        return
    now = learning_rate(step, config)
    before = learning_rate(step, own) if own else None
    floor, peak = config.get("min_lr"), config.get("learning_rate")
    if end is not None and step >= end and config.get("decay_lr", True) and floor is not None and floor != peak:
        yield finding(
            "already_finished",
            "warning",
            f"The learning rate has already decayed: iter_num {step:,} is past lr_decay_iters {end:,}",
            f"Every further step has min_lr ({floor:g})" + (f" up to max_iters {stop:,}." if stop else "."),
            f"lr_decay_iters = {stop or 2 * step}",
            "lr_decay_iters",
            "max_iters",
            "min_lr",
            cost=(stop - step) / stop if stop else 0.5,
        )
    elif now and before and max(now / before, before / now) > 1.25:
        yield finding(
            "restarts",
            "warning",
            f"The learning rate jumps from {before:.2e} to {now:.2e} on resume",
            "The schedule of the config is another one than the checkpoint was trained with. A jump up undoes part "
            "of what the decay brought, and Adam's second moments are of smaller steps: expect the loss to rise "
            "first.",
            "The checkpoint's own schedule: "
            + ", ".join(
                f"{name} = {own.get(name)}"
                for name in ("learning_rate", "min_lr", "warmup_iters", "lr_decay_iters")
                if own and own.get(name) != config.get(name)
            )
            + "; or a warmup from the old rate.",
            "learning_rate",
            "lr_decay_iters",
            "warmup_iters",
            cost=0.2,
        )


@check("resume_best_val_loss", section=7)
def best_val_loss(log: LogFacts, evidence: Evidence, figures: Figures, config: ConfigFacts) -> Iterator[Finding]:
    """nanoGPT's best_val_loss is the last one under always_save_checkpoint, and ckpt.pt with it."""
    kept = evidence.checkpoint
    if log.kind != "nanogpt" or figures.best_val is None or figures.last_val is None:
        return
    overwritten = bool(config.get("always_save_checkpoint", False))
    saved = kept.best_val_loss if kept and kept.kind == "nanogpt" and kept.best_val_loss is not None else None
    last = saved if saved is not None else figures.last_val
    # Two evaluations of 200 batches differ by some 0.01 for no reason.
    if last - figures.best_val < (0.001 if saved is not None else 0.02) or not (overwritten or saved is not None):
        return
    seen = [log.seen(log.evals, int(np.nanargmin(log.evals.val)))]
    if kept is not None and saved is not None:
        seen.append((Place(kept.file), f"best_val_loss {saved:.4f} at iter_num {kept.step}"))
    else:
        place, text = log.seen(log.evals, int(np.flatnonzero(np.isfinite(log.evals.val))[-1]))
        seen.append((place, f"{text}, saved over it"))
    yield Finding(
        check="resume_best_val_loss",
        severity="info",
        title=f"best_val_loss is {last:.4f}, the best in the log {figures.best_val:.4f}: the best model is gone",
        evidence=seen + figures.place("always_save_checkpoint"),
        explanation="With always_save_checkpoint nanoGPT stores each validation loss as best_val_loss and writes "
        "every checkpoint over the one before, better or not. After resuming, 'best' means the last.",
        advice="Copy ckpt.pt away when a val loss is to be kept (fastgpt keeps the newest --keep-checkpoints).",
        confidence="certain" if saved is not None else "likely",
    )


@check("config_log_mismatch", section=7)
def config_is_not_the_logs(log: LogFacts, evidence: Evidence, figures: Figures) -> Iterator[Finding]:
    """The log was not made with this config: what is read from one may not hold for the other."""
    config = evidence.config
    if config is None or config is log.config:
        return
    differing = _differences(config, log, figures)
    if not differing:
        return
    grave = any(grave for _, _, grave in differing)
    yield Finding(
        check="config_log_mismatch",
        severity="warning" if grave else "info",
        title="The log was not made with exactly this config: " + ", ".join(what for what, _, _ in differing),
        evidence=[place for _, places, _ in differing for place in places],
        explanation="The file was edited afterwards, or flags on the command line changed it. Findings that need "
        "both take the log's word for what happened.",
        advice="Give the config as it was when the run started, and the flags of its command line (--key=value).",
        confidence="likely" if grave else "certain",
    )


Difference = tuple[str, Seen, bool]
"""What differs, where that is seen, and whether it makes the run another one."""


def _differences(config: ConfigFacts, log: LogFacts, figures: Figures) -> list[Difference]:
    found: list[Difference] = []
    for note in log.all("override"):
        name, value = note.value
        if config.is_set(name) and config.get(name) != value:
            lines = [(note.place, note.text), *figures.place(name)]
            found.append((f"{name} {value!r} in the log, {config.get(name)!r} in the config", lines, name in SHAPE))
    parts = [config.get(name) for name in GEOMETRY]
    tokens = None if None in parts else math.prod(parts)
    logged, expected = figures.flops_per_token_logged, figures.shape_written and flops.palm(figures.shape_written)
    if logged and expected and abs(logged / expected - 1) > 0.05 and (figures.gpus or 1) == 1:
        seen = [log.first_mfu()]
        ran = figures.tokens_per_step
        if figures.shape is not None and ran and tokens and ran != tokens and not log.all("tokens_per_step"):
            shorter = figures.config.get("gradient_accumulation_steps") * ran / tokens
            what = f"mfu and time say {ran:,} tokens per step (accumulation {shorter:g}), the config {tokens:,}"
            if tokens % ran == 0:
                what += f" (or {tokens // ran} GPUs shared them)"
        else:
            what = f"mfu and time say {logged / 1e6:.0f} MFLOP per token, the config {expected / 1e6:.0f}"
        found.append((what, seen, True))
    for note in log.all("tokens_per_step"):
        if note.value and tokens and tokens != note.value:
            what = f"{note.value:,} tokens per step in the log, {tokens:,} in the config"
            found.append((what, [(note.place, note.text)], True))
    stop, last = config.get("max_iters"), figures.steps_seen
    if config.is_set("max_iters") and stop is not None and last is not None and last > stop + 1:
        found.append(
            (f"{last:,} steps in the log, max_iters {stop:,} in the config", figures.place("max_iters"), False)
        )
    if log.kind == "nanogpt":
        for name, steps in (("log_interval", log.steps.step), ("eval_interval", log.evals.step)):
            wanted, gaps = config.get(name), np.diff(steps)
            gaps = gaps[gaps > 0]
            if config.is_set(name) and wanted is not None and len(gaps) >= 3 and int(np.median(gaps)) != wanted:
                what = f"{name} {wanted} in the config, {int(np.median(gaps))} in the log"
                found.append((what, figures.place(name), False))
    return found
