"""Reading a checkpoint's directory (its files: write.py): verify it, then read what each rank needs."""

from __future__ import annotations

import itertools
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

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


class Reader(StorageReader):
    """DCP's storage interface for a checkpoint's directory. ``tensors`` (dtype, shape, parts) is known without reading one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.chunks: dict[MetadataIndex, dict[str, Any]] = {}
        self.tensors: dict[str, TensorStorageMetadata] = {}
        try:
            for name, entry in read_member(path, "tensors.json").items():
                shape = torch.Size(entry["shape"])
                chunks = [
                    ChunkStorageMetadata(torch.Size(c["offsets"]), torch.Size(c["sizes"])) for c in entry["chunks"]
                ]
                for chunk, stored in zip(chunks, entry["chunks"]):
                    if not _DATA_FILE.fullmatch(stored["file"]):
                        raise Damaged(f"tensors.json names a file {stored['file']!r}")
                    self.chunks[MetadataIndex(name, chunk.offsets)] = stored
                if not all(len(chunk.offsets) == len(chunk.sizes) == len(shape) for chunk in chunks):
                    raise Damaged(f"tensors.json has a part of {name} of other dimensions")
                if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape) or not _apart(chunks, shape):
                    raise Damaged(f"tensors.json has parts of {name} that are not the whole")
                self.tensors[name] = TensorStorageMetadata(
                    TensorProperties(dtype=DTYPES[entry["dtype"]]), shape, chunks
                )
            claimed = sum(math.prod(t.size) * t.properties.dtype.itemsize for t in self.tensors.values())
            if claimed > sum(file.stat().st_size for file in path.glob("tensors-*.safetensors")):
                raise Damaged("tensors.json claims more than the files hold")  # before anyone allocates it
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise Damaged("tensors.json is not a table of tensors") from error

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def read_metadata(self) -> Metadata:
        return Metadata(state_dict_metadata=dict(self.tensors), storage_data=self.chunks)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            by_file.setdefault(self.chunks[item.storage_index]["file"], []).append(item)
        for name, items in by_file.items():
            from safetensors import safe_open

            with safe_open(self.path / name, framework="pt") as file:
                for item in items:
                    stored = self.chunks[item.storage_index]
                    key, held = stored["key"], file.get_slice(stored["key"])
                    if held.get_shape() != stored["sizes"]:
                        raise Damaged(f"{name} holds {key} in another shape than tensors.json says")
                    region = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths))
                    value = held[region] if region else file.get_tensor(key)
                    if value.dtype != self.tensors[item.storage_index.fqn].properties.dtype:
                        raise Damaged(f"{name} holds {key} in another dtype than tensors.json says")
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(value)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    def into(self, targets: dict[str, Tensor]) -> None:
        """Fill ``targets`` (whole or sharded tensors, on any device) in place. Every rank reads just its own part, with no
        communication. Raises Damaged."""
        from safetensors import SafetensorError

        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            dcp.load(targets, storage_reader=self, planner=planner, no_dist=True)
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            if isinstance(cause, (SafetensorError, OSError)):
                raise Damaged(f"its tensors cannot be read ({cause})") from cause
            raise cause from None


def _apart(chunks: list[ChunkStorageMetadata], shape: torch.Size) -> bool:
    """Whether the parts of a tensor lie inside of it and none on another: together with their size, that they are the whole."""
    if len(chunks) > MOST_PARTS:
        return False
    ranges = [[(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes)] for chunk in chunks]
    inside = all(0 <= low <= high <= size for ends in ranges for (low, high), size in zip(ends, shape))
    meet = (all(a < d and c < b for (a, b), (c, d) in zip(*pair)) for pair in itertools.combinations(ranges, 2))
    return inside and not any(meet)


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
        step, state, ranks = header["step"], header["state"], header["ranks"]
        if type(step) is not int or step < 0 or not all(isinstance(part, dict) for part in (state, *ranks)):
            raise Damaged(f"state.json says that step is {shortened(step)}, or its parts are not tables")
        return Source(step, state, ranks, reader)
    except (KeyError, TypeError, ValueError) as error:
        raise Damaged("state.json is not a fastgpt checkpoint's") from error
