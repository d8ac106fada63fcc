"""What was measured, kept: one file per measurement in bench/results/DEVICE/COMMIT-KIND[-N].json, never written twice.

A measurement is a dict: ``schema`` and ``schema_version``; ``kind`` (of KINDS); ``label``, a name that
people give it; ``environment`` (device, versions, commit, time: hardware/environment.py); and ``entries``, by name, each with
``ms``, ``iqr_ms`` and ``runs`` (also ``peak_memory`` in bytes and other figures), or ``error`` where there is
no figure. FASTGPT_RESULTS names another folder.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from itertools import count
from pathlib import Path
from typing import Any

from fastgpt.common import UserError, load_json

SCHEMA, SCHEMA_VERSION = "fastgpt.bench", 1
KINDS = ("kernels", "gpu", "suite", "ablation")
_STORED = re.compile(rf".+-({'|'.join(KINDS)})(-\d+)?\.json")


def folder() -> Path:
    return Path(os.environ.get("FASTGPT_RESULTS") or Path(__file__).parents[1] / "results")


def store(kind: str, environment: dict[str, Any], entries: dict[str, dict[str, Any]], label: str | None = None) -> Path:
    """Write a measurement to a file of its own and return its path. The file is there whole or not at all, and two
    processes that store at once get two files. Raises UserError where nothing can be written."""
    assert kind in KINDS
    measurement = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "kind": kind, "label": label}
    text = json.dumps(measurement | {"environment": environment, "entries": entries}, indent=1)
    directory = folder() / _slug(environment["device"])
    stem = f"{_slug(environment['commit'] or 'no-commit')}-{kind}"
    temporary = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=directory, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            file.write(text)
        for n in count(1):
            path = directory / (f"{stem}.json" if n == 1 else f"{stem}-{n}.json")
            try:
                os.link(temporary, path)  # unlike a rename, this fails where there is a file already
                return path
            except FileExistsError:
                continue
        raise AssertionError("count ended")
    except OSError as error:
        raise UserError(f"results cannot be stored in {directory} ({error.strerror}): set FASTGPT_RESULTS") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _slug(name: str) -> str:
    """A name as part of a path. The "+" of a changed checkout stays."""
    return re.sub(r"[^a-z0-9+]+", "-", name.lower()).strip("-")


def read(path: Path, writer: str, schema: str, version: int) -> dict[str, Any]:
    """A file that the command ``writer`` wrote. Raises UserError if it is damaged, something else, or of another version."""
    try:
        found = load_json(path, "results file")
    except UserError as error:
        raise UserError(f"{error}; measure again") from error
    if not isinstance(found, dict) or found.get("schema") != schema:
        raise UserError(f"{path} is not a results file of {writer}: schema is not {schema!r}")
    if found.get("schema_version") != version:
        raise UserError(
            f"{path} has schema_version {found.get('schema_version')!r}: this version reads {version}, so measure again"
        )
    return found


def load(path: Path) -> dict[str, Any]:
    """A stored measurement. Raises UserError if the file cannot be read, is damaged, or is something else."""
    found = read(path, "bench", SCHEMA, SCHEMA_VERSION)
    if not (_has(found.get("environment"), "device", "commit", "time") and _entries(found.get("entries"))):
        raise UserError(f"{path} is damaged: environment or entries are not complete; measure again")
    return found


def check_writable(folder: Path, flag: str = "out") -> None:
    """Create the folder, or raise UserError if it cannot hold files: before minutes of measuring. ``flag`` has named it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{flag} is {folder}, which cannot be written ({error.strerror}): name another") from None


def sentence(error: Exception) -> str:
    """An exception as one line: its type and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def _has(value: Any, *keys: str) -> bool:
    return isinstance(value, dict) and all(key in value for key in keys)


def _entries(value: Any) -> bool:
    def figure(entry: Any) -> bool:
        return _has(entry, "error") or (
            _has(entry, "ms", "iqr_ms") and _positive(entry["ms"]) and _number(entry["iqr_ms"])
        )

    return isinstance(value, dict) and all(figure(entry) for entry in value.values())


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == value


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def find(name: str) -> list[tuple[Path, dict[str, Any]]]:
    """The measurements that ``name`` means, oldest first: a file, or those in the store with this label, or of the commit
    that begins so. Raises UserError if there is none, or if files are damaged."""
    if Path(name).is_file():
        return [(Path(name), load(Path(name)))]
    # Folders that bench.gpu --out and the like have put here hold other JSON.
    paths = [path for path in sorted(folder().glob("*/*.json")) if _STORED.fullmatch(path.name)]
    stored = [(path, load(path)) for path in paths]
    found = [(path, m) for path, m in stored if m["label"] == name]
    if not found and len(name) >= 4:
        found = [(path, m) for path, m in stored if (m["environment"]["commit"] or "").startswith(name)]
    if not found:
        known = list(dict.fromkeys(str(m["label"] or m["environment"]["commit"]) for _, m in stored))
        has = "has " + ", ".join(known[-8:]) if known else "is empty"
        raise UserError(f"{name!r} is neither a file, nor a label or commit in {folder()}, which {has}")
    return sorted(found, key=lambda item: item[1]["environment"]["time"])


# ---------------------------------------------------------------- what the benchmarks hand over


def kernel_entries(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Entries of a run of bench.kernels: one per operation, shape, variant, and state of the L2 cache."""
    entries: dict[str, dict[str, Any]] = {}
    for entry in results["entries"]:
        title = f"{entry['name']} {entry['shape']}".strip()
        if entry["parity"] != "passed":
            entries[f"{title} | triton"] = {"error": f"no speed: {entry['parity']}"[:300]}
            continue
        for name, variant in entry["variants"].items():
            if "ms" not in variant:
                entries[f"{title} | {name}"] = {"error": variant.get("error", "not run")[:300]}
                continue
            cold = {
                key: variant[key] for key in ("ms", "iqr_ms", "runs", "gbs", "tflops", "share", "of", "peak_memory")
            }
            entries[f"{title} | {name}"] = cold
            if variant.get("warm"):
                entries[f"{title} | {name} | warm L2"] = variant["warm"]
    return entries


def step_entries(steps: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Entries of the training steps of bench.gpu."""
    entries: dict[str, dict[str, Any]] = {}
    for step in steps:
        cap = f" | {step['cap_gb']:g} GB cap" if step.get("cap_gb") else ""
        name = f"step {step['preset']} {step['batch_size']} x {step['grad_accum']} | {step['variant']}{cap}"
        entries[name] = step if "tokens_per_second" in step else {"error": step.get("error", "not run")}
    return entries
