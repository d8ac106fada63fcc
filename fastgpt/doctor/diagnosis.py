"""``diagnose`` runs every check that registered itself and puts the costliest finding first."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastgpt.doctor import checks
from fastgpt.doctor.evidence import Evidence, Seen
from fastgpt.doctor.figures import Figures, compute
from fastgpt.doctor.findings import Finding, rank, registered_checks
from fastgpt.doctor.reading.configs_fastgpt import in_fastgpts_names
from fastgpt.doctor.unknowns import not_checked, unread
from fastgpt.hardware.cards import Gpu

checks.load()


@dataclass
class Diagnosis:
    """Everything that the doctor says about a run."""

    findings: list[Finding]
    figures: Figures
    not_checked: list[str]
    """What could not be checked, and which file would allow it."""
    unread: Seen
    """What was given and could not be read, and why."""


def diagnose(evidence: Evidence, gpu: Gpu | None = None, corpus_tokens: int | None = None) -> Diagnosis:
    """Run every check. ``gpu``: the card of the run, None if it is not known. ``corpus_tokens``: of the training data."""
    figures = compute(evidence, gpu, corpus_tokens)
    found = [finding for check in registered_checks() for finding in check(evidence, figures, gpu)]
    if figures.config.kind == "fastgpt":
        found = [replace(finding, advice=in_fastgpts_names(finding.advice)) for finding in found]
    return Diagnosis(rank(found), figures, not_checked(evidence, figures, gpu), unread(evidence) + figures.impossible)
