"""Reading a checkpoint's directory (its files: write.py): verify it, then read what each rank needs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastgpt.checkpoints.tree import shard_of
from fastgpt.common import file_sha256

FORMAT = 2
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DATA_FILE = re.compile(r"tensors-\d{5}\.safetensors")


class Damaged(Exception):
    """A checkpoint that is not what was written, or was not written by us; the message says what is wrong with it."""


def verify(path: Path, only: str | None = None) -> None:
    """Raise Damaged unless every file (or just the one called ``only``) has the length and sha256 that the manifest says."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        version, files = manifest["format"], manifest["files"]
        listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        raise Damaged("manifest.json is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged("manifest.json is not readable") from error
    if version != FORMAT:
        raise Damaged(f"its format is {version!r}, and this version reads {FORMAT}")
    if not {"state.json", "tensors.json"} <= listed.keys():
        raise Damaged("manifest.json is incomplete")
    for name, (size, sha256) in listed.items():
        if only is not None and name != only:
            continue
        if name not in ("state.json", "tensors.json") and not _DATA_FILE.fullmatch(name):
            raise Damaged(f"manifest.json names a file {name!r}")
        try:
            actual = (path / name).stat().st_size
            if actual != size:
                raise Damaged(f"{name} has {actual} bytes instead of {size}")
            if file_sha256(path / name) != sha256:
                raise Damaged(f"the sha256 of {name} is another")
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from error


def read_member(path: Path, name: str) -> Any:
    """A JSON file of a checkpoint, itself verified. Raises Damaged."""
    verify(path, only=name)
    try:
        return json.loads((path / name).read_bytes())
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{name} is not JSON") from error


class Box(NamedTuple):
    """A part of a tensor, and where it is stored."""

    offsets: torch.Size
    sizes: torch.Size
    file: str
    key: str


class Stored(NamedTuple):
    dtype: torch.dtype
    shape: torch.Size
    boxes: list[Box]


class Reader:
    """The tensors of a checkpoint's directory. ``tensors`` says what they are; none is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, Stored] = {}
        try:
            for name, entry in read_member(path, "tensors.json").items():
                boxes = [
                    Box(torch.Size(c["offsets"]), torch.Size(c["sizes"]), c["file"], c["key"]) for c in entry["chunks"]
                ]
                stored = Stored(DTYPES[entry["dtype"]], torch.Size(entry["shape"]), boxes)
                for box in boxes:
                    if not _DATA_FILE.fullmatch(box.file):
                        raise Damaged(f"tensors.json names a file {box.file!r}")
                    if not len(box.offsets) == len(box.sizes) == len(stored.shape):
                        raise Damaged(f"tensors.json has a part of {name} of other dimensions")
                if sum(math.prod(box.sizes) for box in boxes) != math.prod(stored.shape):
                    raise Damaged(f"tensors.json has parts of {name} that are not the whole")
                self.tensors[name] = stored
            claimed = sum(math.prod(t.shape) * t.dtype.itemsize for t in self.tensors.values())
            if claimed > sum(file.stat().st_size for file in path.glob("tensors-*.safetensors")):
                raise Damaged("tensors.json claims more than the files hold")  # before anyone allocates it
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise Damaged("tensors.json is not a table of tensors") from error

    @torch.no_grad()
    def into(self, targets: Mapping[str, Tensor]) -> None:
        """Fill ``targets`` (whole or sharded tensors, on any device) in place. Every rank reads just its own part, with no
        communication. Raises Damaged."""
        files: dict[str, Any] = {}  # each is opened once
        try:
            for name, target in targets.items():
                self._fill(name, target, files)
        except (SafetensorError, OSError) as error:
            raise Damaged(f"its tensors cannot be read ({error})") from error

    def _fill(self, name: str, target: Tensor, files: dict[str, Any]) -> None:
        stored, own = self.tensors[name], shard_of(target)
        if stored.shape != own.shape:
            raise ValueError(f"{name} is {tuple(stored.shape)} instead of {tuple(own.shape)}")
        for box in stored.boxes:
            starts = [max(a, b) for a, b in zip(own.offsets, box.offsets)]
            stops = [min(a + n, b + m) for a, n, b, m in zip(own.offsets, own.local.shape, box.offsets, box.sizes)]
            if any(start >= stop for start, stop in zip(starts, stops)):
                continue
            if box.file not in files:
                files[box.file] = safe_open(self.path / box.file, framework="pt")
            held = files[box.file].get_slice(box.key)
            if held.get_shape() != list(box.sizes):
                raise Damaged(f"{box.file} holds {box.key} in another shape than tensors.json says")
            region = _slices(starts, stops, box.offsets)
            value = held[region] if region else files[box.file].get_tensor(box.key)
            if value.dtype != stored.dtype:
                raise Damaged(f"{box.file} holds {box.key} in another dtype than tensors.json says")
            own.local[_slices(starts, stops, own.offsets)].copy_(value)


def _slices(starts: list[int], stops: list[int], offsets: torch.Size) -> tuple[slice, ...]:
    return tuple(slice(start - offset, stop - offset) for start, stop, offset in zip(starts, stops, offsets))


class Source(NamedTuple):
    """A checkpoint opened for reading: its plain part, and a reader of its tensors."""

    step: int
    state: dict[str, Any]
    """JSON tree; tensors are references."""
    ranks: list[dict[str, Any]]
    """Each saving rank's own JSON tree."""
    reader: Reader


def open_directory(path: Path, verify_all: bool) -> Source:
    """Raises Damaged. Without ``verify_all``, only the two JSON files are known to be whole."""
    if verify_all:
        verify(path)
    header, reader = read_member(path, "state.json"), Reader(path)
    try:
        return Source(int(header["step"]), dict(header["state"]), [dict(own) for own in header["ranks"]], reader)
    except (KeyError, TypeError, ValueError) as error:
        raise Damaged("state.json is not a fastgpt checkpoint's") from error
