"""A whole training step at its real shapes on a machine that could not compute it: what it launches, and who chose that.

The step is the training loop's own (GPT, Stepper, FusedAdamW). What is left out is arithmetic: at 8 x 1024 tokens of GPT-2
124M, minutes on a CPU and gigabytes of memory, for values never read. Inside ``no_arithmetic`` an operation on more than
``SMALL`` elements returns memory of the right shape, strides and dtype that is never touched; smaller ones, on which host
code may decide, are computed. Triton's launches are turned into compiles by bench/compiler/capture.py (bench.audit), or
only written down (``record``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from fastgpt import ops
from fastgpt.config import Config
from fastgpt.kernels import runtime, tuning
from fastgpt.model import GPT
from fastgpt.optim.build import build_optimizer
from fastgpt.training.step import Stepper

SMALL = 2**16
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class no_arithmetic(TorchDispatchMode):
    """Inside, PyTorch allocates large results and fills none. Views, allocations and custom ops run as they are.

    ``on_operation(name, arguments, results)`` is told of each that would have computed something large."""

    def __init__(self, on_operation: Any = None) -> None:
        super().__init__()
        self.on_operation = on_operation

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "aten":
            with self:  # what a fused op does besides its launches is arithmetic again
                return func.redispatch(_CPU, *args, **kwargs)  # its kernel itself: func() would come back here
        with self:
            # x.to(dtype) is a view or a copy: below autograd nobody has asked yet.
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        returns = [value.alias_info for value in func._schema.returns]
        views = any(alias is not None and not alias.is_write for alias in returns)
        if not tensors or views or all(x.numel() <= SMALL for x in tensors):
            return func(*args, **kwargs)
        made = tree_map_only(Tensor, _untouched, func(*_on_meta(args), **_on_meta(kwargs)))
        found = return_and_correct_aliasing(func, args, kwargs, made)  # in place or with out=: the argument itself
        if self.on_operation is not None:
            results = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
            self.on_operation(func.overloadpacket.__name__, tensors, results)
        return found


def _on_meta(tree: Any) -> Any:
    tree = tree_map_only(Tensor, lambda x: x.to("meta"), tree)
    return tree_map_only(torch.device, lambda _: torch.device("meta"), tree)


def _untouched(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) if x.is_meta else x


def step(config: Config, precision: str = "bf16", micro_batches: int = 2, on_operation: Any = None) -> None:
    """One optimizer step as ``--kernels triton`` runs it on one GPU, of ``micro_batches`` of the configuration's own size."""
    B, T = config.data.batch_size, config.model.block_size
    with no_arithmetic(on_operation):
        model = GPT(config.model, ops.get("triton", precision))
        optimizer = build_optimizer(model, config.optim, "triton")
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        stepper = Stepper(model, model, optimizer, scaler, precision, config.optim.grad_clip)
        stepper.adds_in_place = not config.train.compile
        tokens = torch.zeros(B, T, dtype=torch.int64)
        documents = (torch.zeros(B, T, dtype=torch.int32),) if config.data.mask_documents else ()
        stepper([(tokens, tokens, *documents)] * micro_batches, micro_batches, 1e-4)


# ---------------------------------------------------------------- written down


class Chosen(NamedTuple):
    """A ``tuning.Choice`` as plain values."""

    kernel: str
    dtype: str
    bucket: str
    config: tuple[tuple[str, int], ...]
    source: str
    shape: tuple[int, ...] | None
    """(m, n, k) of a matrix product."""


@dataclass
class Record:
    """What one step asked for. Counts are of the whole step."""

    choices: Counter[Chosen] = field(default_factory=Counter)
    launches: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Triton kernels, by (file, function)."""
    products: Counter[tuple[int, int, int, str]] = field(default_factory=Counter)
    """Matrix products that PyTorch hands to cuBLAS: (m, n, k, dtype of the operands)."""
    sweeps: Counter[str] = field(default_factory=Counter)
    """Other PyTorch operations on something large, by name: each is a pass over memory."""
    moved: Counter[str] = field(default_factory=Counter)
    """Bytes that these read and wrote, by name."""


def record(config: Config, precision: str, arch: int, sms: int, micro_batches: int = 2) -> Record:
    """What a step of ``config`` would launch on a card of compute capability ``arch`` with ``sms`` SMs, and which configs the
    tables choose for it. Nothing is compiled. Raises RuntimeError under Triton's interpreter."""
    from fastgpt.kernels import offline  # which imports triton

    found, quiet = Record(), False
    matmul: tuple[str, tuple[int, ...]] = "", ()
    tuning.forget()  # choices of another target, or refused by a card that is here

    def operation(name: str, arguments: list[Tensor], results: list[Tensor]) -> None:
        if quiet:
            return
        if name in ("mm", "addmm", "bmm"):
            a, b = arguments[1:3] if name == "addmm" else arguments[:2]  # addmm's first is what it adds to
            found.products[a.shape[-2], b.shape[-1], a.shape[-1], _plain(a.dtype)] += 1
        elif not name.endswith(("empty", "empty_like", "empty_strided")):
            found.sweeps[name] += 1
            found.moved[name] += sum(x.numel() * x.element_size() for x in (*arguments, *results))

    def chosen(choice: tuning.Choice) -> None:
        shape = matmul[1] if matmul[0] == choice.key.kernel else None
        found.choices[Chosen(*choice.key, tuple(choice.config.items()), choice.source, shape)] += 1

    def runs(op: str, shape: tuple[int, ...], dtype: torch.dtype, engine: str) -> AbstractContextManager | None:
        nonlocal matmul
        if op == "matmul_fp32":
            m, n, k = shape
            found.products[m, n, k, _plain(dtype)] += 1
            return silence()
        matmul = op, shape  # a linear's choice is launched next
        return None

    @contextmanager
    def silence() -> Iterator[None]:
        """On a GPU it is one matmul, in fp32 from 16 bits; the casts that a CPU needs are not counted."""
        nonlocal quiet
        quiet = True
        try:
            yield
        finally:
            quiet = False

    def launched(function: Any, *args: Any, **options: Any) -> None:
        found.launches[function.module.rpartition(".")[2], function.__name__] += 1

    with offline.absent_gpu(arch, sms), offline.launched_by(launched), tuning.heard(chosen), runtime.recorded(runs):
        step(config, precision, micro_batches, operation)
    return found


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
