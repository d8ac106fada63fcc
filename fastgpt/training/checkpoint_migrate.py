"""Checkpoints as fastgpt 0.1 wrote them, one ``ckpt-00000250.pt`` each: read, never written.

The next save of a run that resumed from one is a directory in today's format."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from fastgpt.training.checkpoint_read import Damaged, MemoryReader, Source
from fastgpt.training.checkpoint_tree import split

_FORMAT = 1


def verify_file(path: Path) -> None:
    """Raise Damaged unless the file is a zip archive whose members have their checksums (torch does not compare them)."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (OSError, ValueError, NotImplementedError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise Damaged(f"it is truncated or not a checkpoint ({error})") from error
    if broken is not None:
        raise Damaged(f"its checksum of {broken} does not match")


def open_file(path: Path) -> Source:
    """The file as a Source. Its tensors are mapped, not read, until they are used. weights_only: a pickle that names
    anything but tensors and plain values is refused before it is run. Raises Damaged."""
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if saved.pop("format") != _FORMAT:
            raise ValueError("another format")
        step = int(saved.pop("step"))
        own = {"rng": saved.pop("rng")} if "rng" in saved else {}
        tree, tensors = split({**saved, "own": own})
    except Exception as error:  # torch reports damage as RuntimeError, EOFError, UnpicklingError, zipfile and OS errors
        raise Damaged("it is not a fastgpt checkpoint") from error
    return Source(step, tree, [tree.pop("own")], MemoryReader(tensors))
