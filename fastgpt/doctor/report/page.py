"""The report as one HTML file that needs nothing else: figures, MFU in true units, the loss curve with the findings pinned
to it, the findings. doctor.html.jinja lays out what is worked out here."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from fastgpt import templates
from fastgpt.common import UserError
from fastgpt.doctor.diagnosis import Diagnosis
from fastgpt.doctor.evidence import Evidence, LogFacts
from fastgpt.doctor.figures import Figures
from fastgpt.doctor.findings import is_code
from fastgpt.doctor.report.curve_plot import loss_curve
from fastgpt.doctor.report.text import counts, is_table, summary
from fastgpt.hardware.cards import NANOGPT_PEAK, Gpu


def write(path: Path, report: Diagnosis, evidence: Evidence, gpu: Gpu | None) -> None:
    """Write the page, also in an earlier one's place. Raises UserError if the file cannot be written, or is something else."""
    try:
        if path.is_file():
            with open(path, "rb") as file:
                if (head := file.read(1000)) and templates.MARK not in head:
                    raise UserError(
                        f"html is {path}, which exists and is not a report of the doctor: name another file"
                    )
        path.write_text(render(report, evidence, gpu), encoding="utf-8")
    except OSError as error:
        raise UserError(f"html is {path}, which cannot be written ({error.strerror}): name another file") from error


def render(report: Diagnosis, evidence: Evidence, gpu: Gpu | None) -> str:
    """The page as text."""
    part = [evidence.log and evidence.log.file, evidence.checkpoint and evidence.checkpoint.file]
    if evidence.config is not None:
        part.insert(0, next((s.place.file for s in evidence.config.settings.values()), None))
    name = ", ".join(dict.fromkeys(Path(file).name for file in part if file)) or "a run"
    return templates.render(
        __package__,
        "doctor.html.jinja",
        title=f"{name}: doctor's report",
        name=name,
        verdict=counts(report) or "nothing found",
        figures=summary(report.figures, gpu),
        bar=_utilisation(report.figures, gpu),
        curve=_curve(report, evidence.log),
        findings=[
            (finding, _blocks(finding.explanation, is_table), _blocks(finding.advice, is_code))
            for finding in report.findings
        ],
        unread=[f"{place}: {text}" for place, text in report.unread],
        not_checked=report.not_checked,
    )


def _blocks(text: str, fixed: Callable[[str], bool]) -> list[tuple[bool, str]]:
    """Paragraphs (False, line), and runs of lines for which ``fixed`` holds as preformatted blocks (True, lines)."""
    out: list[tuple[bool, str]] = []
    for is_fixed, run in groupby(text.split("\n"), fixed):
        lines = [line for line in run if line]
        out += [(True, "\n".join(lines))] if is_fixed else [(False, line) for line in lines]
    return out


def _utilisation(figures: Figures, gpu: Gpu | None) -> dict[str, Any] | None:
    """One bar: what the run does, on the card's own scale, nanoGPT's unit beneath. Places are shares of the bar's width."""
    if gpu is None or figures.model_tflops is None or figures.nominal_tflops is None or figures.mfu_nominal is None:
        return None
    top = max(figures.nominal_tflops, figures.model_tflops)  # TFLOP/s at the right end
    of_an_a100 = top * 1e12 / NANOGPT_PEAK
    percents = range(0, int(100 * of_an_a100) + 1, 5 if of_an_a100 > 0.12 else 1)
    here, whole = 100 * (figures.mfu_nanogpt or 0), 100 * (figures.ceiling_nanogpt or 0)
    return {
        "steady": figures.model_tflops / top,
        "overall": figures.model_tflops * (1 - (figures.evaluation_share or 0.0)) / top,
        "label": f"{figures.model_tflops:.1f} TFLOP/s in steady state: {figures.mfu_nominal:.1%} of the card",
        "label_inside": figures.mfu_nominal > 0.35,
        "peak": f"{gpu.name}: {figures.nominal_tflops:.1f} TFLOP/s nominal dense {figures.precision}",
        "ticks": [(percent, percent / 100 / of_an_a100) for percent in percents],
        "note": f"nanoGPT's mfu, of an A100's 312 TFLOP/s: {here:.1f}% here, {whole:.1f}% is all this card has in "
        f"{figures.precision}; the white line is with evaluations in the time",
    }


def _curve(report: Diagnosis, log: LogFacts | None) -> Markup | None:
    """The loss curve, with a numbered pin wherever a finding's evidence is a step of the log."""
    if log is None or not (np.isfinite(log.steps.loss).any() or np.isfinite(log.evals.val).any()):
        return None
    where = dict(zip(log.steps.line.tolist(), log.steps.step.tolist())) | dict(
        zip(log.evals.line.tolist(), log.evals.step.tolist())
    )
    pins = []
    for number, finding in enumerate(report.findings, 1):
        steps = [where[place.line] for place, _ in finding.evidence if place.file == log.file and place.line in where]
        pins += [(step, number, finding) for step in dict.fromkeys(steps)]
    return Markup(loss_curve(log, pins))
