"""The checkpoints of a run's folder: which there are, which is best, which may go.

They are ordered by when they were saved, not by step: after a rollback to step 100, the run's step 150 is newer than the step
300 it left behind. The order is a serial number inside each (copying a folder changes times, not that)."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from fastgpt.checkpoints import METRICS
from fastgpt.checkpoints.read import Damaged, read_member, verify
from fastgpt.common import UserError, write_whole

_DIRECTORY = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_LEFTOVER = re.compile(
    r"(step-\d{8,}(\.\d+)?\.(partial|deleted)|best\.json\.partial|\.(best\.json|metrics\.jsonl)\.\d+\.tmp)"
)
BEST = "best.json"


def partial_path(folder: Path, step: int) -> Path:
    """Where a checkpoint of ``step`` is written until it is whole."""
    return folder / f"step-{step:08d}.partial"


def free_path(folder: Path, step: int) -> Path:
    """The name that a checkpoint of ``step`` gets: "step-00000250", or with ".1", ".2", ... if that is taken (the run came by
    this step before), so that a rename never has to replace anything."""
    path = folder / f"step-{step:08d}"
    return _numbered(path) if path.exists() else path


def _numbered(path: Path) -> Path:
    """The first of "name.1", "name.2", ... that is free."""
    names = (path.with_name(f"{path.name}.{number}") for number in count(1))
    return next(name for name in names if not name.exists())


def existing(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first. Nothing is verified: one whose serial cannot be read stands last."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _DIRECTORY.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (_serial(path), step_of(path), path.name))


def last_saved(folder: Path) -> Path | None:
    """The newest of ``existing``; None if there is none, or the folder cannot be read."""
    with suppress(OSError):
        if found := existing(folder):
            return found[-1]
    return None


def step_of(path: Path) -> int:
    """The step in a checkpoint's name; -1 for any other name."""
    match = _DIRECTORY.fullmatch(path.name)
    return int(match[1]) if match else -1


def next_serial(folder: Path) -> int:
    return 1 + max((int(s) for s in map(_serial, existing(folder)) if s < math.inf), default=0)


def newest_valid(folder: Path) -> tuple[Path, list[str]]:
    """The checkpoint saved last in ``folder`` of those that verify to the last byte, and a sentence for each newer one that
    does not. Raises UserError if there is none."""
    damaged: list[str] = []
    for path in reversed(existing(folder)):
        try:
            verify(path)
        except Damaged as error:
            damaged.append(f"checkpoint {path} is damaged ({error}): it is passed over")
        else:
            return path, damaged
    if damaged:
        raise UserError(f"there is no whole checkpoint in {folder}: {'; '.join(damaged)}")
    raise UserError(
        f"there is no checkpoint in {folder}: name another folder, or leave --resume out to start a new run"
    )


def is_run_folder(path: Path) -> bool:
    """Whether ``path`` is a folder, but no checkpoint by its name."""
    return path.is_dir() and step_of(path) < 0


def resolve(path: Path) -> Path:
    """A checkpoint, given itself or the run's folder whose newest is meant. Raises UserError if there is none."""
    if is_run_folder(path):
        return newest_valid(path)[0]
    if not path.exists():
        raise UserError(f"checkpoint {path} does not exist{previous_good(path)}")
    return path


def previous_good(path: Path) -> str:
    """The end of an error's sentence: which earlier checkpoint beside this damaged one is whole."""
    for candidate in reversed(existing(path.parent)):
        later = step_of(path) >= 0 and step_of(candidate) > step_of(path)
        if candidate != path and not later:
            try:
                verify(candidate)
            except Damaged:
                continue
            return f": the previous good one is {candidate}"
    return ": there is no earlier good one beside it"


def best(folder: Path) -> tuple[Path, float] | None:
    """The checkpoint that was saved as best with the lowest validation loss, and that loss (nats)."""
    said = [(_header(path).get("best"), path) for path in existing(folder)]
    marked = [(float(loss), path) for loss, path in said if isinstance(loss, (int, float))]
    if not marked:
        return None
    loss, path = min(marked, key=lambda pair: pair[0])  # of equals the first: an earlier one is not replaced
    return path, loss


def rotate(folder: Path, keep: int) -> None:
    """Delete all but the last ``keep`` saved and the best, and write best.json, which says for people which that is.

    What cannot be read is neither counted nor deleted: it may be another version's."""
    found, winner = [path for path in existing(folder) if _serial(path) < math.inf], best(folder)
    spared = {*found[-keep:], *([winner[0]] if winner else [])}
    if winner is not None:
        _write_best(folder, *winner)
    for path in found:
        if path not in spared:
            _delete(path)


def clean(folder: Path) -> None:
    """Remove what a killed save or deletion left behind; call it before a run's first save, with no other run in the
    folder."""
    for path in folder.iterdir() if folder.is_dir() else []:
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_free(folder: Path) -> None:
    """Raise UserError for a file or a folder in the way of what a run writes (the first step would find it, after an earlier
    run has been moved), and for a folder inside a checkpoint, which goes when its run deletes that one."""
    try:
        real = Path(os.path.realpath(folder))
        for path in (real, *real.parents):
            if step_of(path) >= 0 and (path / "manifest.json").exists():
                inside = "" if path == real else f"inside {path}, "
                raise UserError(
                    f"out is {folder}, {inside}a checkpoint, which its run deletes in time: name another folder"
                )
        for name, kind in {
            METRICS: "file",
            BEST: "file",
            "config.json": "file",
            "environment.json": "file",
            "tensorboard": "folder",
        }.items():
            path = folder / name
            wrong = path.is_dir() or path.is_fifo() if kind == "file" else path.exists() and not path.is_dir()
            if wrong:
                raise UserError(
                    f"{path} is in the way: a run keeps a {kind} of that name there; move it, or name another --out"
                )
    except OSError as error:  # a name that is too long, a parent that may not be read
        raise UserError(f"out is {folder}, which cannot be used ({error.strerror}): name another folder") from error


def set_aside(folder: Path) -> Path | None:
    """Rename a folder that holds an earlier run's checkpoints or metrics (to "name.1", "name.2", ...), so that a new run in
    its place neither deletes nor resumes them; with ``lock.held``, or it may be a live run's. Returns the new name, or None if
    there was nothing to save. Raises UserError where it cannot be renamed."""
    if not existing(folder) and not (folder / METRICS).exists():
        return None
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UserError(
            f"out is {folder}, which holds an earlier run and is where this command runs, so that it cannot be moved aside: "
            "use --resume to go on with it, or name another folder"
        )
    try:
        return folder.rename(_numbered(folder))
    except OSError as error:
        raise UserError(
            f"out is {folder}, which holds an earlier run and cannot be renamed ({error.strerror}): use --resume to go on with "
            "it, or name another folder"
        ) from error


def _header(path: Path) -> dict[str, Any]:
    try:
        header = read_member(path, "state.json")
    except Damaged:
        return {}
    return header if isinstance(header, dict) else {}


def _serial(path: Path) -> float:
    """Infinity where it cannot be read."""
    serial = _header(path).get("serial")
    return serial if isinstance(serial, int) else math.inf


def _delete(path: Path) -> None:
    """Rename the directory, then delete it: a deletion cut short leaves no half checkpoint under a checkpoint's name."""
    doomed = path.with_name(f"{path.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    shutil.rmtree(path.rename(doomed))


def _write_best(folder: Path, path: Path, loss: float) -> None:
    content = json.dumps({"checkpoint": path.name, "step": step_of(path), "val_loss": loss})
    if not (target := folder / BEST).exists() or target.read_text() != content:
        write_whole(target, content)
