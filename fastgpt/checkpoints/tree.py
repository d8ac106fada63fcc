"""A run's state, taken apart for storage: tensors under flat names, everything else as JSON that refers to them.

``{"model": {"wte": W}, "step": 3}`` becomes the tensors ``{"model.wte": W}`` and the tree
``{"model": {"wte": {"$tensor": "model.wte"}}, "step": 3}``. Two tensors over the same memory (tied weights) are stored once,
with two references. Nothing in a tree can name code: it is numbers, strings, lists and dictionaries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
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
