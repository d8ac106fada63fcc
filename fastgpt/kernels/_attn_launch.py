"""How the kernels of fused_attn.py are run: in which blocks, with what arguments. q, k, v (B, T, heads, D), any strides."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor

from fastgpt.kernels import _attn_kernels as kernels
from fastgpt.kernels import runtime, tuning

MAX_HEAD_DIM = 256
LOG2E = math.log2(math.e)
DECODING = 16
"""Queries up to which a forward pass is taken for sampling's."""


ROW_BOUNDS = (2**14, 2**16, 2**18, 2**20)
"""Upper ends of the tuning tables' buckets: B x heads x T. GPT-2 124M at 8 x 1024 has 98,304."""


def attention_bucket(D: int, rows: int, *, plain: bool, dropout: bool) -> str | None:
    """Bucket of causal attention with ``rows`` = B x heads x T and no option but dropout; None for everything else."""
    if D != 64 or not plain:
        return None
    bound = next((f"<={bound}" for bound in ROW_BOUNDS if rows <= bound), f">{ROW_BOUNDS[-1]}")
    return f"D{D}{' dropout' if dropout else ''} rows{bound}"


def _space(
    owned: str, walked: str, shapes: tuple[tuple[int, int], ...], stages: tuple[int, ...]
) -> list[tuning.Config]:
    """(rows of the side that a program owns, warps) x (rows of the other side) x stages; 8 warps on 128 queries also in
    128 registers, so that two blocks fit an SM."""
    found = []
    for (own, warps), walk, stage in product(shapes, (16, 32, 64), stages):
        base = {owned: own, walked: walk, "num_warps": warps, "num_stages": stage}
        found.append(base)
        if warps == 8 and owned == "BLOCK_M":
            found.append({**base, "maxnreg": 128})
    return found


_QUERIES = ((64, 4), (128, 4), (128, 8))
_KEYS = ((32, 4), (32, 8), (64, 4), (64, 8), (128, 8))
tuning.space("attention.forward", _space("BLOCK_M", "BLOCK_N", _QUERIES, (2, 3)))
tuning.space("attention.backward_q", _space("BLOCK_M", "BLOCK_N", _QUERIES, (1, 2)))
tuning.space("attention.backward_kv", _space("BLOCK_N", "BLOCK_M", _KEYS, (2, 3)))


# (BLOCK_M, BLOCK_N, num_warps, num_stages) by padded head dimension. A tensor-core dot holds all of its second operand in
# registers, hence the short second sides.
_HALF = {
    "forward": {64: (128, 32, 8, 3), 128: (64, 32, 4, 2), 256: (64, 32, 8, 2)},
    "backward_q": {64: (128, 32, 8, 2), 128: (128, 32, 8, 2), 256: (64, 16, 8, 2)},
    "backward_kv": {64: (32, 64, 4, 3), 128: (32, 64, 8, 2), 256: (32, 32, 8, 1)},
}
# Instead of the above where options take registers: anything but plain causal attention without groups.
_HALF_OPTIONS = {
    ("forward", 64): (64, 32, 4, 3),
    ("backward_q", 256): (32, 16, 4, 1),
    ("backward_kv", 64): (32, 32, 8, 2),
    ("backward_kv", 128): (32, 32, 8, 2),
}
_FLOAT = {
    "forward": {64: (32, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1)},
    "backward_q": {64: (16, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1)},
    "backward_kv": {64: (16, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1)},
}

# By compute capability, kernel, whether fp32, padded head dimension, dropout: where the above spills on one architecture.
_CORRECTIONS: dict[tuple, dict[str, int]] = {
    (120, "backward_q", False, 64, False): {"num_stages": 1},  # a load in flight would not fit 128 registers
    (80, "forward", True, 256, False): {"maxnreg": 255},  # ptxas would stop at 168, for a third block per SM
    (80, "backward_q", True, 64, True): {"BLOCK_N": 16},
    (80, "backward_kv", True, 64, True): {"BLOCK_N": 16},
    (90, "backward_q", True, 64, False): {"BLOCK_N": 16},
    (90, "backward_kv", True, 256, False): {"num_stages": 2},
}
# The same without "fp32", where results are written in fp8 too.
_FP8_CORRECTIONS: dict[tuple, dict[str, int]] = {
    (120, "backward_q", 64, False): {"BLOCK_N": 16},
    (89, "backward_q", 256, True): {"maxnreg": 255},  # triton 3.6's ptxas would stop at 168, for a third block per SM
}


