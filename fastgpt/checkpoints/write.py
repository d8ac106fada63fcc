"""One checkpoint, as a directory: written whole or not at all, verified before it is believed, unable to run code.

    step-00000250/
      manifest.json                bytes and sha256 of every other file; written last
      state.json                   step, versions, all plain values (tree.py)
      tensors.json                 per tensor: dtype, shape, and which file holds which part of it
      tensors-00000.safetensors    what rank 0 wrote; one file per rank

Of a sharded tensor every rank writes its own part; the others are divided between the ranks that have them. torch's own
torch.distributed.checkpoint would plan that, too, but describes its files by a pickle, and nothing here reads one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastgpt.checkpoints.folder import free_path, next_serial, partial_path
from fastgpt.checkpoints.read import DTYPES, FORMAT
from fastgpt.checkpoints.tree import Shard
from fastgpt.common import sync_folder

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PIECE = 16 << 20  # bytes hashed and written at a time
T = TypeVar("T")


def has_group() -> bool:
    """Whether torch.distributed's default group exists: then its ranks save together."""
    return dist.is_available() and dist.is_initialized()


def own_rank() -> int:
    """This process's rank in the default group; 0 without one."""
    return dist.get_rank() if has_group() else 0


def write(
    folder: Path,
    step: int,
    header: dict[str, Any],
    own: Any,
    tensors: Mapping[str, Shard],
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write the checkpoint of ``step`` under a partial name and rename it; all ranks of ``group`` (default: all there are)
    call it.

    ``header``: the content of state.json; rank 0's counts. ``own``: each rank's own JSON tree. ``tensors``: flat; a name that
    several ranks have is written by one of them. Returns the final path. On any failure of any rank, every rank raises it and
    the partial directory is gone."""
    rank, partial = own_rank(), partial_path(folder, step)

    def begin() -> tuple[Any, list[str]]:
        if rank == 0:
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
        return own, list(tensors)

    try:
        ranks, names = zip(*_on_all_ranks(begin, group))
        mine = _share(tensors, names, rank)
        written = _on_all_ranks(lambda: _write_tensors(partial / f"tensors-{rank:05d}.safetensors", mine), group)
        content = {**header, "ranks": ranks}
        final, *_ = _on_all_ranks(lambda: _commit(folder, step, content, written) if rank == 0 else Path(), group)
    except BaseException:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _on_all_ranks(work: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """What ``work`` returns on each rank, when all have done it. If it fails on any, every rank raises that."""
    if not has_group():
        return [work()]
    try:
        outcome: tuple[T | None, BaseException | None] = (work(), None)
    except BaseException as error:
        outcome = (None, error)
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, outcome, group=group)
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [result for result, _ in outcomes]


def _share(tensors: Mapping[str, Shard], names: Sequence[Collection[str]], rank: int) -> dict[str, Shard]:
    """What this rank writes, by ``names`` of the tensors that each rank has: its part of the sharded ones, and of the others
    its share."""
    mine = {}
    for number, name in enumerate(sorted(set().union(*names))):
        holders = [holder for holder, held in enumerate(names) if name in held]
        if rank not in holders:
            continue
        shard = tensors[name]
        # With more ranks than rows a rank has nothing of a sharded tensor.
        if shard.local.numel() if shard.sharded else holders[number % len(holders)] == rank:
            mine[name] = shard
    return mine


def _write_tensors(path: Path, tensors: dict[str, Shard]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write this rank's file; return what tensors.json and manifest.json are to say of it.

    The safetensors format, one tensor after another. The library's writer refuses tensors that share memory and
    needs contiguous copies of all of them at once; and here the checksum takes no second pass over the file."""
    if not tensors:
        return {}, {}
    header: dict[str, Any] = {}
    table: dict[str, Any] = {}
    end = 0
    # Widest first, as the format's alignment wants it.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].local.dtype.itemsize))
    for name, (local, shape, offsets, _) in tensors.items():
        key = name if local.shape == shape else f"{name}@{','.join(map(str, offsets))}"
        dtype, sizes = _NAMES[local.dtype], list(local.shape)
        start, end = end, end + local.numel() * local.dtype.itemsize
        header[key] = {"dtype": dtype, "shape": sizes, "data_offsets": [start, end]}
        chunk = {"offsets": list(offsets), "sizes": sizes, "file": path.name, "key": key}
        table[name] = {"dtype": dtype, "shape": list(shape), "chunks": [chunk]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    blocks = chain([len(text).to_bytes(8, "little"), text], (_bytes(shard.local) for shard in tensors.values()))
    return table, {path.name: _write_hashed(path, blocks)}


def _commit(
    folder: Path, step: int, header: dict[str, Any], written: list[tuple[dict[str, Any], dict[str, Any]]]
) -> Path:
    partial = partial_path(folder, step)
    table: dict[str, Any] = {}
    files: dict[str, Any] = {}
    for rows, file in written:
        files |= file
        for name, row in rows.items():
            table.setdefault(name, {**row, "chunks": []})["chunks"] += row["chunks"]
    files["tensors.json"] = _write_json(partial / "tensors.json", table)
    files["state.json"] = _write_json(partial / "state.json", {**header, "serial": next_serial(folder)})
    _write_json(partial / "manifest.json", {"format": FORMAT, "files": files})
    sync_folder(partial)
    final = free_path(folder, step)
    os.rename(partial, final)  # the commit: before it there is no checkpoint, after it a whole one
    sync_folder(folder)
    return final


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
