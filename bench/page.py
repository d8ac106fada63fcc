"""The result of bench.mfu as one HTML file: tables and pictures inside, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

from bench import elsewhere, pictures
from bench import mfu_tables as tables

STYLE = """
:root { --ink: #1c2430; --soft: #5d6878; --line: #d9dee5; --accent: #1f4e79; --warn: #9a3412; --back: #f6f7f9; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 27px; margin: 0 0 2px; }
h2 { font-size: 20px; margin: 40px 0 10px; padding-top: 14px; border-top: 2px solid var(--accent); }
h3 { font-size: 16px; margin: 24px 0 8px; }
p { margin: 6px 0; } .soft { color: var(--soft); font-size: 13.5px; } .warn { color: var(--warn); }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0; }
.card { flex: 1 1 220px; background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px; }
.card b { display: block; font-size: 27px; color: var(--accent); line-height: 1.25; }
.card span { font-size: 13px; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; background: #fff; font-size: 13.5px; font-variant-numeric: tabular-nums; margin: 6px 0; }
th, td { padding: 4px 11px; border: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { background: #eaeff5; font-weight: 600; } td.text, th.text { text-align: left; white-space: normal; }
tr.sum td { font-weight: 600; background: #f3f5f8; }
img { width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 6px; margin: 8px 0; }
code { background: #e9edf2; padding: 1px 5px; border-radius: 4px; font-size: 13px; }
.projected { border-left: 5px solid #c55a11; padding: 2px 0 2px 16px; }
"""


def write(result: dict[str, Any], out: Path) -> Path:
    """Draw the pictures and write report.html beside them. Without matplotlib the report says that it has none."""
    try:
        drawn = pictures.draw(result, out)
    except ImportError:
        drawn = []
    path = out / "report.html"
    path.write_text(render(result, {image.name: image.read_bytes() for image in drawn}), encoding="utf-8")
    return path


def render(result: dict[str, Any], images: dict[str, bytes]) -> str:
    """The whole page. ``images``: PNG files by name, as pictures.draw names them."""
    parts = [_summary(result)]
    if result["backends"]:
        parts.append("<h2>Backends, in turns</h2>" + _table(tables.speed_cells(result)))
    parts += [f'<p class="warn">failed: {_text(failure)}</p>' for failure in tables.failures(result)]
    parts.append("".join(f'<p class="soft">{_text(note)}</p>' for note in tables.mfu_notes(result)))
    profiled = {name: backend for name, backend in result["backends"].items() if backend.get("rows")}
    if profiled:
        parts.append(
            "<h2>Where the time goes</h2>" + _image(images, "time.png", "Stacked bar of a step's time per backend")
        )
    parts += [_backend(name, backend, images) for name, backend in profiled.items()]
    if profiled and not images:
        parts.append('<p class="warn">No pictures: matplotlib is not installed (pip install fastgpt[plot]).</p>')
    if result.get("interpreted"):
        parts.append(_interpreted(result["interpreted"]))
    if result.get("projection"):
        parts.append(_projection(result["projection"]))
    if result.get("audit"):
        parts.append(_audit(result["audit"]))
    parts.append(_method(result))
    title = f"fastgpt: a training step on {result['environment']['device']}"
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{_text(title)}</title><style>{STYLE}</style>"
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{body}\n</main></body></html>\n'


# ---------------------------------------------------------------- sections


def _summary(result: dict[str, Any]) -> str:
    """The headline: the fastest backend, and its three MFUs."""
    head = "<h1>How fast is a training step?</h1>"
    head += f"<p>{_text(tables.what(result['setup']))}</p>"
    head += f'<p class="soft">{_text(tables.where(result))}</p>'
    head += "".join(f'<p class="warn">{_text(note)}</p>' for note in result.get("notes", ()))
    timed = {name: b for name, b in result["backends"].items() if "ms" in b}
    if not timed:
        return head + ('<p class="warn">No backend could be measured.</p>' if result["backends"] else "")
    name, best = min(timed.items(), key=lambda item: item[1]["ms"])
    speed = f"{tables.milliseconds(best['ms'])} ± {tables.milliseconds(best['iqr_ms'])} ms per step, fastest backend: {name}"
    cards = [(f"{best['tokens_per_second']:,.0f} tok/s", speed)]
    cards += [(tables.mfu_percent(f["value"]), f"MFU {f['name']}: {f['denominator']}") for f in best["mfu"]]
    body = "".join(
        f'<div class="card"><b>{_text(figure)}</b><span>{_text(label)}</span></div>' for figure, label in cards
    )
    return head + f'<div class="cards">{body}</div>'


def _backend(name: str, backend: dict[str, Any], images: dict[str, bytes]) -> str:
    return (
        f"<h2>{_text(name)}: every operation of one step</h2>"
        + f'<p class="soft">{_text(tables.overhead(backend))}. {_text(_accounting(backend))}</p>'
        + _table(tables.operation_cells(backend))
        + f"<h3>What would help {_text(name)}</h3>"
        + _table(tables.help_cells(backend, 12))
        + _image(images, f"roofline-{name}.png", f"Roofline with every operation of {name}")
    )


def _accounting(backend: dict[str, Any]) -> str:
    found = backend["profile"]
    text = f"{tables.percent(found['accounted'])} of the wall time has a name; the trace is {found['trace']}."
    if found["unaccounted_ms"]:
        text += " Not named: " + ", ".join(
            f"{name} {tables.milliseconds(ms)} ms" for name, ms in list(found["unaccounted_ms"].items())[:8]
        )
    if found["overlap_ms"] > 0:
        text += f" Kernels overlapped for {tables.milliseconds(found['overlap_ms'])} ms, counted once."
    return text


def _interpreted(found: dict[str, Any]) -> str:
    head = "<h2>triton, in the interpreter</h2>"
    if "error" in found:
        return head + f'<p class="warn">failed: {_text(found["error"])}</p>'
    head += f'<p class="warn">{_text(tables.INTERPRETED)}</p><p>{_text(tables.what(found["setup"]))}</p>'
    return head + _table(tables.operation_cells(found, roofs=False))


def _projection(found: dict[str, Any]) -> str:
    head = (
        f'<h2>Projected, not measured: {_text(found["gpu"] + tables.projected_in(found))}</h2><div class="projected">'
    )
    head += "".join(f"<p>{_text(note)}</p>" for note in elsewhere.projection_notes(found))
    head += _table(elsewhere.projection_cells(found)) + "<h3>Operations of the projected step</h3>"
    return head + _table(elsewhere.projected_operation_cells(found)) + "</div>"


def _audit(found: dict[str, Any]) -> str:
    head = f"<h2>Compiled for {_text(found['gpu'])} ({_text(found['arch'])}), not run</h2>"
    if "error" in found:
        return head + f'<p class="warn">failed: {_text(found["error"])}</p>'
    return head + f"<p>{_text(elsewhere.audit_note(found))}</p>" + _table(elsewhere.audit_cells(found))


def _method(result: dict[str, Any]) -> str:
    notes = [
        "One step is profiled with torch.profiler (the one of median length of a few). With a GPU, time is what the device "
        "runs, kernels that overlap counted once; without one it is the self time of the host's operations."
    ]
    if result["backends"]:
        notes.insert(
            0,
            "Backends take turns, each round beginning with another one; a step is timed by the host's clock with the device "
            "synchronised at its end. Medians, and the distance of the quartiles.",
        )
        notes.append(
            f"Roofs: {tables.roofs(result)}, measured in this process or on this machine before. FLOPs and bytes are least "
            f"figures by formula; {tables.CACHED}."
        )
    rows = [
        ["what", "value"],
        *([key, str(value)] for key, value in result["environment"].items() if value is not None),
    ]
    return (
        "<h2>How it was measured</h2>"
        + "".join(f"<p>{_text(note)}</p>" for note in notes)
        + _table(rows)
        + f'<p class="soft">Schema {_text(result["schema"])} {result["schema_version"]}; <code>mfu.json</code> beside this '
        "file holds every figure.</p>"
    )


# ---------------------------------------------------------------- pieces


def _text(value: Any) -> str:
    return html.escape(str(value))


def _table(cells: list[list[str]]) -> str:
    text = [name in tables.TEXT_COLUMNS for name in cells[0]]

    def line(row: list[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=text' if is_text else ''}>{_text(cell)}</{tag}>" for cell, is_text in zip(row, text)
        )

    body = "".join(f"<tr{' class=sum' if row[0] == 'sum' else ''}>{line(row, 'td')}</tr>" for row in cells[1:])
    return (
        f'<div class="scroll"><table><thead><tr>{line(cells[0], "th")}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _image(images: dict[str, bytes], name: str, label: str) -> str:
    if name not in images:
        return ""
    return f'<img alt="{_text(label)}" src="data:image/png;base64,{base64.b64encode(images[name]).decode()}">'
