"""One file per fused operation. Importing this touches no GPU, and triton only with the first kernel asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastgpt.kernels import runtime

if runtime.INTERPRET:
    from fastgpt.kernels import interpreter

    interpreter.install()

if TYPE_CHECKING:  # what __getattr__ finds, for editors and type checkers
    from fastgpt.kernels.fused_attn import attention, qkv_attention
    from fastgpt.kernels.fused_cross_entropy import linear_cross_entropy
    from fastgpt.kernels.fused_embedding import embedding
    from fastgpt.kernels.fused_layernorm import layer_norm
    from fastgpt.kernels.fused_linear import linear, linear_gelu, linear_relu2, mlp
    from fastgpt.kernels.fused_qk_rope import qk_norm_rope
    from fastgpt.kernels.fused_rmsnorm import rms_norm

_PUBLIC = {
    "attention": "fused_attn",
    "qk_norm_rope": "fused_qk_rope",
    "qkv_attention": "fused_attn",
    "embedding": "fused_embedding",
    "layer_norm": "fused_layernorm",
    "linear": "fused_linear",
    "linear_cross_entropy": "fused_cross_entropy",
    "linear_gelu": "fused_linear",
    "linear_relu2": "fused_linear",
    "mlp": "fused_linear",
    "rms_norm": "fused_rmsnorm",
}
__all__ = [
    "attention",
    "embedding",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_gelu",
    "linear_relu2",
    "mlp",
    "qk_norm_rope",
    "qkv_attention",
    "rms_norm",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"fastgpt.kernels.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'fastgpt.kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
