"""The launches that training and sampling a GPT make: every kernel, in every shipped launch config.

``cases()`` lists (name, callable). Each callable runs one public operation forward and backward on CPU tensors; inside
``offline.capture_launches`` its launches only compile. Tensors are then nothing but pointers, strides and dtypes
(``torch.empty``, pages never touched), so shapes that decide a launch config are real ones; only sizes that plain
PyTorch has to compute with inside an operation (the GEMMs of the loss) are kept small.

What is varied is what makes another binary or another config: dtype, head dimension, width, and the options that are
compiled in. The heaviest combination of options comes for every head dimension: that is the one that spills first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

Case = tuple[str, Callable[[], None]]

HEAD_DIMS = (32, 64, 80, 96, 128, 256)
WIDTHS = (384, 768, 1024, 1600, 4096, 16384)
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
BF16, FP16, FP32 = SHORT


def cases() -> list[Case]:
    return [
        *embedding_cases(), *attention_cases(), *layer_norm_cases(), *cross_entropy_cases(), *linear_cases(),
        *fp8_cases(), *adamw_cases(),
    ]  # fmt: skip


def backward(outputs: Tensor | tuple[Tensor, ...]) -> None:
    """A backward pass with contiguous upstream gradients, as autograd hands them over within a model."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


# ---------------------------------------------------------------- embedding


def launch_embedding(
    dtype: torch.dtype,
    C: int = 768,
    *,
    idx: torch.dtype = torch.int64,
    T: int = 64,
    in_place: bool = False,
    **options: Any,
) -> None:
    from fastgpt.kernels.fused_embedding import embedding
    from fastgpt.kernels.fused_linear import gradients_in_place

    tables = [torch.nn.Parameter(torch.empty(rows, C, dtype=dtype)) for rows in (256, 64)]
    if in_place:
        for table in tables:
            table.grad = torch.empty_like(table)
    with gradients_in_place() if in_place else nullcontext():
        backward(embedding(torch.zeros(2, T, dtype=idx), *tables, **options))


def embedding_cases() -> Iterator[Case]:
    for C in (384, 768, 1600):
        yield f"embedding C{C}", partial(launch_embedding, FP32, C)
    yield "embedding C384 in place dropout", partial(launch_embedding, FP32, 384, in_place=True, dropout_p=0.1)
    yield "embedding C768 in place", partial(launch_embedding, FP32, in_place=True)
    yield "embedding bf16 C768 dropout", partial(launch_embedding, BF16, dropout_p=0.1)
    yield "embedding fp16 C99 int32", partial(launch_embedding, FP16, 99, idx=torch.int32)
    yield "embedding C768 bf16 stream, odd T", partial(launch_embedding, FP32, T=33, out_dtype=BF16)


# ---------------------------------------------------------------- attention


def launch_attention(
    dtype: torch.dtype,
    D: int,
    T: int = 1024,
    H: int = 2,
    kv: int = 2,
    docs: bool = False,
    **options: Any,
) -> None:
    from fastgpt.kernels.fused_attn import qkv_attention

    qkv = leaf(1, T, (H + 2 * kv) * D, dtype=dtype)
    doc_ids = torch.empty(1, T, dtype=torch.int32) if docs else None
    backward(qkv_attention(qkv, H, n_kv_head=kv, doc_ids=doc_ids, **options))


def launch_decode(dtype: torch.dtype, D: int, T_q: int, **options: Any) -> None:
    """Sampling with a preallocated cache: T_q new tokens against up to 1024 keys, no backward."""
    from fastgpt.kernels.fused_attn import attention

    q = torch.empty(1, T_q, 2, D, dtype=dtype)
    k, v = torch.empty(2, 1, 1024, 2, D, dtype=dtype)
    with torch.no_grad():
        attention(q, k, v, kv_len=torch.empty(1, dtype=torch.int32), **options)


