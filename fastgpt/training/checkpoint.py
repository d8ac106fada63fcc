"""Checkpoints: one file per save, whole or absent.

A file is written under a temporary name, fsynced and renamed, so a crash leaves the earlier ones whole. It holds all that a
run needs to go on as if it had never stopped: config, model, optimizer, loss scale, loader position, RNG states, step.
Loading never runs code from the file (weights_only=True).
"""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from fastgpt.config import ModelConfig, differences
from fastgpt.errors import UserError

FORMAT = 1
_NAME = re.compile(r"ckpt-(\d{8})\.pt")


def path_for(folder: Path, step: int) -> Path:
    return folder / f"ckpt-{step:08d}.pt"


def existing(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first."""
    return sorted(path for path in folder.glob("ckpt-*.pt") if _NAME.fullmatch(path.name)) if folder.is_dir() else []


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write ``state`` atomically as the checkpoint of ``step`` (steps done) and delete all but the newest ``keep``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = path_for(folder, step)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save({"format": FORMAT, "step": step, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    for old in existing(folder)[:-keep]:
        old.unlink()
    return path


def set_aside(folder: Path) -> Path | None:
    """Rename a folder that holds an earlier run's checkpoints (to "name.1", "name.2", ...), so that a new run in its place
    neither deletes nor resumes them. Returns the new name, or None if there was nothing to save."""
    if not existing(folder):
        return None
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return folder.rename(target)


def resolve(path: Path) -> Path:
    """A checkpoint file, given itself or the folder whose newest is meant. Raises UserError if there is none."""
    if path.is_dir():
        found = existing(path)
        if not found:
            raise UserError(f"there is no checkpoint in {path}: name another folder, or a ckpt-*.pt file")
        return found[-1]
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist{_previous_good(path)}")
    return path


def load(path: Path) -> dict[str, Any]:
    """The state saved at ``path``, on the CPU. Raises UserError for a file that is damaged or not ours, and then names
    the newest earlier checkpoint beside it that loads."""
    state = _try_load(path)
    if state is None:
        raise UserError(f"checkpoint {path} is truncated or not a fastgpt checkpoint{_previous_good(path)}")
    return state


def check_shape(saved: dict[str, Any], config: ModelConfig, path: Path) -> None:
    """Raise UserError listing every field of the model's shape that differs from the checkpoint's (old -> new).

    Dropout is not shape: changing it between runs is fine."""
    shape = [f.name for f in fields(ModelConfig) if f.name != "dropout"]
    changed = differences({k: saved["model"].get(k) for k in shape}, {k: getattr(config, k) for k in shape})
    if changed:
        raise UserError(
            f"checkpoint {path} holds a model of another shape ({'; '.join(changed)}): "
            "use the checkpoint's values, or start a new run in another --out"
        )


def rng_state() -> dict[str, torch.Tensor]:
    """State of torch's generators, by device type."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _try_load(path: Path) -> dict[str, Any] | None:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch.load reports damage as RuntimeError, EOFError, UnpicklingError, zipfile and OS errors
        return None
    return state if isinstance(state, dict) and state.get("format") == FORMAT else None


def _previous_good(path: Path) -> str:
    for candidate in reversed(existing(path.parent)):
        later = _NAME.fullmatch(path.name) and candidate.name >= path.name
        if candidate != path and not later and _try_load(candidate) is not None:
            return f": the previous good one is {candidate}"
    return ": there is no earlier good one beside it"
