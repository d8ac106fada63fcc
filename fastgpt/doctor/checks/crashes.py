"""A log that ends in an exception: what it means, and the remedy. The sentences are in crashes.toml."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from fastgpt.common import packaged_toml
from fastgpt.doctor.evidence import Evidence
from fastgpt.doctor.figures import Figures
from fastgpt.doctor.findings import Finding, check
from fastgpt.hardware.cards import Gpu

CRASHES: list[dict[str, Any]] = packaged_toml("fastgpt.doctor.checks", "crashes.toml")["crash"]
SPOKEN_FOR = ("oom", "no_cuda", "no_bf16", "no_triton", "no_compiler")
"""Notes of which environment.from_log makes a finding: what comes after them follows from them."""


@check("environment", section=11)
def ended_in_an_exception(evidence: Evidence, figures: Figures, gpu: Gpu | None) -> Iterator[Finding]:
    """The first exception after the last step. Of a chain, or of several ranks, it is the one that brought the others."""
    log = evidence.log
    if log is None:
        return
    last = max((int(series.line[-1]) for series in (log.steps, log.evals) if len(series)), default=0)
    after = [note for note in log.notes if (note.place.line or 0) > last]
    notes = [note for note in after if note.kind == "exception"]
    if not notes or any(note.kind in SPOKEN_FOR for note in after):
        return
    # A sentence that is known counts before one that is not: the line that says most is seldom the first.
    ranked = ((crash, note) for crash in CRASHES for note in notes if re.search(crash["pattern"], note.text))
    crash, note = next(ranked)
    known = bool(crash["pattern"])
    yield Finding(
        check=crash["check"],
        severity=crash["severity"],
        title=crash["title"].format(text=note.value if len(note.value) <= 90 else note.value[:87] + "..."),
        evidence=[(note.place, note.text)],
        explanation=crash["why"],
        advice=crash["advice"].strip(),
        confidence="likely" if known else "certain",
        cost=1.0 if crash["severity"] == "critical" else 0.0,
    )
