"""What changed between two measurements of one device.

    python -m bench.compare 1a2b3c4 9f8e7d6            # by commit: everything of both in bench/results/
    python -m bench.compare before after               # by label (--label of bench.kernels and pytest bench)
    python -m bench.compare old.json new.json --json   # files

An entry has changed if its medians differ by more than half the sum of both interquartile ranges, and by more than
1%: the spread is that within one run, and clocks and temperature differ a little from one run to the next.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Annotated, Any

from bench.reports import results
from bench.reports.tables import print_table, terminal
from fastgpt import command, common
from fastgpt.command import Arg
from fastgpt.common import UserError

FLOOR = 0.01
"""Differences below this share are never called a change."""
VERSIONS = ("kernels", "torch", "triton", "cuda", "driver", "python", "threads")
"""Fields of the environment that may explain a difference."""


def measurement(name: str, device: str | None = None) -> dict[str, Any]:
    """What ``name`` means (results.find) on one device, as one: entries measured more than once count as measured last.
    Raises UserError if it was measured on several devices and ``device`` (part of the name) does not say which."""
    found = [m for _, m in results.find(name) if device is None or device.lower() in m["environment"]["device"].lower()]
    devices = sorted({m["environment"]["device"] for m in found})
    if not devices:
        raise UserError(f"device is {device!r}, and {name!r} was measured on none with that in its name")
    if len(devices) > 1:
        raise UserError(f"{name!r} was measured on {', '.join(devices)}: say which with --device")
    entries = {key: entry for m in found for key, entry in m["entries"].items()}
    return {"environment": found[-1]["environment"], "label": found[-1]["label"], "entries": entries}


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """One dict per entry of either: ``name``, ``old`` and ``new`` (None where absent), ``ratio`` of the times (new over old)
    and ``verdict``: "faster", "slower", "same", "only in A", "only in B", "no figure"."""
    found = []
    for name in [*old["entries"], *(key for key in new["entries"] if key not in old["entries"])]:
        a, b = old["entries"].get(name), new["entries"].get(name)
        ratio = b["ms"] / a["ms"] if a and b and "ms" in a and "ms" in b else None
        found.append({"name": name, "old": a, "new": b, "ratio": ratio, "verdict": _verdict(a, b)})
    return found


def _verdict(a: dict[str, Any] | None, b: dict[str, Any] | None) -> str:
    if a is None or b is None:
        return "only in B" if a is None else "only in A"
    if "ms" not in a or "ms" not in b:
        return "no figure"
    difference = abs(b["ms"] - a["ms"])
    if difference <= (a["iqr_ms"] + b["iqr_ms"]) / 2 or difference <= FLOOR * a["ms"]:
        return "same"
    return "faster" if b["ms"] < a["ms"] else "slower"


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Sentences on what else is different: versions, driver, how kernels ran."""
    a, b = old["environment"], new["environment"]
    return [f"{key}: {a.get(key)} -> {b.get(key)}" for key in VERSIONS if a.get(key) != b.get(key)]


def print_changes(old: dict[str, Any], new: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    from rich.markup import escape

    console = terminal(160)
    for side, m in (("A", old), ("B", new)):
        e = m["environment"]
        label = f" ({m['label']})" if m["label"] else ""
        console.print(f"{side}: {e['device']}, commit {e['commit'] or 'n/a'}{label}, {e['time']}", markup=False)
    for sentence in differences(old, new):
        console.print(f"also different: {escape(sentence)}", style="yellow")
    cells = [["entry", "A ms", "± IQR", "B ms", "± IQR", "B / A", "peak MB", "verdict"]]
    for row in rows:
        a, b = row["old"] or {}, row["new"] or {}
        figures = [f"{side[key]:.4g}" if key in side else "-" for side in (a, b) for key in ("ms", "iqr_ms")]
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.3f}"
        cells.append([row["name"], *figures, ratio, _memory(a, b), row["verdict"]])
    styles = {"faster": "green", "slower": "red", "no figure": "yellow"}
    print_table(console, "A and B", cells, lambda line: styles.get(line[-1]))
    for row in rows:
        for side, entry in (("A", row["old"]), ("B", row["new"])):
            if row["verdict"] == "no figure" and entry and "error" in entry:
                console.print(f"{escape(row['name'])}, {side}: {escape(entry['error'])}", style="yellow")
    count = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in ("faster", "slower", "same")}
    console.print(", ".join(f"{n} {verdict}" for verdict, n in count.items()))


def _memory(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Peak memory in MB: once if it is the same."""
    sizes = [f"{side['peak_memory'] / 1e6:,.0f}" for side in (a, b) if side.get("peak_memory")]
    return " -> ".join(dict.fromkeys(sizes)) or "-"


@dataclass(frozen=True)
class CompareConfig:
    a: Annotated[str, Arg("A", positional=True)]
    """A results file, or a commit or label in bench/results/."""
    b: Annotated[str, Arg("B", positional=True)]
    """Another."""
    device: str | None = None
    """Which device, by part of its name, if A or B was measured on several."""
    across_devices: bool = False
    """Compare although the devices differ."""
    json: bool = False
    """Print JSON."""


def main(argv: list[str]) -> int:
    args = command.parse(CompareConfig, argv, "bench.compare", __doc__)
    old, new = measurement(args.a, args.device), measurement(args.b, args.device)
    devices = [m["environment"]["device"] for m in (old, new)]
    if devices[0] != devices[1]:
        if not args.across_devices:
            raise UserError(
                f"A was measured on {devices[0]} and B on {devices[1]}, so that B / A says nothing about the code: "
                "measure both on one device, or add --across-devices"
            )
        print(f"warning: A is {devices[0]}, B is {devices[1]}: this compares devices, not code", file=sys.stderr)
    rows = changes(old, new)
    if args.json:
        about = {"schema_version": 1, "a": old["environment"], "b": new["environment"]}
        print(json.dumps(about | {"also_different": differences(old, new), "entries": rows}, indent=1))
    else:
        print_changes(old, new, rows)
    return 0


if __name__ == "__main__":
    common.run(main)
