"""What a finding is, which checks can make one, and which finding comes first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, Literal, get_args

from fastgpt.doctor.evidence import Evidence, Seen, seen_as_json
from fastgpt.doctor.figures import Figures
from fastgpt.hardware.cards import Gpu

Severity = Literal["critical", "warning", "info"]
"""critical: the run is not what was meant, or will not survive. warning: it costs compute or quality. info: a number
is easily misread, or a detail could be better."""
COLOURS: dict[Severity, str] = {"critical": "bold red", "warning": "yellow", "info": "cyan"}
"""rich's styles."""
Confidence = Literal["certain", "likely", "possible"]
"""certain: arithmetic on what was read. likely: measured with its noise, or true of nearly every run. possible: the
files fit it, and the explanation says what else would."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a run, or easily misread in it."""

    check: str
    """What was tested: "warmup_too_long"."""
    severity: Severity
    title: str
    """One line."""
    evidence: Seen
    """What is seen, and where."""
    explanation: str
    """Why it matters."""
    advice: str
    """What to change: config lines ready to paste, or one sentence. Config lines come first."""
    confidence: Confidence = "certain"
    cost: float = 0.0
    """Share of the run's compute that it wastes or puts at stake, 0 to 1: findings of one severity are ranked by it."""
    cost_text: str = ""
    """The same for people: "21.8 h of training"."""
    id: str = ""
    """The group of checks that it belongs to: "schedule"."""
    regardless_of: tuple[str, ...] = ()
    """What may be assumed without making it less certain: it holds for every value that this could have."""

    def to_json(self) -> dict[str, Any]:
        shown = {name: value for name, value in vars(self).items() if name != "regardless_of"}
        return {"id": self.id} | shown | {"evidence": seen_as_json(self.evidence), "cost": round(self.cost, 4)}


def weighed(finding: Finding, figures: Figures) -> Finding:
    """A finding with the confidence of its weakest source, of all that was read for it. What rests on an assumption is no more
    than possible, is never critical, and names the assumption."""
    leaves = figures.leaves(figures.asked | figures.config.asked)
    assumed = sorted(leaves & set(figures.assumed))
    if notes := "".join(f" Note: {sentence}." for sentence in dict.fromkeys(figures.assumed[name] for name in assumed)):
        finding = replace(finding, explanation=finding.explanation + notes)
    if set(assumed) - set(finding.regardless_of):
        severity: Severity = "warning" if finding.severity == "critical" else finding.severity
        return replace(finding, confidence="possible", severity=severity)
    return finding


def is_code(line: str) -> bool:
    """Whether a line of advice is a config line."""
    return " = " in line and not line.endswith((".", ":", ";"))


def rank(findings: list[Finding]) -> list[Finding]:
    """Gravest first, then costliest; the order of the checks settles ties."""
    order = get_args(Severity)
    return sorted(findings, key=lambda finding: (order.index(finding.severity), -finding.cost))


Check = Callable[..., Iterator[Finding]]
REGISTRY: list[tuple[int, Check]] = []


def check(id: str, *, section: int) -> Callable[[Check], Check]:
    """Register the decorated function as a check whose findings have this ``id``. ``section`` is the section of docs/doctor.md
    that describes it: checks run in the order of the sections, those of one section in the order in which their module
    defines them.

    A check gets what its parameters name: ``figures``, ``config`` (the run's settings, perhaps none), ``gpu`` (None where it is
    not known), ``evidence``; and ``log`` and ``kept`` (the checkpoint), without which it does not run."""

    def register(function: Check) -> Check:
        names = inspect.signature(function).parameters

        @wraps(function)
        def checked(evidence: Evidence, figures: Figures, gpu: Gpu | None) -> Iterator[Finding]:
            given = {"figures": figures, "config": figures.config, "gpu": gpu, "evidence": evidence}
            given |= {"log": evidence.log, "kept": evidence.checkpoint}
            if any(given[name] is None for name in names if name != "gpu"):
                return
            figures.asked.clear()
            figures.config.asked.clear()
            for finding in function(**{name: given[name] for name in names}):
                yield replace(weighed(finding, figures), id=id)

        REGISTRY.append((section, checked))
        return checked

    return register


def registered_checks() -> list[Check]:
    """Every check of the modules imported so far, in the order of docs/doctor.md."""
    return [function for _, function in sorted(REGISTRY, key=lambda entry: entry[0])]
