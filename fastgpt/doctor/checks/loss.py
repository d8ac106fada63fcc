"""Train and validation loss against each other: what the gap shows, and what it cannot show."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastgpt.common import rounded
from fastgpt.doctor.checks import scaling
from fastgpt.doctor.evidence import ConfigFacts, Evidence, LogFacts, Seen
from fastgpt.doctor.figures import Figures, Mean
from fastgpt.doctor.findings import Finding, check

LARGE_CORPUS = 1e9
"""Where the size of the corpus is not known, a run of more tokens than this counts as less than one epoch."""


@check("val_below_train", section=3)
def val_below_train(log: LogFacts, figures: Figures, config: ConfigFacts) -> Iterator[Finding]:
    """Validation below train by more than the noise: not dropout, but a difference between the splits."""
    gap = figures.val_minus_train
    if gap is None or gap.value > -0.01 or gap.sigmas < 3:
        return
    dropout = config.get("dropout")
    eval_mode = log.kind == "nanogpt"
    explanation = (
        "Dropout cannot show in this line: nanoGPT's estimate_loss() calls model.eval() for both splits. "
        if eval_mode
        else "Programs that evaluate both splits in eval mode, as nearly all do, cannot show dropout in these lines. "
    )
    explanation += (
        f"The gap is {gap.value:+.3f} nat with a standard error of {gap.error:.3f} ({gap.n} evaluations from step "
        f"{gap.since:,} on; single ones scatter by {gap.error * gap.n**0.5:.3f}), so it is not noise. "
    )
    if dropout == 0:
        explanation += "And dropout is 0 here. "
    explanation += _other_run(figures)
    explanation += (
        "What is left is a difference between the splits: the validation text is easier to predict than the train "
        "text. It says nothing about the model, and losses of runs on other splits do not compare with this one."
    )
    yield Finding(
        check="val_below_train",
        severity="info",
        title=f"val lies {-gap.value:.3f} nat below train: the splits differ, dropout has nothing to do with it",
        evidence=_extreme_evaluations(log, gap),
        explanation=explanation,
        advice="Nothing in the config. To compare with others, or to be sure of the split, draw the validation "
        "documents at random from the whole corpus (or evaluate on a public set).",
        confidence="certain" if eval_mode else "likely",
    )


def _other_run(figures: Figures) -> str:
    """What the other of the two real runs shows: they differ in dropout."""
    dataset = str(figures.config.get("dataset", "")).lower()
    if "fineweb" not in dataset:
        return ""
    dropout = figures.config.get("dropout")
    ran = scaling.LARGE if dropout else scaling.SMALL
    value, error = ran.val_minus_train
    return (
        f"In {ran.name} on FineWeb the gap is {value:+.3f} +- {error:.3f} at dropout {ran.dropout:g}: it "
        f"{'persists' if ran.dropout == 0 else 'is there either way'}. "
    )


def _extreme_evaluations(log: LogFacts, gap: Mean) -> Seen:
    """The last evaluation, and the one with the widest gap."""
    evals = log.evals
    difference = np.where(evals.step >= gap.since, evals.val - evals.train, np.nan)
    rows = dict.fromkeys([len(evals) - 1, int(np.nanargmin(difference))])
    return [log.seen(evals, row) for row in rows if np.isfinite(difference[row])]


@check("dropout_on_large_corpus", section=4)
def dropout_on_large_corpus(evidence: Evidence, figures: Figures, config: ConfigFacts) -> Iterator[Finding]:
    """Dropout above 0 where no token is seen twice: it only costs."""
    dropout, tokens = config.get("dropout"), figures.seen()
    if not dropout:
        return
    if figures.epochs is not None:
        if figures.epochs >= 1:
            return
        data = f"The run sees {figures.epochs:.2f} epochs of its data: no token twice. "
    else:
        if tokens is None or tokens < LARGE_CORPUS or _overfits(figures):
            return
        data = (
            f"The run sees {rounded(tokens)} tokens. How many the corpus has is not in these files (bytes of train.bin / "
            "2), "
        )
        data += (
            "but validation does not rise above train: no sign that text is learned by heart. "
            if figures.val_minus_train
            else "but so large a run is seldom on a small corpus. "
        )
    cost = figures.iter_minus_train
    yield Finding(
        check="dropout_on_large_corpus",
        severity="warning",
        title=f"dropout {dropout:g} on {'less than an epoch' if figures.epochs is not None else 'a large corpus'}: it "
        "costs, and has nothing to prevent",
        evidence=figures.place("dropout", "max_iters", "dataset") + _noisiest(evidence.log, cost),
        explanation=data + "Dropout is for data that are seen again and again. " + _measured_cost(evidence, cost),
        advice="dropout = 0.0",
        confidence="likely" if figures.epochs is None else "certain",
        cost=0.1,
        cost_text=f"{cost.value:.3f} nat in training" if cost and cost.sigmas >= 3 and cost.value > 0 else "",
    )


def _overfits(figures: Figures) -> bool:
    gap = figures.val_minus_train
    return gap is not None and gap.value > 0.05 and gap.sigmas > 3


def _measured_cost(evidence: Evidence, cost: Mean | None) -> str:
    """Where dropout shows: `iter` losses are computed with it, the train evaluations around them without."""
    if evidence.log is None or evidence.log.kind != "nanogpt" or cost is None:
        return "A log with both iteration losses and train evaluations would show what it costs here."
    value, error = scaling.LARGE.iter_minus_train
    small = "" if cost.sigmas >= 3 else ", which is within its noise"
    return (
        "Its cost shows in the `iter` losses, which are computed with it, against the train evaluations around them, "
        f"which are not: {cost} nat{small} ({cost.n} iterations from step "
        f"{cost.since:,} on). In {scaling.LARGE.name}, at dropout 0, the same difference is {value:+.3f} +- "
        f"{error:.3f}: nothing. This is the loss while training with it; what the final model loses is less, and only "
        "a second run tells."
    )


def _noisiest(log: LogFacts | None, cost: Mean | None) -> Seen:
    """One iteration and the evaluation before it, as an example of the difference."""
    if log is None or cost is None or not len(log.steps):
        return []
    rows = np.flatnonzero(np.isin(log.steps.step, log.evals.step) & (log.steps.step >= cost.since))
    if not len(rows):
        return []
    row = rows[len(rows) // 2]
    evaluation = int(np.flatnonzero(log.evals.step == log.steps.step[row])[0])
    return [
        (
            log.place(log.steps.line[row]),
            f"iter {log.steps.step[row]}: loss {log.steps.loss[row]:.4f}; train evaluated at the same step: "
            f"{log.evals.train[evaluation]:.4f}",
        )
    ]
