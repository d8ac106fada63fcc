"""``diagnose`` runs every check that registered itself and puts the costliest finding first."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fastgpt.doctor import checks, comments, curve, environment, figures, loss, resume, schedule, size, speed, unknowns  # noqa: F401
from fastgpt.doctor.evidence import Evidence, Place
from fastgpt.doctor.figures import Figures
from fastgpt.doctor.findings import Finding, rank, registered_checks
from fastgpt.hardware import Gpu

checks.load()


@dataclass
class Diagnosis:
    """All that the doctor has to say about a run."""

    findings: list[Finding]
    figures: Figures
    not_checked: list[str] = field(default_factory=list)
    """What could not be known, and which file would tell."""
    unread: list[tuple[Place, str]] = field(default_factory=list)
    """What was there and could not be read, and why."""

    @property
    def clean(self) -> bool:
        return not self.findings


FASTGPT_NAMES = {"gradient_accumulation_steps": "grad_accum", "learning_rate": "lr", "dtype": "precision"}


def in_fastgpts_names(advice: str) -> str:
    """Config lines under nanoGPT's names as lines of a fastgpt TOML, where the decay ends with the run and the floor is
    a share."""
    lines = []
    for line in advice.split("\n"):
        name, equals, value = line.partition(" = ")
        if equals and name == "lr_decay_iters":
            continue
        if equals and name == "min_lr":
            name, value = "min_lr_ratio", "0.1"
        if equals and name == "dtype":
            value = value.replace("bfloat16", "bf16").replace("float16", "fp16")
        lines.append(f"{FASTGPT_NAMES.get(name, name)}{equals}{value}")
    return "\n".join(lines)


def diagnose(evidence: Evidence, gpu: Gpu | None = None, corpus_tokens: int | None = None) -> Diagnosis:
    """Run every check. ``gpu``: the card of the run, None if it is not known. ``corpus_tokens``: of the training data."""
    numbers = figures.compute(evidence, gpu, corpus_tokens)
    found = [finding for check in registered_checks() for finding in check(evidence, numbers, gpu)]
    if numbers.config.kind == "fastgpt":
        found = [replace(finding, advice=in_fastgpts_names(finding.advice)) for finding in found]
    return Diagnosis(
        rank(found),
        numbers,
        unknowns.not_checked(evidence, numbers, gpu),
        unknowns.unread(evidence) + numbers.impossible,
    )
