"""Memory that host code allocates empty: filled with bytes of 0xFF (NaN in every float format) and known to be unwritten.

Inside ``marked(True)``, torch.empty and its relatives fill what they return, and note its storage. A kernel's store
marks bytes as written; what PyTorch itself writes shows in that it no longer is 0xFF, element by element. Large
tensors are neither filled nor noted: of those only the pages that somebody touches exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from bench.emulator.arithmetic import CONTAINER
from bench.emulator.memory import all_ones, raw, zeros

LARGE = 2**28
"""Bytes from which on an allocation is left alone."""

_ALLOCATORS: list[tuple[Any, str]] = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
_ALLOCATORS += [(Tensor, name) for name in ("new_empty", "new_empty_strided")]

_known: dict[int, tuple[StorageWeakRef, np.ndarray, int]] = {}
"""By address: the storage, 1 per written byte, bytes of an element."""


def _fill(x: Tensor) -> Tensor:
    storage = x.untyped_storage()
    if 0 < storage.nbytes() < LARGE and x.device.type == "cpu" and x.is_contiguous():
        raw(storage.data_ptr(), storage.nbytes())[:] = 0xFF
        init = np.zeros(-(-storage.nbytes() // 16) * 16, np.uint8)
        _known[storage.data_ptr()] = StorageWeakRef(storage), init, x.element_size()
    return x


def virtual(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor of zeros, of which only the pages that are touched exist."""
    count = int(np.prod(shape, dtype=np.int64))
    return torch.from_numpy(zeros(count * dtype.itemsize)).view(dtype).view(shape)


def _zero(x: Tensor) -> Tensor:
    return x if x.is_floating_point() or x.device.type != "cpu" else x.zero_()


@contextmanager
def marked(fill: bool) -> Iterator[None]:
    """Inside, empty allocations are filled and noted. ``fill`` False, where only some CTAs of a launch run: integers are zero,
    as those that the others would have written may say where to read; nothing is noted."""

    def filled(original: Callable) -> Callable:
        def allocate(*args: Any, **kwargs: Any) -> Any:
            made = original(*args, **kwargs)
            return (_fill if fill else _zero)(made) if isinstance(made, Tensor) else made

        return allocate

    with ExitStack() as stack:
        for owner, name in _ALLOCATORS:
            stack.enter_context(mock.patch.object(owner, name, filled(getattr(owner, name))))
        try:
            yield
        finally:
            _known.clear()


def written(storage: torch.UntypedStorage) -> np.ndarray | None:
    """1 per byte that somebody wrote, for a storage allocated empty; None for any other."""
    found = _known.get(storage.data_ptr())
    if found is None:
        return None
    reference, init, size = found
    if reference.expired():
        del _known[storage.data_ptr()]
        return None
    content = raw(storage.data_ptr(), storage.nbytes() // size * size).view(CONTAINER[size])
    init.view(CONTAINER[size])[: len(content)][content != np.iinfo(CONTAINER[size]).max] = all_ones(size)
    return init


def forget(address: int) -> None:
    """It is not known any more what of this storage is written: only some CTAs of a launch ran."""
    _known.pop(address, None)


def elements(x: Tensor) -> int:
    """How many elements of ``x`` nobody has written."""
    init = written(x.untyped_storage())
    if init is None:
        return 0
    size = x.element_size()
    whole = torch.from_numpy(init[: x.untyped_storage().nbytes() // size * size].reshape(-1, size).all(axis=1))
    return int((~torch.as_strided(whole, x.shape, x.stride(), x.storage_offset())).sum())
