"""A CUDA graph without a GPU: the calls that reach PyTorch's dispatcher, noted once and repeated on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgpt.kernels import runtime

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)


class Tape(TorchDispatchMode):
    """What a graph does, and what it does not: numbers that Python passes are fixed, tensors are where they were, Python does
    not run again, and reading a value while capturing fails. A capture computes nothing: ``end`` puts back what was written
    and fills new tensors with NaN."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple, dict, Any]] = []
        self._written: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        for tensor in _written_by(func, args, kwargs):
            self._written.setdefault(id(tensor), (tensor, tensor.clone()))
        out = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, out))
        return out

    def end(self) -> None:
        for func, _, _, out in self._calls:
            for tensor in [] if _is_view(func) else tree_leaves(out):
                if isinstance(tensor, Tensor) and tensor.is_floating_point() and id(tensor) not in self._written:
                    tensor.data.fill_(float("nan"))
        for tensor, before in reversed(self._written.values()):
            tensor.data.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        versions = [(tensor, tensor._version) for tensor, _ in self._written.values()]
        for func, args, kwargs, out in self._calls:
            if not _is_view(func):
                for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                    if isinstance(old, Tensor) and old is not new:
                        old.copy_(new)
        for tensor, version in versions:  # a GPU that writes raises none
            torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))


def _is_view(func: Any) -> bool:
    return any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)


def _written_by(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    named = dict(zip((a.name for a in func._schema.arguments), args)) | kwargs
    written = [named.get(a.name) for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [tensor for tensor in tree_leaves(written) if isinstance(tensor, Tensor)]


class TapeRecorder:
    """In place of ``CudaRecorder``. ``fail``: what a capture raises at its end."""

    def __init__(self, monkeypatch: Any) -> None:
        self.capturing, self.captures, self.recovered = False, 0, 0
        self.fail: Callable[[int], Exception | None] = lambda capture: None
        monkeypatch.setattr(runtime, "capturing", lambda device: self.capturing)

    def run(self, work: Callable[[], list[Tensor]]) -> list[Tensor]:
        return work()

    def pool(self) -> None:
        return None

    def record(self, work: Callable[[], list[Tensor]], pool: None) -> tuple[list[Tensor], Callable[[], None]]:
        tape = Tape()
        self.capturing = True
        self.captures += 1
        try:
            with tape, np.errstate(all="ignore"):  # the interpreter computes on the NaN in there
                outputs = work()
                if (error := self.fail(self.captures)) is not None:
                    raise error
        finally:
            self.capturing = False
            tape.end()
        return outputs, tape.replay

    def recover(self) -> None:
        self.recovered += 1
