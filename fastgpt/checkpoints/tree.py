"""A run's state, taken apart for storage: tensors under flat names, everything else as JSON that refers to them.

``{"model": {"wte": W}, "step": 3}`` becomes the tensors ``{"model.wte": W}`` and the tree
``{"model": {"wte": {"$tensor": "model.wte"}}, "step": 3}``. Two tensors over the same memory (tied weights) are stored once,
with two references. Nothing in a tree can name code: it is numbers, strings, lists and dictionaries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

_TENSOR, _TUPLE, _ITEMS = "$tensor", "$tuple", "$items"


def split(state: Any, prefix: str = "") -> tuple[Any, dict[str, Tensor]]:
    """``state`` (nested dicts, lists and tuples of tensors and plain values) as (JSON tree, tensors by name).

    Raises TypeError for a value that is neither, naming where it stands, and ValueError if two tensors get one name."""
    tensors: dict[str, Tensor] = {}
    names: dict[Any, str] = {}

    def walk(value: Any, name: str) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Tensor):
            known = names.setdefault(_memory(value), name)
            if known == name:
                if name in tensors:
                    raise ValueError(f"two tensors of the state are both called {name}")
                tensors[name] = value
            return {_TENSOR: known}
        if isinstance(value, Mapping):
            items = [(key, walk(item, f"{name}.{key}" if name else str(key))) for key, item in value.items()]
            if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
                return dict(items)
            return {_ITEMS: [list(item) for item in items]}
        if isinstance(value, (list, tuple)):
            children = [walk(item, f"{name}.{i}") for i, item in enumerate(value)]
            return {_TUPLE: children} if isinstance(value, tuple) else children
        raise TypeError(f"{name} is a {type(value).__name__}: a checkpoint holds tensors and plain values only")

    return walk(state, prefix), tensors


def join(tree: Any, tensors: Mapping[str, Any]) -> Any:
    """The inverse of ``split``; a tensor with two references comes back as one object."""
    if isinstance(tree, list):
        return [join(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    if _TUPLE in tree:
        return tuple(join(item, tensors) for item in tree[_TUPLE])
    if _ITEMS in tree:
        return {key: join(item, tensors) for key, item in tree[_ITEMS]}
    return {key: join(item, tensors) for key, item in tree.items()}


def references(tree: Any) -> Iterator[str]:
    """Names of the tensors that ``tree`` refers to."""
    if isinstance(tree, dict) and _TENSOR in tree:
        yield tree[_TENSOR]
    elif isinstance(tree, (dict, list)):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from references(item)


def _memory(tensor: Tensor) -> Any:
    """Equal for two tensors exactly if they are the same numbers in the same memory."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if not local.numel():
        return id(tensor)
    return local.device, local.data_ptr(), local.dtype, local.shape, local.stride(), tensor.shape


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


class Staging:
    """Copies tensors to the host, into the same (on a GPU: pinned) buffers each time.

    One state of host memory as large as the checkpoint's share of this rank, held between saves: allocating and
    pinning it anew would take longer than the copy. What ``copy`` returned last is overwritten by the next call."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor | Shard]:
        """The tensors' values at this point of the current stream; waits until they are on the host."""
        copies: dict[str, Tensor | Shard] = {}
        devices = set()
        for name, tensor in tensors.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            host = self._buffer(name, local)
            host.copy_(local, non_blocking=True)
            devices |= {local.device} if local.is_cuda else set()
            copies[name] = _shard(tensor, host) if isinstance(tensor, DTensor) else host
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        for name in self._buffers.keys() - tensors.keys():
            del self._buffers[name]
        return copies

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            try:
                buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
            except RuntimeError:  # the system allows no more pinned memory: slower, but it works
                buffer = torch.empty(like.shape, dtype=like.dtype)
            self._buffers[name] = buffer
        return buffer


def _shard(tensor: DTensor, host: Tensor) -> Shard:
    chunks = tensor.__create_chunk_list__()
    if len(chunks) != 1:
        raise NotImplementedError(f"a parameter's local shard is {len(chunks)} pieces {tensor.placements}")
    return Shard(host, tensor.shape, chunks[0])
