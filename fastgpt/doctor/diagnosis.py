"""``diagnose`` runs every check that registered itself and puts the costliest finding first."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fastgpt.doctor import checks
from fastgpt.doctor import figures as figures_module
from fastgpt.doctor.checks import unknowns
from fastgpt.doctor.evidence import Evidence, Place
from fastgpt.doctor.figures import Figures
from fastgpt.doctor.findings import Finding, rank, registered_checks
from fastgpt.doctor.reading import configs_fastgpt
from fastgpt.hardware.cards import Gpu

checks.load()


@dataclass
class Diagnosis:
    """Everything that the doctor says about a run."""

    findings: list[Finding]
    figures: Figures
    not_checked: list[str] = field(default_factory=list)
    """What could not be checked, and which file would allow it."""
    unread: list[tuple[Place, str]] = field(default_factory=list)
    """What was given and could not be read, and why."""

    @property
    def clean(self) -> bool:
        return not self.findings


def diagnose(evidence: Evidence, gpu: Gpu | None = None, corpus_tokens: int | None = None) -> Diagnosis:
    """Run every check. ``gpu``: the card of the run, None if it is not known. ``corpus_tokens``: of the training data."""
    numbers = figures_module.compute(evidence, gpu, corpus_tokens)
    found = [finding for check in registered_checks() for finding in check(evidence, numbers, gpu)]
    if numbers.config.kind == "fastgpt":
        found = [replace(finding, advice=configs_fastgpt.in_fastgpts_names(finding.advice)) for finding in found]
    return Diagnosis(
        rank(found),
        numbers,
        unknowns.not_checked(evidence, numbers, gpu),
        unknowns.unread(evidence) + numbers.impossible,
    )
