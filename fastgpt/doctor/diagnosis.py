"""``diagnose`` runs every check that registered itself and puts the costliest finding first."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastgpt.doctor import checks
from fastgpt.doctor.checks import scaling
from fastgpt.doctor.evidence import Evidence, Seen
from fastgpt.doctor.figures import Figures, compute, evaluates_only
from fastgpt.doctor.findings import Finding, rank, registered_checks
from fastgpt.doctor.reading.configs_fastgpt import in_fastgpts_names
from fastgpt.hardware.cards import Gpu

OF_TRAINING = ("tokens_per_parameter", "dropout_on_large_corpus", "resume_schedule", "schedule", "curve")
"""Findings that mean nothing where eval_only trains nothing."""


@dataclass
class Diagnosis:
    """Everything that the doctor says about a run."""

    findings: list[Finding]
    figures: Figures
    not_checked: list[str]
    """What could not be checked, and which file would allow it."""
    unread: Seen
    """What was given and could not be read, and why."""
    steps_not_read: bool = False
    """The log has more lines that look like steps and could not be read than steps."""


def diagnose(evidence: Evidence, gpu: Gpu | None = None, corpus_tokens: int | None = None) -> Diagnosis:
    """Run every check. ``gpu``: the card of the run, None if it is not known. ``corpus_tokens``: of the training data."""
    checks.load(begun=evidence.log is not None or evidence.checkpoint is not None)
    figures = compute(evidence, gpu, corpus_tokens)
    found = [finding for check in registered_checks() for finding in check(evidence, figures, gpu)]
    if evaluates_only(figures.config):
        found = [finding for finding in found if finding.id not in OF_TRAINING]
    if figures.config.kind == "fastgpt":
        found = [replace(finding, advice=in_fastgpts_names(finding.advice)) for finding in found]
    log = evidence.log
    not_read = log is not None and bool(log.step_like) and log.step_like > len(log.steps)
    return Diagnosis(rank(found), figures, _not_checked(evidence, figures, gpu), _unread(evidence), not_read)


def _not_checked(evidence: Evidence, figures: Figures, gpu: Gpu | None) -> list[str]:
    """One sentence for each group of findings that the evidence leaves open."""
    log, settings = evidence.log, figures.config.settings
    on_cpu = bool(log and log.all("cpu")) or str(figures.config.get("device")).startswith("cpu")
    out = []
    if not settings:
        out.append(
            "Size, schedule and optimizer: give the run's config (or its log from the first line, which repeats it)."
        )
    elif (
        figures.shape_written is None
        and not figures.config.foreign_model
        and (log is None or not log.all("parameters"))
    ):
        out.append("Size: n_layer, n_head, n_embd and block_size could not all be read from the config.")
    if figures.tokens_per_parameter is not None and not scaling.in_range(figures.shape, figures.parameters or 0):
        out.append(
            "Tokens per parameter: Chinchilla's 20, and the fits behind it, are of GPT-like models of 10M parameters and more "
            "over vocabularies of word pieces; this one is outside of their range."
        )
    if log is None:
        out.append(
            "Speed, MFU, val against train and the curve: give the run's log (python train.py ... | tee run.log)."
        )
    else:
        if figures.steady_ms_per_iter is None:
            out.append("Speed and MFU: the log has no times of iterations without an evaluation.")
        elif figures.gpus is None and "gpus" in figures.assumed:
            out.append(figures.assumed["gpus"])
        elif figures.mfu_nanogpt is None and not figures.config.foreign_model and not on_cpu:
            out.append("MFU: the model's shape and tokens per step are not in the log: give the config.")
        if figures.val_minus_train is None:
            out.append(
                "val against train: the log has fewer than three evaluations of both (step N: train loss A, val loss "
                "B)."
            )
    if gpu is None and not on_cpu:
        out.append("MFU of the card's own peak, and memory: say which card it is for, --gpu rtx4070.")
    if evidence.checkpoint is None and (figures.config.get("init_from") == "resume" or (log and log.all("resume"))):
        out.append("Resuming: give the checkpoint (ckpt.pt); its shape and schedule are held against the config.")
    if figures.corpus_tokens is None and figures.seen():
        out.append("Epochs: the corpus' size is not known: --corpus-tokens N (for nanoGPT: bytes of train.bin / 2).")
    return out


def _unread(evidence: Evidence) -> Seen:
    """Everything that was given and could not be read."""
    parts = (evidence.config, evidence.log, evidence.checkpoint, evidence)
    return [
        (item.place, f"{item.text.strip()[:100]}: {item.why}" if item.text.strip() else item.why)
        for part in parts
        if part is not None
        for item in part.unread
    ]
