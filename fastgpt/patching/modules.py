"""What nanoGPT's and Hugging Face's blocks have in common: layer norms, the MLP, and the order in which they are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.kernels.arguments import DTYPES, MAX_WIDTH
from fastgpt.kernels.runtime import compute_dtype
from fastgpt.ops import EAGER, Ops
from fastgpt.patching.swap import Fused, is_fused


def missing_in(model: nn.Module, names: Sequence[str], inner: Sequence[str]) -> str | None:
    """The first of these modules that ``model`` has not, or None; ``inner``: those that each block has. What they compute is
    tried out later."""
    has = dict(model.named_modules(remove_duplicate=False))  # not getattr, which wrappers pass on to what they wrap
    blocks = [name for name in has if name.startswith("transformer.h.") and name.count(".") == 2]
    wanted = ["lm_head", "transformer.wte", *names, "transformer.h.0"]
    wanted += [f"{block}.{part}" for block in blocks for part in inner]
    return next((name for name in wanted if name not in has), None)


def supported(x: Tensor) -> bool:
    """Whether the kernels accept this tensor. For any other, the model's own forward runs."""
    return x.dtype in DTYPES and x.numel() > 0 and x.shape[-1] <= MAX_WIDTH


class FusedLayerNorm(Fused):
    """nn.LayerNorm, or any module with ``weight`` (C,) and ``bias`` (C,) or None. eps is 1e-5 if the module has none."""

    def forward(
        self: Any,
        x: Tensor,
        *,
        residual: Tensor | None = None,
        dropout_p: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """norm(x); with a residual (norm(s), s), where s = dropout(x) + residual has the dtype of x + residual.
        A block gives one only where ``x`` is supported. ``dtype`` is that of the norm's output (default: as in PyTorch)."""
        if not supported(x):
            return super().forward(x)  # type: ignore[misc]
        if residual is not None:
            residual = residual.to(torch.promote_types(x.dtype, residual.dtype))
        if dtype is None:  # as F.layer_norm: on CUDA, autocast computes norms in fp32
            stream = x if residual is None else residual
            dtype = torch.float32 if x.is_cuda and torch.is_autocast_enabled("cuda") else stream.dtype
        return self.ops.layer_norm(
            x, self.weight, self.bias,
            residual=residual, dropout_p=dropout_p, eps=getattr(self, "eps", 1e-5), out_dtype=dtype,
        )  # fmt: skip


def gelu_kind(activation: Any) -> str | None:
    """``approximate`` as F.gelu takes it ("tanh" or "none") if ``activation`` is a GELU, else None."""
    if isinstance(activation, nn.GELU):
        return activation.approximate
    name = type(activation).__name__  # transformers.activations; NewGELU is llm.c's and minGPT's
    if name in ("NewGELUActivation", "PytorchGELUTanh", "GELUTanh", "NewGELU"):
        return "tanh"
    return "none" if name == "GELUActivation" and getattr(activation, "act", F.gelu) is F.gelu else None


class FusedMLP(Fused):
    """c_fc -> GELU -> c_proj -> dropout. c_fc and c_proj are nn.Linear, or Conv1D, whose (in, out) weight is read as the
    strided view (out, in); its gradient arrives in the weight's own layout."""

    _fastgpt_linear: type[nn.Module] = nn.Linear
    """A class of linear layers that is plain here, beside nn.Linear."""

    def forward(self: Any, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """dropout(MLP(x)); with a residual, residual + dropout(MLP(x)) in the dtype of that sum, formed inside c_proj."""
        activation = self.activation()
        plain = all(is_plain(linear, self._fastgpt_linear) for linear in (self.c_fc, self.c_proj))
        if not plain or activation is None or not supported(x):
            y = super().forward(x)  # type: ignore[misc]
            return y if residual is None else residual + y
        if residual is not None:
            residual = residual.to(torch.promote_types(compute_dtype(x), residual.dtype))
        return self.ops.mlp(
            x, weight_of(self.c_fc), self.c_fc.bias, weight_of(self.c_proj), self.c_proj.bias,
            residual=residual, dropout_p=dropout_p(self, "dropout"), **activation, **without_copy(self.ops),
        )  # fmt: skip

    def activation(self: Any) -> dict[str, str] | None:
        """The activation as ops.mlp takes it; None for one that it has not."""
        kind = gelu_kind(self.act if hasattr(self, "act") else self.gelu)
        return None if kind is None else {"approximate": kind}


def without_copy(ops: Ops) -> dict[str, bool]:
    """Options of a linear that casts its weight at each call. The optimizer may write through param.data, which leaves no
    trace, so no 16-bit copy of a weight is kept."""
    return {} if ops is EAGER else {"keep_copy": False}


def dropout_p(module: nn.Module, name: str) -> float:
    """The probability of its dropout ``name`` in the mode that this is in; 0 if there is none."""
    dropout = getattr(module, name, None)
    return getattr(dropout, "p", 0.0) if dropout is not None and dropout.training else 0.0


def hooked(module: nn.Module) -> bool:
    """Whether something has to see what goes into the module or comes out of it."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in vars(module)


def is_plain(module: nn.Module, known: type[nn.Module] = nn.Linear) -> bool:
    """An unmodified nn.Linear or Conv1D, or a ``known`` class: no other subclass (LoRA, quantised), no hook."""
    cls = type(module)
    return (cls is nn.Linear or cls is known or cls.__name__ == "Conv1D") and not hooked(module)


def weight_of(module: Any) -> Tensor:
    """The weight as (out, in): a view."""
    return module.weight if isinstance(module, nn.Linear) else module.weight.t()


class FusedBlock(Fused):
    """x + attn(ln_1(x)), then x + mlp(ln_2(x)). The first sum, with the dropout before it, is formed inside ln_2."""

    def before_attention(self: Any, x: Tensor) -> Tensor:
        """ln_1(x), in the dtype that the matmul after it reads."""
        return self.ln_1(x, dtype=compute_dtype(x)) if is_fused(self.ln_1) else self.ln_1(x)

    def after_attention(self: Any, x: Tensor, branch: Tensor, dropout_p: float) -> Tensor:
        """The block's output from its input ``x`` and attention's output ``branch``, on which dropout is still due."""
        h, x = self.ln_2(branch, residual=x, dropout_p=dropout_p, dtype=compute_dtype(branch))
        return self.mlp(h, residual=x) if is_fused(self.mlp) and not hooked(self.mlp) else x + self.mlp(h)
