"""The result of bench.mfu as one HTML file: tables and pictures inside, nothing loaded from anywhere.

mfu.html.jinja lays out what is put into words here.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from bench.reports import elsewhere, pictures
from bench.reports import mfu_tables as tables
from bench.reports.tables import is_figures
from fastgpt import templates
from fastgpt.common import percent


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
    return templates.render(
        __package__,
        "mfu.html.jinja",
        title=f"fastgpt: a training step on {result['environment']['device']}",
        is_figures=is_figures,
        pictures={name: base64.b64encode(image).decode() for name, image in images.items()},
        what=tables.what(result["setup"]),
        where=tables.where(result),
        notes=result.get("notes", ()),
        cards=_cards(result),
        speed=tables.speed_cells(result) if result["backends"] else None,
        failures=tables.failures(result),
        mfu_notes=[*tables.mfu_notes(result), *tables.host_notes(result)],
        backends=[
            _backend(name, backend, tables.on_a_gpu(result))
            for name, backend in result["backends"].items()
            if backend.get("rows")
        ],
        interpreted=result.get("interpreted") and _interpreted(result["interpreted"]),
        projection=result.get("projection") and _projection(result["projection"]),
        audit=result.get("audit") and _audit(result["audit"]),
        method=_method(result),
        environment=[
            ["what", "value"],
            *([key, str(value)] for key, value in result["environment"].items() if value is not None),
        ],
        schema=f"{result['schema']} {result['schema_version']}",
    )


def _cards(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The headline, as figures with their labels: speed and MFUs of the fastest backend. Empty if none was timed."""
    timed = {name: b for name, b in result["backends"].items() if "ms" in b}
    if not timed:
        return []
    name, best = min(timed.items(), key=lambda item: item[1]["ms"])
    speed = f"{tables.milliseconds(best['ms'])} ± {tables.milliseconds(best['iqr_ms'])} ms per step, fastest backend: {name}"
    return [
        (f"{best['tokens_per_second']:,.0f} tok/s", speed),
        *((tables.mfu_percent(f["value"]), f"MFU {f['name']}: {f['denominator']}") for f in best["mfu"]),
    ]


def _backend(name: str, backend: dict[str, Any], on_a_gpu: bool) -> dict[str, Any]:
    return {
        "name": name,
        "about": f"{tables.overhead(backend)}. {_accounting(backend)}",
        "operations": tables.operation_cells(backend),
        "help": tables.help_cells(backend, 12) if on_a_gpu else None,
    }


def _accounting(backend: dict[str, Any]) -> str:
    found = backend["profile"]
    text = f"{percent(found['accounted'])} of the wall time has a name; the trace is {found['trace']}."
    if found["unaccounted_ms"]:
        text += " Not named: " + ", ".join(
            f"{name} {tables.milliseconds(ms)} ms" for name, ms in list(found["unaccounted_ms"].items())[:8]
        )
    if found["overlap_ms"] > 0:
        text += f" Kernels overlapped for {tables.milliseconds(found['overlap_ms'])} ms, counted once."
    return text


def _interpreted(found: dict[str, Any]) -> dict[str, Any]:
    if "error" in found:
        return {"error": found["error"]}
    cells = tables.operation_cells(found, roofs=False)
    return {"error": None, "note": tables.INTERPRETED, "what": tables.what(found["setup"]), "operations": cells}


def _projection(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "title": found["gpu"] + tables.projected_in(found),
        "notes": elsewhere.projection_notes(found),
        "cells": elsewhere.projection_cells(found),
        "operations": elsewhere.projected_operation_cells(found),
    }


def _audit(found: dict[str, Any]) -> dict[str, Any]:
    about = {"gpu": found["gpu"], "arch": found["arch"], "error": found.get("error")}
    if "error" in found:
        return about
    return about | {"note": elsewhere.audit_note(found), "cells": elsewhere.audit_cells(found)}


def _method(result: dict[str, Any]) -> list[str]:
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
    return notes