def config(
    kernel: str,
    dtype: torch.dtype,
    D: int,
    T_own: int,
    *,
    dropout: bool = False,
    plain: bool = True,
    fp16_sums: bool = False,
    fp8: bool = False,
    arch: int | None = None,
) -> dict[str, int]:
    """Launch parameters of ``kernel`` ("forward", "backward_q", "backward_kv") for head dimension D that are safe on any
    card; ``T_own`` is the length of the side that its programs own, ``plain`` is causal attention with no option and no
    groups. ``_choice`` asks the tuning tables first.

    Chosen by compiling: no spills on sm_80 to sm_120, at most 101,376 bytes of shared memory. ``maxnreg`` makes room for
    two blocks of 8 warps per SM in the kernels that fit 128 registers."""
    if runtime.INTERPRET:  # a block operation costs the same whatever its size
        block = 64 if T_own <= 256 or fp16_sums else 128
        return {"BLOCK_M": block, "BLOCK_N": block}
    width = max(64, _block_d(D))
    if dtype == torch.float32:
        block_m, block_n, warps, stages = _FLOAT[kernel][width]
    else:
        tile = _HALF[kernel][width]
        block_m, block_n, warps, stages = tile if plain else _HALF_OPTIONS.get((kernel, width), tile)
        if kernel == "forward" and T_own <= DECODING:
            block_m, block_n, warps, stages = 16, 32, 4, 2
        elif dropout and kernel == "backward_kv" and width == 64:
            # 8 warps would have 4 warps' products to share, and compute them twice.
            block_m, block_n, warps, stages = 32, 32, 4, 2
        elif dropout:  # Philox needs registers
            block_m, block_n = (16, block_n) if kernel == "backward_kv" else (block_m, 16)
        elif fp16_sums and not plain and kernel == "backward_kv" and _block_d(D) == 64:
            stages = 1  # a load in flight would spill on sm_120
    options = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
    if dtype != torch.float32 and plain and width == 64 and warps == 8:
        options["maxnreg"] = 128
    options |= _CORRECTIONS.get((arch, kernel, dtype == torch.float32, width, dropout), {})
    return options | (_FP8_CORRECTIONS.get((arch, kernel, width, dropout), {}) if fp8 else {})


def _block_d(D: int) -> int:
    return max(16, triton.next_power_of_2(D))


# ---- Launchers ------------------------------------------------------------------------------------------------------


def _common(
    q: Tensor,
    k: Tensor,
    docs: Tensor | None,
    kv_len: Tensor | None,
    seed: Tensor | None,
    window: int | None,
    dropout_p: float,
    causal: bool,
    fp16: bool,
) -> dict[str, Any]:
    """Arguments that all three kernels take alike."""
    return {
        "kv_len": None if kv_len is None else kv_len.contiguous(),
        "docs": None if docs is None else docs.contiguous(),
        "seed": seed,
        "H": q.shape[2],
        "T_q": q.shape[1],
        "T_k": k.shape[1],
        "window": window,
        "threshold": min(int(dropout_p * 2**31), 2**31 - 1),
        "inv_keep": 1.0 / (1.0 - dropout_p) if dropout_p < 1 else 0.0,
        "D": q.shape[3],
        "GROUP": q.shape[2] // k.shape[2],
        "CAUSAL": causal,
        "FP16_SUMS": fp16,
        "ALIGNED": causal or window is not None or docs is not None or kv_len is not None,
        "BLOCK_D": _block_d(q.shape[3]),
    }


def _strides(**tensors: Tensor) -> dict[str, tuple[int, ...]]:
    return {f"{name}_strides": tensor.stride()[:3] for name, tensor in tensors.items()}


