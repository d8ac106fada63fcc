"""The operations that a GPT step is made of, as one table, and which ``--precision`` they can run in on a device. The model
calls an ``Ops`` and does not know which.

EAGER is plain PyTorch (and the specification); TRITON is the fused kernels. Both follow torch.autocast: matmul operands and
the outputs of norms take its dtype, while parameters, the residual stream and the loss stay fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fastgpt import kernels
from fastgpt.config import EXPERIMENTAL, GPT2_ALONE
from fastgpt.hardware import cards, requirements
from fastgpt.kernels import reference, runtime
from fastgpt.kernels.runtime import compute_dtype


@dataclass(frozen=True)
class Ops:
    """Signatures are those of fastgpt/kernels/reference.py."""

    name: str
    layer_norm: Callable[..., Any]
    rms_norm: Callable[..., Any]
    qk_norm_rope: Callable[..., Tensor]
    attention: Callable[..., Tensor]
    qkv_attention: Callable[..., Tensor]
    linear: Callable[..., Tensor]
    linear_gelu: Callable[..., Tensor]
    mlp: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., Tensor]
    embedding: Callable[..., Tensor]

    def __deepcopy__(self, memo: dict) -> Ops:
        return self  # a table of functions: copies of a model share it


def _from(module: Any) -> dict[str, Any]:
    """The function of each operation in ``module``, by name."""
    return {field.name: getattr(module, field.name) for field in fields(Ops) if field.name != "name"}


EAGER = Ops("eager", **_from(reference))


def _in_compute_dtype(norm: Callable[..., Any]) -> Callable[..., Any]:
    """``norm``, whose output the next matmul reads without another cast."""

    def in_compute_dtype(x: Tensor, *weights: Tensor | None, **options: Any) -> Any:
        options.setdefault("out_dtype", compute_dtype(x))
        return norm(x, *weights, **options)

    return in_compute_dtype


@cache
def _triton() -> Ops:
    table = Ops("triton", **_from(kernels))
    return replace(table, layer_norm=_in_compute_dtype(table.layer_norm), rms_norm=_in_compute_dtype(table.rms_norm))


@cache
def _fp16_fast() -> Ops:
    """TRITON, with products summed in fp16 by chunks where docs/precision.md says so. Operands have to be fp16, as they are
    under autocast: anything else raises ValueError."""
    table = _triton()
    summed = ("attention", "qkv_attention", "linear", "linear_gelu", "mlp", "linear_cross_entropy")
    fast: dict[str, Any] = {name: partial(getattr(table, name), accumulate="fp16") for name in summed}
    return replace(table, name="triton fp16-fast", **fast)


@cache
def _fp8() -> Ops:
    """TRITON, with the linears of the blocks in fp8, and norms and attention that hand them fp8. Operands have to be bf16, as
    they are under autocast: anything else raises ValueError. ``linear`` and ``mlp`` take no residual and no dropout,
    which a GPT leaves to its norms."""
    from fastgpt.kernels.fp8 import ops

    own = {name: getattr(ops, name) for name in ("qkv_attention", "linear", "mlp")}
    return replace(_triton(), name="triton fp8", layer_norm=_in_compute_dtype(ops.layer_norm), **own)


def get(name: str, precision: str = "bf16") -> Ops:
    """The table for ``--kernels triton|eager`` at a resolved ``--precision``: most need no table of their own, as autocast
    gives operands their dtype. Raises ValueError for another name."""
    if name == "eager":
        return EAGER
    if name == "triton":
        return {"fp16-fast": _fp16_fast, "fp8": _fp8}.get(precision, _triton)()
    raise ValueError(f"kernels is {name!r}: it can be 'triton' or 'eager'")


DTYPES = {
    **{"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp16-fast": torch.float16},
    "fp8": torch.bfloat16,  # of the operands that are not in fp8
}
"""The dtype of matmul operands, by ``--precision``."""


def precision_for(name: str, device: torch.device) -> str:
    """``--precision`` with auto resolved: fp32 on a CPU, bf16 on a GPU that has it (Ampere and later), else fp16."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    return (
        "fp16"
        if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < requirements.OLDEST
        else "bf16"
    )


def usable_precision(name: str, device: torch.device, kernels: str, family: str = "gpt2") -> tuple[str, str | None]:
    """What a run with ``--precision name`` computes in, and, if that is not what was asked for, a sentence that says why.

    An experimental mode needs ``--kernels triton``, for fp8 a GPT-2, and a card that is faster in it: anywhere else, for
    example when a run is resumed on another card, auto's choice takes its place. On a card that cards.GPUS does not list, what
    was asked is used."""
    if name not in EXPERIMENTAL:
        return precision_for(name, device), None
    alone = name in GPT2_ALONE and family != "gpt2"
    why = "which only GPT-2 has yet" if alone else _why_not(name, device, kernels)
    if why is None:
        return name, None
    safe = precision_for("auto", device)
    return safe, f"precision is '{name}', {why}: {safe} is used instead"


def _why_not(name: str, device: torch.device, kernels: str) -> str | None:
    if kernels != "triton":
        return f"which --kernels {kernels} does not have"
    if device.type != "cuda" and not runtime.INTERPRET:
        return "which only the Triton kernels have, and they do not run here"
    if name == "fp8":
        from fastgpt.kernels.fp8.launch import refusal

        if (unable := refusal(device)) is not None:
            return f"but {unable}"
    gpu = cards.present(device)
    return f"and {gpu.name} is no faster in it" if gpu is not None and not cards.gains(name, gpu) else None


def scales_loss(precision: str) -> bool:
    """Whether gradients are stored in fp16, where small ones underflow unless the loss is scaled."""
    return DTYPES[precision] == torch.float16


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context that forward runs under: none at fp32."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])


def __getattr__(name: str) -> Ops:
    """TRITON is built on first use, so that plain PyTorch never imports triton."""
    if name == "TRITON":
        return _triton()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
