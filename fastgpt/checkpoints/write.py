"""One checkpoint, as a directory: written whole or not at all, verified before it is believed, unable to run code.

    step-00000250/
      manifest.json                bytes and sha256 of every other file; written last
      state.json                   step, versions, all plain values (tree.py)
      tensors.json                 per tensor: dtype, shape, and which file holds which part of it
      tensors-00000.safetensors    what rank 0 wrote; one file per rank

Each rank writes its shards, and its share of what several ranks have. Nothing reads a pickle (read.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastgpt.checkpoints.folder import free_path, next_serial, partial_path
from fastgpt.checkpoints.read import DTYPES, FORMAT
from fastgpt.checkpoints.tree import Shard
from fastgpt.common import sync_folder

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PIECE = 16 << 20  # bytes hashed and written at a time
Piece = tuple[str, tuple[int, ...]]
"""A part of a tensor: (the tensor's name, where the part begins in it)."""


def write(
    folder: Path,
    step: int,
    header: dict[str, Any],
    own: Any,
    parts: Mapping[str, Shard],
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write the checkpoint of ``step`` under a partial name and rename it; all ranks of ``group`` (default: all there are)
    call it.

    ``header``: the content of state.json; rank 0's counts. ``own``: each rank's own JSON tree. ``parts``: of tensors, by name;
    one that several ranks have is written by one of them. Returns the final path. On any failure of any rank, every rank
    raises it and the partial directory is gone."""
    partial, rank = partial_path(folder, step), own_rank()
    # A rank without a row of a tensor has nothing of it to write. A tensor may have none itself.
    mine = {(name, part.offsets): part for name, part in parts.items() if part.local.numel() or not part.shape.numel()}

    def begin() -> tuple[Any, dict[Piece, int]]:
        if rank == 0:
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
        return own, {piece: part.local.nbytes for piece, part in mine.items()}

    def write_tensors() -> dict[str, Any] | None:
        assigned = {piece: part for piece, part in mine.items() if writers[piece] == rank}
        return _write_tensors(partial / f"tensors-{rank:05d}.safetensors", assigned) if assigned else None

    def finish() -> Path | None:
        state = {**header, "ranks": [own for own, _ in begun], "serial": next_serial(folder)}
        return _commit(partial, free_path(folder, step), state, written) if rank == 0 else None

    try:
        begun = _together(begin, group)
        writers = _writers([sizes for _, sizes in begun])
        written = [result for result in _together(write_tensors, group) if result is not None]
        final = _together(finish, group)[0]
    except BaseException:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    assert final is not None
    return final


def has_group() -> bool:
    """Whether torch.distributed's default group exists: then its ranks save together."""
    return dist.is_available() and dist.is_initialized()


def own_rank() -> int:
    """This process's rank in the default group; 0 without one."""
    return dist.get_rank() if has_group() else 0


def _together(work: Callable[[], Any], group: dist.ProcessGroup | None) -> list[Any]:
    """What ``work()`` returns on each rank. If it raises on any, every rank raises the same."""
    try:
        mine = work()
    except BaseException as error:
        mine = error
    results = [mine]
    if has_group():
        results *= dist.get_world_size(group)
        dist.all_gather_object(results, mine, group=group)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def _writers(sizes: list[dict[Piece, int]]) -> dict[Piece, int]:
    """Which rank writes each piece, from how many bytes of what each has: the one that has the least to write so far."""
    writers: dict[Piece, int] = {}
    load = [0] * len(sizes)
    for piece, size in chain.from_iterable(has.items() for has in sizes):
        if piece not in writers:
            rank = writers[piece] = min((r for r, has in enumerate(sizes) if piece in has), key=load.__getitem__)
            load[rank] += size
    return writers


def _write_tensors(path: Path, parts: dict[Piece, Shard]) -> dict[str, Any]:
    """The safetensors format, one tensor after another; returns what ``_commit`` has to know of the file. The library's writer
    refuses tensors that share memory and needs contiguous copies of all of them at once; and here the checksum takes no
    second pass over the file."""
    header: dict[str, Any] = {}
    rows = []
    end = 0
    # Widest first, as the format's alignment wants it.
    ordered = sorted(parts.items(), key=lambda item: -item[1].local.dtype.itemsize)
    for (name, offsets), part in ordered:
        sizes, dtype = list(part.local.shape), _NAMES[part.local.dtype]
        key = name if part.local.shape == part.shape else f"{name}@{','.join(map(str, offsets))}"
        start, end = end, end + part.local.nbytes
        header[key] = {"dtype": dtype, "shape": sizes, "data_offsets": [start, end]}
        chunk = {"offsets": list(offsets), "sizes": sizes, "file": path.name, "key": key}
        rows.append((name, {"dtype": dtype, "shape": list(part.shape)}, chunk))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    blocks = chain([len(text).to_bytes(8, "little"), text], (_bytes(part.local) for _, part in ordered))
    return {"file": path.name, "content": _write_hashed(path, blocks), "rows": rows}


def _commit(partial: Path, final: Path, state: dict[str, Any], written: list[dict[str, Any]]) -> Path:
    """Write the three tables, and give the directory its name."""
    files = {result["file"]: result["content"] for result in written}
    table: dict[str, dict[str, Any]] = {}
    for name, row, chunk in chain.from_iterable(result["rows"] for result in written):
        table.setdefault(name, {**row, "chunks": []})["chunks"].append(chunk)
    for file_name, content in (("tensors.json", table), ("state.json", state)):
        files[file_name] = _write_json(partial / file_name, content)
    _write_json(partial / "manifest.json", {"format": FORMAT, "files": files})
    sync_folder(partial)
    os.rename(partial, final)  # the commit: before it there is no checkpoint, after it a whole one
    sync_folder(final.parent)
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