def _choice(kernel: str, q: Tensor, heads: int, T_own: int, common: dict[str, Any], form: Any) -> tuning.Choice:
    """The config of a kernel whose programs own T_own rows of ``heads`` heads in each batch. ``form``: of fp8, or None."""
    dropout, D = common["seed"] is not None, q.shape[-1]
    options = any(common[name] is not None for name in ("docs", "kv_len", "window"))
    grouped = kernel == "backward_kv" and common["GROUP"] > 1  # adds a loop there, nothing elsewhere
    causal, fp16 = common["CAUSAL"] and not options and not grouped, common["FP16_SUMS"]
    default = config(
        kernel, q.dtype, D, T_own,
        dropout=dropout, plain=causal and not dropout, fp16_sums=fp16, fp8=form is not None,
        arch=tuning.arch_of(q.device),
    )  # fmt: skip
    rows = q.shape[0] * heads * T_own
    bucket = attention_bucket(D, rows, plain=causal and T_own > DECODING, dropout=dropout)
    # With sums in fp16 another binary, with a limit of its own to its blocks: entries for the usual one are not for it.
    return tuning.choose(f"attention{'_fast' if fp16 else ''}.{kernel}", q.dtype, bucket, q.device, default)


def launch_forward(q, k, v, out, docs, kv_len, seed, causal, scale, window, dropout_p, fp16, *, form=None) -> Tensor:
    """Write attention of q (B, T_q, H, D), k and v (B, T_k, H_kv, D) into ``out``, and in fp8 into ``form`` (the kernels'
    out_form); return lse (B, H, T_q)."""
    B, T_q, H, _ = q.shape
    lse = torch.empty((B, H, T_q), dtype=torch.float32, device=q.device)
    q, k, v = map(runtime.columns_adjacent, (q, k, v))
    common = _common(q, k, docs, kv_len, seed, window, dropout_p, causal, fp16)

    def run(options: dict[str, int]) -> None:
        kernels.forward[(triton.cdiv(T_q, options["BLOCK_M"]) * B * H,)](
            q, k, v, out, form, lse, c=abs(scale) * LOG2E, FLIP=scale < 0,
            **_strides(q=q, k=k, v=v, out=out), **common, **options,
        )  # fmt: skip

    with runtime.device_guard(q):
        tuning.launch(_choice("forward", q, H, T_q, common, form), run)
    return lse


def launch_backward(
    grad_out, q, k, v, out, lse, grad_q, grad_k, grad_v, docs, kv_len, seed, causal, scale, window, dropout_p, fp16,
    *, forms=(None, None, None),
) -> None:  # fmt: skip
    """Write all of grad_q, grad_k and grad_v, and in fp8 into ``forms``."""
    B, T_q, H, _ = q.shape
    T_k, H_kv = k.shape[1:3]
    q, k, v, grad_out = map(runtime.columns_adjacent, (q, k, v, grad_out))
    delta = torch.empty_like(lse)
    common = _common(q, k, docs, kv_len, seed, window, dropout_p, causal, fp16)
    common = {"c": scale * LOG2E, "scale": scale, **common}

    def run_q(options: dict[str, int]) -> None:
        kernels.backward_q[(triton.cdiv(T_q, options["BLOCK_M"]) * B * H,)](
            q, k, v, out, grad_out, lse, delta, grad_q, forms[0],
            **_strides(q=q, k=k, v=v, out=out, grad_out=grad_out, grad_q=grad_q), **common, **options,
        )  # fmt: skip

    def run_kv(options: dict[str, int]) -> None:
        kernels.backward_kv[(triton.cdiv(T_k, options["BLOCK_N"]) * B * H_kv,)](
            q, k, v, grad_out, lse, delta, grad_k, grad_v, *forms[1:],
            **_strides(q=q, k=k, v=v, grad_out=grad_out, grad_k=grad_k, grad_v=grad_v), **common, **options,
        )  # fmt: skip

    with runtime.device_guard(q):
        tuning.launch(_choice("backward_q", q, H, T_q, common, forms[0]), run_q)
        tuning.launch(_choice("backward_kv", q, H_kv, T_k, common, forms[1]), run_kv)
