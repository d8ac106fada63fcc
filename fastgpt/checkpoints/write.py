"""One checkpoint, as a directory: written whole or not at all, verified before it is believed, unable to run code.

    step-00000250/
      manifest.json                bytes and sha256 of every other file; written last
      state.json                   step, versions, all plain values (tree.py)
      tensors.json                 per tensor: dtype, shape, and which file holds which part of it
      tensors-00000.safetensors    what rank 0 wrote; one file per rank

torch.distributed.checkpoint (DCP) plans who writes what and, on loading, who reads what, for any numbers of ranks. Its own
storage describes the files by a pickle (``.metadata``). ``Writer`` here and ``Reader`` in read.py are its storage
interface over the files above instead: nothing reads a pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from fastgpt.checkpoints.folder import free_path, next_serial, partial_path
from fastgpt.checkpoints.read import DTYPES, FORMAT
from fastgpt.common import sync_folder

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PIECE = 16 << 20  # bytes hashed and written at a time

# With one process DCP says so in a warning at each save and load.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def write(
    folder: Path,
    step: int,
    header: dict[str, Any],
    own: Any,
    tensors: dict[str, Any],
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write the checkpoint of ``step`` under a partial name and rename it; all ranks of ``group`` (default: all there are)
    call it.

    ``header``: the content of state.json; rank 0's counts. ``own``: each rank's own JSON tree. ``tensors``: flat; a name that
    several ranks have is written by one of them. Returns the final path. On any failure of any rank, every rank raises it and
    the partial directory is gone."""
    writer = Writer(folder, step, header, own)
    planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        metadata = dcp.save(
            tensors, storage_writer=writer, planner=planner, process_group=group, no_dist=not has_group()
        )
    except BaseException as error:
        if writer.coordinator:
            shutil.rmtree(writer.partial, ignore_errors=True)
        if isinstance(error, CheckpointException):  # DCP's own wrapping, a BaseException
            raise next(iter(error.failures.values()))[0] from None
        raise
    assert metadata.storage_meta is not None and metadata.storage_meta.checkpoint_id is not None
    return Path(metadata.storage_meta.checkpoint_id)


def has_group() -> bool:
    """Whether torch.distributed's default group exists: then its ranks save together."""
    return dist.is_available() and dist.is_initialized()


def own_rank() -> int:
    """This process's rank in the default group; 0 without one."""
    return dist.get_rank() if has_group() else 0


@dataclass(frozen=True)
class Shard:
    """This rank's part of a sharded tensor, on the host: what a DTensor cannot be, whose memory is its mesh's device's.

    torch.distributed.checkpoint plans it by the same method as it does a DTensor."""

    local: Tensor
    shape: torch.Size
    """The whole tensor's."""
    chunk: ChunkStorageMetadata
    """Where ``local`` lies in it."""

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        if not self.local.numel():  # more ranks than rows
            return []
        properties = TensorProperties(dtype=self.local.dtype)
        data = TensorWriteData(chunk=self.chunk, properties=properties, size=self.shape)
        return [WriteItem(MetadataIndex(fqn, self.chunk.offsets), WriteItemType.SHARD, tensor_data=data)]


class _Planner(dcp.DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        value = self.state_dict[index.fqn]
        return value.local if isinstance(value, Shard) else super().lookup_object(index)


class Writer(StorageWriter):
    """DCP's storage interface: each rank writes one safetensors file, the coordinator the rest, and commits."""

    def __init__(self, folder: Path, step: int, header: dict[str, Any], own: Any) -> None:
        self.folder, self.step, self.header, self.own = folder, step, header, own
        self.partial = partial_path(folder, step)
        self.coordinator = False

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:
        self.coordinator = is_coordinator

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return replace(plan, storage_data=self.own)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.header = {**self.header, "ranks": [plan.storage_data for plan in plans]}
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True)
        return [replace(plan, storage_data=f"tensors-{rank:05d}.safetensors") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write_tensors(plan, planner) if plan.items else [])
        return done

    def _write_tensors(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        """The safetensors format, one tensor after another. The library's writer refuses tensors that share memory and
        needs contiguous copies of all of them at once; and here the checksum takes no second pass over the file."""
        header: dict[str, Any] = {}
        keys: dict[MetadataIndex, str] = {}
        end = 0
        # Widest first, as the format's alignment wants it.
        items = sorted(plan.items, key=lambda item: -item.tensor_data.properties.dtype.itemsize)  # type: ignore[union-attr]
        for item in items:
            assert item.tensor_data is not None
            chunk, dtype = item.tensor_data.chunk, item.tensor_data.properties.dtype
            whole = chunk.sizes == item.tensor_data.size
            key = keys[item.index] = (
                item.index.fqn if whole else f"{item.index.fqn}@{','.join(map(str, chunk.offsets))}"
            )
            start, end = end, end + math.prod(chunk.sizes) * dtype.itemsize
            header[key] = {"dtype": _NAMES[dtype], "shape": list(chunk.sizes), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        tensors = (_bytes(planner.resolve_data(item)) for item in items)  # type: ignore[arg-type]
        blocks = chain([len(text).to_bytes(8, "little"), text], tensors)
        record = {"file": plan.storage_data, **_write_hashed(self.partial / plan.storage_data, blocks)}
        return [WriteResult(item.index, 0, {**record, "key": keys[item.index]}) for item in items]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files: dict[str, dict[str, Any]] = {}
        table: dict[str, dict[str, Any]] = {}
        for result in (result for rank in results for result in rank):
            stored, name = result.storage_data, result.index.fqn
            files[stored["file"]] = {"bytes": stored["bytes"], "sha256": stored["sha256"]}
            entry = metadata.state_dict_metadata[name]
            assert isinstance(entry, TensorStorageMetadata) and result.index.offset is not None
            sizes = next(chunk.sizes for chunk in entry.chunks if chunk.offsets == result.index.offset)
            row = {"dtype": _NAMES[entry.properties.dtype], "shape": list(entry.size), "chunks": []}
            table.setdefault(name, row)["chunks"].append(
                {"offsets": list(result.index.offset), "sizes": list(sizes), **{k: stored[k] for k in ("file", "key")}}
            )
        state = {**self.header, "serial": next_serial(self.folder)}
        for file_name, content in (("tensors.json", table), ("state.json", state)):
            files[file_name] = _write_json(self.partial / file_name, content)
        _write_json(self.partial / "manifest.json", {"format": FORMAT, "files": files})
        sync_folder(self.partial)
        final = free_path(self.folder, self.step)
        os.rename(self.partial, final)  # the commit: before it there is no checkpoint, after it a whole one
        sync_folder(final.parent)
        metadata.storage_meta = StorageMeta(checkpoint_id=str(final))  # DCP hands it to every rank

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


def _write_json(path: Path, content: Any) -> dict[str, Any]:
    return _write_hashed(path, [json.dumps(content, indent=1).encode()])


def _write_hashed(path: Path, blocks: Iterable[Any]) -> dict[str, Any]:
    """Write a new file to the disk and return its length and sha256, which is taken on the way."""
    size, digest = 0, hashlib.sha256()
    with open(path, "xb") as file:
        for block in blocks:
            for start in range(0, len(block), _PIECE):
                digest.update(block[start : start + _PIECE])
                file.write(block[start : start + _PIECE])
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _bytes(tensor: Tensor) -> Any:
    """The tensor's numbers in row-major order, without a copy if they lie so already."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
