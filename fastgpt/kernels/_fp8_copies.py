"""fp8 forms that are kept beside a tensor: of a weight from one optimizer step to the next, of an activation or gradient
from the kernel that made both to the matmul that reads them.

The second kind is found by the identity of the tensor, as autograd and the model hand on nothing else: ``give`` keeps the form,
``take`` returns it, once. A tensor that was written to since (its version tells), that is a view or a sum of others, or that
another op made has none, and is then quantised in a pass of its own: slower, the same values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastgpt.kernels import working_copy
from fastgpt.kernels._fp8_launch import Fp8, Grouped

Kinds = tuple[type[Fp8 | Grouped], ...]


@dataclass
class _Weight:
    forms: tuple[Tensor, Tensor, Tensor, Tensor]
    version: int
    address: int


_made = WeakTensorKeyDictionary()  # a form that no matmul takes goes with its tensor
_weights = WeakTensorKeyDictionary()


def give(tensor: Tensor, form: Fp8 | Grouped) -> None:
    """Keep ``form``, which is ``tensor`` in fp8."""
    _made[tensor] = form, tensor._version


def take(tensor: Tensor, dtype: torch.dtype, kinds: Kinds = (Fp8,)) -> Fp8 | Grouped | None:
    """The form kept for ``tensor``, still right and of a kind that its reader takes. It is then forgotten: its memory is free
    after one matmul."""
    form, version = _made.pop(tensor, (None, None))
    right = version == tensor._version and isinstance(form, kinds) and form.values.dtype == dtype
    return form if right else None


def of_weight(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values and stats of ``weight`` (N, K), and the same of it rounded along its other dimension.

    Kept as working_copy.py keeps its copies, until a write to the parameter; in CUDA graphs of a step, from its first
    micro-batch to its last. Not kept: under torch.compile, under FSDP, and of a tensor that is no plain leaf parameter."""
    plain = weight.detach()
    if torch.compiler.is_compiling() or not working_copy.enabled or not working_copy.cachable(weight):
        return torch.ops.fastgpt.fp8_quantise_weight(plain)
    if working_copy.capturing(weight):
        _weights.pop(weight, None)  # the replays to come have copies of their own
        return working_copy.once_in_captures(weight, lambda: torch.ops.fastgpt.fp8_quantise_weight(plain))
    now, kept = (weight._version, weight.data_ptr()), _weights.get(weight)
    if kept is None or (kept.version, kept.address) != now or kept.forms[0].shape != weight.shape:
        with torch.inference_mode(False):
            kept = _weights[weight] = _Weight(torch.ops.fastgpt.fp8_quantise_weight(plain), *now)
    return kept.forms
