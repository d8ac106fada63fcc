"""What nanoGPT's and Hugging Face's blocks have in common: the layer norm and the MLP."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.ops import EAGER, compute_dtype
from fastgpt.patching.swap import Fused

# The kernels' limits; theirs cannot be imported where triton is not installed.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_WIDTH = 16_384
MAX_HEAD_DIM = 256


def supported(x: Tensor) -> bool:
    """Whether the kernels take this tensor; others go the model's own way."""
    return x.dtype in DTYPES and 0 < x.shape[-1] <= MAX_WIDTH and x.numel() > 0


def stream_dtype(x: Tensor) -> torch.dtype:
    """The dtype that F.layer_norm gives for ``x``: on CUDA, autocast computes norms in fp32."""
    return torch.float32 if x.is_cuda and torch.is_autocast_enabled("cuda") else x.dtype


class LayerNorm(Fused):
    """nn.LayerNorm, or any module with ``weight`` (C,), ``bias`` (C,) or None, and eps 1e-5 unless it says otherwise."""

    def forward(
        self: Any, x: Tensor, residual: Tensor | None = None, dropout_p: float = 0.0, dtype: torch.dtype | None = None
    ) -> Any:
        """x -> norm(x); or (norm(s), s) with s = dropout(x) + residual, in the dtype that x + residual has. ``dtype`` is
        the norm's (default: PyTorch's)."""
        if not supported(x):
            if residual is None:
                return super().forward(x)  # type: ignore[misc]
            total = F.dropout(x, dropout_p) + residual
            return super().forward(total), total  # type: ignore[misc]
        if residual is not None:
            residual = residual.to(torch.promote_types(x.dtype, residual.dtype))
        dtype = dtype or stream_dtype(x if residual is None else residual)
        return self.ops.layer_norm(
            x, self.weight, self.bias,
            residual=residual, dropout_p=dropout_p, eps=getattr(self, "eps", 1e-5), out_dtype=dtype,
        )  # fmt: skip


# ---- MLP


def gelu_kind(activation: Any) -> str | None:
    """ "tanh" or "none" (as F.gelu's ``approximate``) if ``activation`` is a GELU, else None."""
    if isinstance(activation, nn.GELU):
        return activation.approximate
    name = type(activation).__name__  # transformers.activations
    if name in ("NewGELUActivation", "PytorchGELUTanh", "GELUTanh"):
        return "tanh"
    return "none" if name == "GELUActivation" and getattr(activation, "act", F.gelu) is F.gelu else None


class MLP(Fused):
    """c_fc -> GELU -> c_proj -> dropout. c_fc and c_proj are nn.Linear, or Conv1D whose (in, out) weight is read as the
    strided view (out, in): its gradient arrives in its own layout."""

    def forward(self: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """With a residual, returns residual + dropout(MLP(x)), in the dtype that this sum has, formed inside c_proj."""
        kind = gelu_kind(self.act if hasattr(self, "act") else self.gelu)
        plain = is_plain(self.c_fc) and is_plain(self.c_proj) and kind is not None and supported(x)
        if not plain:
            y = super().forward(x)  # type: ignore[misc]
            return y if residual is None else residual + y
        if residual is not None:
            residual = residual.to(torch.promote_types(compute_dtype(x), residual.dtype))
        # Optimizers here may write through param.data, which leaves no trace: no copy of a weight is kept.
        options = {} if self.ops is EAGER else {"keep_copy": False}
        return self.ops.mlp(
            x, weight_of(self.c_fc), self.c_fc.bias, weight_of(self.c_proj), self.c_proj.bias,
            residual=residual, dropout_p=self.dropout.p if self.training else 0.0, approximate=kind, **options,
        )  # fmt: skip


def is_plain(module: nn.Module) -> bool:
    """An nn.Linear or Conv1D as they come: no subclass (LoRA, quantised), no hook that has to see its input."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in vars(module)
    return (type(module) is nn.Linear or type(module).__name__ == "Conv1D") and not hooks


def weight_of(module: Any) -> Tensor:
    """The weight as (out, in): a view."""
    return module.weight if isinstance(module, nn.Linear) else module.weight.t()
