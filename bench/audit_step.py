"""The launches of a whole training step, at its real shapes, on a machine that could not compute it.

The step is the training loop's own (GPT, Stepper, FusedAdamW); ``offline.capture_launches`` turns its launches into
compiles. What is left is PyTorch's arithmetic: at 8 x 1024 tokens of GPT-2 124M, minutes on a CPU and gigabytes of memory,
for values that nobody reads. Inside ``no_arithmetic`` an operation on more than ``SMALL`` elements returns memory of the right
shape, strides and dtype that nobody ever touches; smaller ones, on which host code may decide, are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastgpt.config import load_preset
from fastgpt.kernels.launch_cases import Case

SMALL = 2**16
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class no_arithmetic(TorchDispatchMode):
    """Inside, PyTorch allocates large results and fills none. Views, allocations and custom ops run as they are."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "aten":
            with self:  # what a fused op does besides its launches is arithmetic again
                return func.redispatch(_CPU, *args, **kwargs)  # its kernel itself: func() would come back here
        with self:
            parts = func.decompose(
                *args, **kwargs
            )  # x.to(dtype) is a view or a copy: below autograd nobody has asked yet
        if parts is not NotImplemented:
            return parts
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        returns = [value.alias_info for value in func._schema.returns]
        views = any(alias is not None and not alias.is_write for alias in returns)
        if not tensors or views or all(x.numel() <= SMALL for x in tensors):
            return func(*args, **kwargs)
        written = [_argument(func, args, kwargs, alias) for alias in returns if alias is not None]
        if written:  # in place, or out=
            return written[0] if len(written) == 1 else tuple(written)
        return tree_map_only(Tensor, _untouched, func(*_on_meta(args), **_on_meta(kwargs)))


def _on_meta(tree: Any) -> Any:
    tree = tree_map_only(Tensor, lambda x: x.to("meta"), tree)
    return tree_map_only(torch.device, lambda _: torch.device("meta"), tree)


def _untouched(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) if x.is_meta else x


def _argument(func: Any, args: tuple, kwargs: dict[str, Any], alias: Any) -> Any:
    """The argument that a result is: the one whose alias set in the schema it shares."""
    for i, parameter in enumerate(func._schema.arguments):
        if parameter.alias_info is not None and parameter.alias_info.before_set == alias.before_set:
            return args[i] if i < len(args) else kwargs[parameter.name]
    raise RuntimeError(f"{func} returns an alias of no argument")


def training_step(preset: str, precision: str = "bf16") -> None:
    """One optimizer step of a preset as it ships for CUDA: its model, micro-batch and clip; two micro-batches, so that
    gradients are also accumulated."""
    from fastgpt import ops
    from fastgpt.model import GPT
    from fastgpt.training.step import Stepper, build_optimizer

    config = load_preset(preset, "cuda")
    B, T = config.data.batch_size, config.model.block_size
    with no_arithmetic():
        model = GPT(config.model, ops.get("triton"))
        optimizer = build_optimizer(model, config.optim, "triton")
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        stepper = Stepper(model, model, optimizer, scaler, precision, config.optim.grad_clip)
        tokens = torch.zeros(B, T, dtype=torch.int64)
        stepper([(tokens, tokens)] * 2, 2, 1e-4)


def shipped_steps() -> Iterator[Case]:
    """What the RTX 4070's two real runs would launch."""
    for preset in ("gpt2-124m", "gpt2-40m"):
        yield f"step {preset} bf16", partial(training_step, preset)


def other_steps() -> Iterator[Case]:
    yield "step gpt2-350m bf16", partial(training_step, "gpt2-350m")
    yield "step demo bf16", partial(training_step, "demo")
    yield "step gpt2-124m fp16", partial(training_step, "gpt2-124m", "fp16")
    yield "step gpt2-124m fp32", partial(training_step, "gpt2-124m", "fp32")