def attention_cases() -> Iterator[Case]:
    everything: dict[str, Any] = {"docs": True, "dropout_p": 0.1, "window": 256}
    for D in HEAD_DIMS:
        yield f"attention bf16 D{D}", partial(launch_attention, BF16, D)
        yield f"attention bf16 D{D} all options", partial(launch_attention, BF16, D, H=4, **everything)
    for D in (64, 128, 256):
        yield f"attention fp16 D{D}", partial(launch_attention, FP16, D)
        yield f"attention fp32 D{D}", partial(launch_attention, FP32, D)
        yield f"attention bf16 D{D} decode", partial(launch_decode, BF16, D, 1)
    yield "attention bf16 D64 short", partial(launch_attention, BF16, 64, T=64)
    yield "attention bf16 D64 T1025", partial(launch_attention, BF16, 64, T=1025)
    yield "attention bf16 D64 not causal", partial(launch_attention, BF16, 64, causal=False)
    yield "attention bf16 D64 dropout", partial(launch_attention, BF16, 64, dropout_p=0.1)
    yield "attention bf16 D64 documents", partial(launch_attention, BF16, 64, docs=True)
    yield "attention bf16 D64 window", partial(launch_attention, BF16, 64, window=256)
    yield "attention bf16 D64 grouped queries", partial(launch_attention, BF16, 64, H=4)
    yield "attention bf16 D64 prefill", partial(launch_decode, BF16, 64, 256)
    yield "attention fp32 D64 dropout", partial(launch_attention, FP32, 64, dropout_p=0.1)
    fast: dict[str, Any] = {"accumulate": "fp16"}
    for D in HEAD_DIMS:
        yield f"attention fp16-fast D{D}", partial(launch_attention, FP16, D, **fast)
    for D in (64, 128, 256):
        yield f"attention fp16-fast D{D} all options", partial(launch_attention, FP16, D, H=4, **everything, **fast)
    yield "attention fp16-fast D64 dropout", partial(launch_attention, FP16, 64, dropout_p=0.1, **fast)
    yield "attention fp16-fast D64 documents", partial(launch_attention, FP16, 64, docs=True, **fast)
    yield "attention fp16-fast D64 window", partial(launch_attention, FP16, 64, window=256, **fast)
    yield "attention fp16-fast D64 grouped queries", partial(launch_attention, FP16, 64, H=4, **fast)
    yield "attention fp16-fast D64 decode", partial(launch_decode, FP16, 64, 1, **fast)


# ---------------------------------------------------------------- layer norm


def launch_norm(
    C: int,
    x: torch.dtype,
    residual: torch.dtype | None = None,
    weight: torch.dtype = FP32,
    bias: bool = False,
    rows: int = 8192,
    **options: Any,
) -> None:
    from fastgpt.kernels.fused_layernorm import layer_norm

    rows = min(rows, 2**23 // C)  # the host code may touch its outputs
    branch = leaf(rows, C, dtype=x)
    stream = None if residual is None else leaf(rows, C, dtype=residual)
    shift = leaf(C, dtype=weight) if bias else None
    backward(layer_norm(branch, leaf(C, dtype=weight), shift, residual=stream, **options))


def layer_norm_cases() -> Iterator[Case]:
    for C in WIDTHS:
        # A block's norms under bf16 autocast: bf16 branch, fp32 residual stream, bf16 output.
        yield f"layer_norm C{C}", partial(launch_norm, C, BF16, FP32, out_dtype=BF16)
        yield (
            f"layer_norm C{C} all options",
            partial(launch_norm, C, BF16, FP32, bias=True, out_dtype=BF16, dropout_p=0.1),
        )
    for dtype, name in SHORT.items():
        yield f"layer_norm {name} C768", partial(launch_norm, 768, dtype, bias=True)
        yield f"layer_norm {name} C768 residual", partial(launch_norm, 768, dtype, dtype, dtype, bias=True)
    # The embedding's sum under autocast, before the first block has anything to add.
    yield "layer_norm C768 first", partial(launch_norm, 768, FP32, out_dtype=BF16)
    yield "layer_norm fp32 C16384 residual", partial(launch_norm, 16384, FP32, FP32, bias=True)


# ---------------------------------------------------------------- linear + cross-entropy


def launch_loss(
    dtype: torch.dtype, V: int = 50304, C: int = 32, N: int = 256, bias: bool = False, **options: Any
) -> None:
    from fastgpt.kernels.fused_cross_entropy import linear_cross_entropy

    x, weight = torch.zeros(N, C, dtype=dtype, requires_grad=True), torch.zeros(V, C, dtype=dtype, requires_grad=True)
    shift = torch.zeros(V, dtype=dtype, requires_grad=True) if bias else None
    backward(linear_cross_entropy(x, weight, torch.zeros(N, dtype=torch.int64), bias=shift, **options))


def cross_entropy_cases() -> Iterator[Case]:
    everything: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-4, "logit_softcap": 30.0}
    for dtype, name in SHORT.items():
        yield f"linear_cross_entropy {name}", partial(launch_loss, dtype)
    yield "linear_cross_entropy bf16 padded", partial(launch_loss, BF16, vocab_size=50257)
    yield "linear_cross_entropy bf16 all options", partial(launch_loss, BF16, bias=True, vocab_size=50257, **everything)
    yield "linear_cross_entropy bf16 none", partial(launch_loss, BF16, reduction="none", **everything)
    yield "linear_cross_entropy fp32 bytes", partial(launch_loss, FP32, V=256)
    fast: dict[str, Any] = {"accumulate": "fp16"}
    yield "linear_cross_entropy fp16-fast", partial(launch_loss, FP16, **fast)
    yield "linear_cross_entropy fp16-fast odd", partial(launch_loss, FP16, V=50257, bias=True, **everything, **fast)
    yield "linear_cross_entropy fp16-fast none", partial(launch_loss, FP16, reduction="none", **fast)


