"""The report as one HTML file that needs nothing else: figures, MFU in true units, the loss curve with the findings pinned
to it, the findings. Drawn as inline SVG; no script, no font, no request to anywhere."""

from __future__ import annotations

from html import escape
from pathlib import Path

import numpy as np

from fastgpt.common import UserError
from fastgpt.doctor.curve_plot import loss_curve
from fastgpt.doctor.diagnosis import Diagnosis
from fastgpt.doctor.evidence import Evidence, LogFacts
from fastgpt.doctor.figures import Figures
from fastgpt.doctor.findings import Finding
from fastgpt.doctor.report import FIT, counts, is_code, summary
from fastgpt.hardware import NANOGPT_PEAK, Gpu

STYLE = """
:root { --ink: #1c2430; --dim: #68758a; --line: #d9dfe8; --paper: #fff; --soft: #f5f7fa;
        --critical: #c62828; --warning: #b26a00; --info: #1565a7; --good: #2e7d32; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9f0; --dim: #93a0b4; --line: #333d4b; --paper: #151a21; --soft: #1d242d;
          --critical: #ef6a6a; --warning: #e3a13a; --info: #62aee8; --good: #6cc070; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem; margin: 2rem auto;
       padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
.verdict { color: var(--dim); margin: .2rem 0 1.4rem; }
table.figures { border-collapse: collapse; } table.figures td { padding: .12rem 1.2rem .12rem 0; vertical-align: top; }
table.figures td:first-child { color: var(--dim); white-space: nowrap; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg text.dim { fill: var(--dim); } svg text.pin { fill: #fff; font-weight: 600; text-anchor: middle; }
article { border: 1px solid var(--line); border-left: 5px solid var(--mark); border-radius: 6px;
       padding: .7rem 1rem; margin: .8rem 0; }
article h3 { font-size: 1rem; margin: 0 0 .4rem; } article h3 .n { color: #fff; background: var(--mark); border-radius: 1em;
       padding: .05em .55em; margin-right: .5em; font-size: .85em; }
.critical { --mark: var(--critical); } .warning { --mark: var(--warning); } .info { --mark: var(--info); }
pre { background: var(--soft); padding: .5rem .7rem; border-radius: 4px; overflow-x: auto; margin: .4rem 0; font-size: 13px; }
pre.do { border-left: 3px solid var(--good); }
.seen { font: 13px/1.5 ui-monospace, monospace; color: var(--dim); margin: .3rem 0; overflow-wrap: anywhere; }
.seen b { font-weight: 500; color: var(--ink); } .sure { color: var(--dim); font-size: 13px; margin: .4rem 0 0; }
p { margin: .4rem 0; }
"""


def write(path: Path, report: Diagnosis, evidence: Evidence, gpu: Gpu | None) -> None:
    """Write the page. Raises UserError if the file cannot be written."""
    try:
        path.write_text(render(report, evidence, gpu), encoding="utf-8")
    except OSError as error:
        raise UserError(f"html is {path}, which cannot be written ({error.strerror}): name another file") from error


def render(report: Diagnosis, evidence: Evidence, gpu: Gpu | None) -> str:
    """The page as text."""
    part = [evidence.log and evidence.log.file, evidence.checkpoint and evidence.checkpoint.file]
    if evidence.config is not None:
        part.insert(0, next((s.place.file for s in evidence.config.settings.values()), None))
    name = ", ".join(dict.fromkeys(Path(file).name for file in part if file)) or "a run"
    rows = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(text)}</td></tr>" for key, text in summary(report.figures, gpu)
    )
    sections = [
        f"<h1>{escape(name)}</h1><p class=verdict>{counts(report) or 'nothing found'}</p>",
        f"<table class=figures>{rows}</table>",
        _utilisation(report.figures, gpu),
        _curve(report, evidence.log),
    ]
    if report.findings:
        sections.append("<h2>Findings</h2>")
        sections += [_finding(number, finding) for number, finding in enumerate(report.findings, 1)]
    sections.append(_list("Could not be read", [f"{place}: {text}" for place, text in report.unread]))
    sections.append(_list("Not checked", report.not_checked))
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(name)}: doctor's report</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body></html>\n"
    )


def _list(title: str, sentences: list[str]) -> str:
    if not sentences:
        return ""
    return f"<h2>{title}</h2><ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _finding(number: int, finding: Finding) -> str:
    seen = "<br>".join(f"{escape(str(place))} <b>{escape(text)}</b>" for place, text in finding.evidence)
    stake = f" At stake: {escape(finding.cost_text)}." if finding.cost_text else ""
    return (
        f"<article class={finding.severity} id=finding-{number} data-id={finding.id}><h3><span "
        f"class=n>{number}</span>{escape(finding.title)}</h3><p "
        f"class=seen>{seen}</p>{_blocks(finding.explanation, _is_table, '')}{_blocks(finding.advice, is_code, ' class=do')}<p "
        f"class=sure>{finding.severity}, {finding.confidence}.{stake} [{finding.id}]</p></article>"
    )


