"""Reading a checkpoint's directory (its files: write.py): verify it, then read what each rank needs."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt.checkpoints.tree import Shard, shard_of
from fastgpt.common import UserError, file_sha256, load_json, shortened

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
MOST_PARTS = 1024
"""Ranks that may have saved one tensor: each pair of their parts is compared."""
_DATA_FILE = re.compile(r"tensors-\d{5}\.safetensors")


class Damaged(Exception):
    """A checkpoint that is not what was written, or was not written by us; the message says what is wrong with it."""


def verify(path: Path, only: str | None = None) -> None:
    """Raise Damaged unless every file (or just the one called ``only``) has the length and sha256 that the manifest says."""
    if not (path / "manifest.json").exists():
        raise Damaged("manifest.json is missing")
    try:
        manifest = load_json(path / "manifest.json")
        version, files = manifest["format"], manifest["files"]
        listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (UserError, KeyError, TypeError, AttributeError) as error:
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
        return load_json(path / name)
    except UserError as error:
        raise Damaged(f"{name} is not JSON") from error


class Chunk(NamedTuple):
    """A part of a tensor, and where it is stored."""

    offsets: tuple[int, ...]
    """Where it begins in the tensor."""
    sizes: tuple[int, ...]
    file: str
    key: str
    """Its name in the file."""


class Stored(NamedTuple):
    """A tensor of a checkpoint, known without reading it."""

    dtype: torch.dtype
    shape: torch.Size
    chunks: list[Chunk]


def _table(path: Path) -> dict[str, Stored]:
    """tensors.json. Raises Damaged."""
    tensors = {}
    try:
        for name, entry in read_member(path, "tensors.json").items():
            shape = torch.Size(entry["shape"])
            chunks = [Chunk(tuple(c["offsets"]), tuple(c["sizes"]), c["file"], c["key"]) for c in entry["chunks"]]
            for chunk in chunks:
                if not _DATA_FILE.fullmatch(chunk.file):
                    raise Damaged(f"tensors.json names a file {chunk.file!r}")
                if not len(chunk.offsets) == len(chunk.sizes) == len(shape):
                    raise Damaged(f"tensors.json has a part of {name} of other dimensions")
            if sum(math.prod(chunk.sizes) for chunk in chunks) != shape.numel() or not _apart(chunks, shape):
                raise Damaged(f"tensors.json has parts of {name} that are not the whole")
            tensors[name] = Stored(DTYPES[entry["dtype"]], shape, chunks)
        claimed = sum(stored.shape.numel() * stored.dtype.itemsize for stored in tensors.values())
        if claimed > sum(file.stat().st_size for file in path.glob("tensors-*.safetensors")):
            raise Damaged("tensors.json claims more than the files hold")  # before anyone allocates it
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise Damaged("tensors.json is not a table of tensors") from error
    return tensors


def _apart(chunks: list[Chunk], shape: torch.Size) -> bool:
    """Whether the parts of a tensor lie inside of it and none on another: together with their size, that they are the whole."""
    if len(chunks) > MOST_PARTS:
        return False
    ranges = [[(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes)] for chunk in chunks]
    inside = all(0 <= low <= high <= size for ends in ranges for (low, high), size in zip(ends, shape))
    meet = (all(a < d and c < b for (a, b), (c, d) in zip(*pair)) for pair in itertools.combinations(ranges, 2))
    return inside and not any(meet)


class Source(NamedTuple):
    """A checkpoint opened for reading: its plain part, and the table of its tensors."""

    path: Path
    step: int
    state: dict[str, Any]
    """JSON tree; tensors are references."""
    ranks: list[dict[str, Any]]
    """Each saving rank's own JSON tree."""
    tensors: dict[str, Stored]

    def into(self, targets: dict[str, Tensor]) -> None:
        """Fill ``targets`` (whole or sharded tensors, on any device) in place. Every rank reads just its own part, with no
        communication. Raises Damaged."""
        import safetensors

        by_file: dict[str, list[tuple[Stored, Chunk, Shard]]] = {}
        for name, target in targets.items():
            stored, part = self.tensors[name], shard_of(target.detach())
            for chunk in stored.chunks:
                by_file.setdefault(chunk.file, []).append((stored, chunk, part))
        try:
            for name, wanted in by_file.items():
                with safetensors.safe_open(self.path / name, framework="pt") as file:
                    for stored, chunk, part in wanted:
                        _copy(file, stored, chunk, part)
        except (safetensors.SafetensorError, OSError) as error:
            raise Damaged(f"its tensors cannot be read ({error})") from error


def _copy(file: Any, stored: Stored, chunk: Chunk, part: Shard) -> None:
    """Read from an open safetensors file what ``part`` needs of ``chunk``."""
    low = [max(ours, theirs) for ours, theirs in zip(part.offsets, chunk.offsets)]
    ends = zip(part.offsets, part.local.shape, chunk.offsets, chunk.sizes)
    high = [min(ours + n, theirs + m) for ours, n, theirs, m in ends]
    if any(a >= b for a, b in zip(low, high)):
        return
    held = file.get_slice(chunk.key)
    if held.get_shape() != list(chunk.sizes):
        raise Damaged(f"{chunk.file} holds {chunk.key} in another shape than tensors.json says")
    here, there = (
        tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offsets)) for offsets in (chunk.offsets, part.offsets)
    )
    value = held[here] if here else file.get_tensor(chunk.key)
    if value.dtype != stored.dtype:
        raise Damaged(f"{chunk.file} holds {chunk.key} in another dtype than tensors.json says")
    part.local[there].copy_(value)


def open_directory(path: Path, verify_all: bool) -> Source:
    """Raises Damaged. Without ``verify_all``, only the two JSON files are known to be whole."""
    if verify_all:
        verify(path)
    header, tensors = read_member(path, "state.json"), _table(path)
    try:
        step, state, ranks = header["step"], header["state"], header["ranks"]
        if type(step) is not int or step < 0 or not all(isinstance(part, dict) for part in (state, *ranks)):
            raise Damaged(f"state.json says that step is {shortened(step)}, or its parts are not tables")
        return Source(path, step, state, ranks, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise Damaged("state.json is not a fastgpt checkpoint's") from error