# ---------------------------------------------------------------- linear layers


def launch_mlp(
    dtype: torch.dtype,
    *,
    C: int = 128,
    rows: int = 2048,
    bias: bool = True,
    conv1d: bool = False,
    stream: torch.dtype | None = None,
    in_place: bool = False,
    **options: Any,
) -> None:
    """An MLP with fp32 masters. Few columns, as PyTorch computes what is cuBLAS's; the tokens are enough to be split."""
    from fastgpt.kernels.fused_linear import gradients_in_place, mlp

    def weight(out: int, into: int) -> Tensor:
        return leaf(into, out, dtype=FP32).t() if conv1d else torch.nn.Parameter(torch.zeros(out, into))

    w_fc, w_proj = weight(2 * C, C), weight(C, 2 * C)
    b_fc, b_proj = (leaf(size, dtype=FP32) if bias else None for size in (2 * C, C))
    residual = None if stream is None else leaf(rows, C, dtype=stream)
    if in_place:
        w_fc.grad, w_proj.grad = torch.zeros(2 * C, C), torch.zeros(C, 2 * C)
    with gradients_in_place() if in_place else nullcontext():
        backward(mlp(leaf(rows, C, dtype=dtype), w_fc, b_fc, w_proj, b_proj, residual=residual, **options))


def launch_gelu(dtype: torch.dtype, **options: Any) -> None:
    from fastgpt.kernels.fused_linear import linear_gelu

    backward(linear_gelu(leaf(256, 128, dtype=dtype), leaf(256, 128, dtype=FP32), leaf(256, dtype=FP32), **options))


def launch_one_column() -> None:
    """A weight and a bias of one row, whose sizes triton takes for constants."""
    from fastgpt.kernels.fused_linear import linear

    weight, bias = leaf(1, 16, dtype=FP32), leaf(1, dtype=FP32)
    backward(linear(leaf(2049, 16, dtype=FP16), weight, bias, dropout_p=0.1, accumulate="fp16"))


def linear_cases() -> Iterator[Case]:
    everything: dict[str, Any] = {"stream": FP32, "dropout_p": 0.1, "approximate": "none"}
    for dtype, name in ((BF16, "bf16"), (FP16, "fp16")):
        yield f"linear {name} mlp", partial(launch_mlp, dtype, bias=False)
        yield f"linear {name} mlp bias", partial(launch_mlp, dtype)
        yield f"linear {name} mlp conv1d all options", partial(launch_mlp, dtype, conv1d=True, **everything)
        yield f"linear {name} mlp odd", partial(launch_mlp, dtype, C=99, rows=1999, **everything)
        yield f"linear {name} gelu alone", partial(launch_gelu, dtype, approximate="none")
    yield "linear bf16 mlp in place", partial(launch_mlp, BF16, rows=512, in_place=True)
    fast: dict[str, Any] = {"accumulate": "fp16"}
    yield "linear fp16-fast mlp", partial(launch_mlp, FP16, bias=False, in_place=True, **fast)
    yield "linear fp16-fast mlp bias", partial(launch_mlp, FP16, stream=FP32, **fast)
    yield "linear fp16-fast mlp conv1d all options", partial(launch_mlp, FP16, conv1d=True, **everything, **fast)
    yield "linear fp16-fast one column", launch_one_column
    yield "linear fp16-fast mlp odd", partial(launch_mlp, FP16, C=99, rows=1999, in_place=True, **everything, **fast)


# ---------------------------------------------------------------- linear layers in fp8


def has_fp8() -> bool:
    """Elsewhere triton does not compile these kernels, and a run never gets to them."""
    import triton

    return triton.runtime.driver.active.get_current_target().arch >= 89


def launch_fp8(C: int, *, bias: bool = False, dropout_p: float = 0.0, approximate: str = "tanh") -> None:
    """Norm, MLP, norm, linear, as in a block."""
    from fastgpt.kernels.fused_fp8 import layer_norm, linear, mlp

    if not has_fp8():
        return

    def weight(*shape: int) -> Tensor:
        return torch.nn.Parameter(torch.zeros(shape))

    def shift(size: int) -> Tensor | None:
        return leaf(size, dtype=FP32) if bias else None

    norm: dict[str, Any] = {"dropout_p": dropout_p, "out_dtype": BF16}
    branch, stream = leaf(256, C, dtype=BF16), leaf(256, C, dtype=FP32)
    h, stream = layer_norm(branch, weight(C), shift(C), residual=stream, **norm)
    y = mlp(h, weight(2 * C, C), shift(2 * C), weight(C, 2 * C), shift(C), approximate=approximate)
    h, stream = layer_norm(y, weight(C), shift(C), residual=stream, **norm)
    backward((linear(h, weight(48, C), shift(48)), stream))