def _is_table(line: str) -> bool:
    return line.startswith(FIT)


def _blocks(text: str, fixed, attributes: str) -> str:  # type: ignore[no-untyped-def]
    """Paragraphs, and runs of lines for which ``fixed`` holds as preformatted blocks."""
    out: list[str] = []
    run: list[str] = []
    for line in [*text.split("\n"), ""]:
        if line and fixed(line):
            run.append(escape(line))
            continue
        if run:
            out.append(f"<pre{attributes}>" + "\n".join(run) + "</pre>")
            run = []
        if line:
            out.append(f"<p>{escape(line)}</p>")
    return "".join(out)


def _utilisation(figures: Figures, gpu: Gpu | None) -> str:
    """One bar: what the run does, on the card's own scale, nanoGPT's unit beneath."""
    if gpu is None or figures.model_tflops is None or figures.nominal_tflops is None or figures.mfu_nominal is None:
        return ""
    left, width, y, height = 10, 880, 26, 30
    top = max(figures.nominal_tflops, figures.model_tflops)
    x = lambda tflops: left + width * tflops / top  # noqa: E731
    overall = figures.model_tflops * (1 - (figures.evaluation_share or 0.0))
    end, inside = x(figures.model_tflops), figures.mfu_nominal > 0.35
    label = f"{figures.model_tflops:.1f} TFLOP/s in steady state: {figures.mfu_nominal:.1%} of the card"
    parts = [
        f"<rect x={left} y={y} width={width} height={height} rx=4 fill='var(--soft)' stroke='var(--line)'/>",
        f"<rect x={left} y={y} width={end - left:.1f} height={height} rx=4 fill='var(--info)' fill-opacity=.85 />",
        f"<line x1={x(overall):.1f} x2={x(overall):.1f} y1={y} y2={y + height} stroke='var(--paper)' stroke-width=1.5 "
        "/>",
        f"<text x={end - 8 if inside else end + 8:.1f} y={y + 20} text-anchor={'end' if inside else 'start'} "
        f"{'style=fill:#fff' if inside else ''}>{label}</text>",
        f"<text x={left + width} y={y - 8} text-anchor=end>{escape(gpu.name)}: {figures.nominal_tflops:.1f} TFLOP/s "
        f"nominal dense {figures.precision}</text>",
    ]
    step = 5 if top * 1e12 / NANOGPT_PEAK > 0.12 else 1
    for percent in range(0, int(100 * top * 1e12 / NANOGPT_PEAK) + 1, step):
        at = x(percent / 100 * NANOGPT_PEAK / 1e12)
        parts.append(f"<line x1={at:.1f} x2={at:.1f} y1={y + height} y2={y + height + 5} stroke='var(--dim)'/>")
        parts.append(f"<text class=dim x={at:.1f} y={y + height + 18} text-anchor=middle>{percent}%</text>")
    here, whole = 100 * (figures.mfu_nanogpt or 0), 100 * (figures.ceiling_nanogpt or 0)
    note = f"nanoGPT's mfu, of an A100's 312 TFLOP/s: {here:.1f}% here, {whole:.1f}% is all this card has"
    note += f" in {figures.precision}"
    parts.append(
        f"<text class=dim x={left} y={y + height + 38}>{note}; the white line is with evaluations in the time</text>"
    )
    return f"<h2>MFU in true units</h2><svg viewBox='0 0 900 100' role=img aria-label='{label}'>{''.join(parts)}</svg>"


def _curve(report: Diagnosis, log: LogFacts | None) -> str:
    """The loss curve, with a numbered pin wherever a finding's evidence is a step of the log."""
    if log is None or not (np.isfinite(log.steps.loss).any() or np.isfinite(log.evals.val).any()):
        return ""
    where = dict(zip(log.steps.line.tolist(), log.steps.step.tolist())) | dict(
        zip(log.evals.line.tolist(), log.evals.step.tolist())
    )
    pins = []
    for number, finding in enumerate(report.findings, 1):
        steps = [where[place.line] for place, _ in finding.evidence if place.file == log.file and place.line in where]
        pins += [(step, number, finding) for step in dict.fromkeys(steps)]
    return "<h2>Loss</h2>" + loss_curve(log, pins)