def launch_fp8_sweep(erf: bool, bias: bool) -> None:
    """What follows torch._scaled_mm, which some of torch's CPU backends do not have: forward and backward."""
    from fastgpt.kernels import _fp8_launch as launch

    if not has_fp8():
        return
    z, stats, limit = torch.empty(256, 768, dtype=BF16), torch.empty(2, 256), torch.empty(())
    for dy, dtype, shift in ((None, launch.FORWARD, limit if bias else None), (z, launch.GRADIENT, None)):
        q = launch.new(z.shape, dtype, z.device)
        sums = torch.empty(768) if bias and dy is not None else None
        launch.sweep(z, dy, torch.empty_like(z), q, (q.values, q.scale, stats[1], limit, shift), erf, sums)


def launch_fp8_attention(D: int, T: int = 1024, H: int = 2, kv: int = 2, docs: bool = False, **options: Any) -> None:
    """A block's attention between its two linears: what they read in fp8 is written by attention, forward and backward."""
    from fastgpt.kernels.fused_fp8 import linear, qkv_attention

    if not has_fp8():
        return
    doc_ids = torch.empty(1, T, dtype=torch.int32) if docs else None
    qkv = linear(leaf(1, T, 256, dtype=BF16), torch.nn.Parameter(torch.zeros((H + 2 * kv) * D, 256)))
    y = qkv_attention(qkv, H, n_kv_head=kv, doc_ids=doc_ids, **options)
    backward(linear(y, torch.nn.Parameter(torch.zeros(128, H * D)), leaf(128, dtype=FP32)))


def fp8_cases() -> Iterator[Case]:
    for C in (384, 768, 1024, 1600):
        yield f"fp8 C{C}", partial(launch_fp8, C)
    everything: dict[str, Any] = {"bias": True, "dropout_p": 0.1, "approximate": "none"}
    for C in (48, 768, 1024, 1600, 4096):
        yield f"fp8 C{C} all options", partial(launch_fp8, C, **everything)
    yield "fp8 C768 bias", partial(launch_fp8, 768, bias=True)
    for D in (32, 64, 96, 128, 256):
        yield f"fp8 attention D{D}", partial(launch_fp8_attention, D)
        yield (
            f"fp8 attention D{D} all options",
            partial(launch_fp8_attention, D, H=4, docs=True, dropout_p=0.1, window=256),
        )
    yield "fp8 attention D64 dropout", partial(launch_fp8_attention, 64, dropout_p=0.1)
    yield "fp8 attention D64 documents", partial(launch_fp8_attention, 64, docs=True)
    yield "fp8 attention D64 grouped queries", partial(launch_fp8_attention, 64, H=4)
    yield "fp8 sweep", partial(launch_fp8_sweep, False, False)
    yield "fp8 sweep all options", partial(launch_fp8_sweep, True, True)


# ---------------------------------------------------------------- AdamW


def launch_adamw(
    dtype: torch.dtype,
    *,
    max_grad_norm: float | None = 1.0,
    copy: torch.dtype | None = None,
    offset: int = 0,
    scaled: bool = False,
) -> None:
    """A step over a few tensors: with a working copy, ``offset`` elements off alignment, or under a GradScaler."""
    from fastgpt.kernels.working_copy import working_copy
    from fastgpt.optim import FusedAdamW

    shapes = ((768, 768), (768,), (50, 768), (3,))
    params = [torch.nn.Parameter(_zeros(shape, dtype, offset)) for shape in shapes]
    for p in params:
        p.grad = _zeros(p.shape, dtype, offset)
        if copy is not None:
            working_copy(p, copy)
    optimizer = FusedAdamW(params, max_grad_norm=max_grad_norm)
    if scaled:  # as torch.amp.GradScaler hands them over
        optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
    optimizer.step()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> Tensor:
    return torch.zeros(offset + math.prod(shape), dtype=dtype)[offset:].view(shape)


def adamw_cases() -> Iterator[Case]:
    for dtype, name in SHORT.items():
        yield f"adamw {name}", partial(launch_adamw, dtype)
    yield "adamw fp32 bf16 copy", partial(launch_adamw, FP32, copy=BF16)
    yield "adamw fp32 unaligned", partial(launch_adamw, FP32, offset=1)
    yield "adamw fp32 scaled", partial(launch_adamw, FP32, scaled=True)
    yield "adamw fp32 no clip", partial(launch_adamw, FP32, max_grad_norm=None)
