"""The launch configs that each kernel may get, and the shape buckets that tables are keyed by.

A config is a dict of integers: what the kernel file's launcher passes on. A space is the list of all configs that are
compared for a kernel; a table with any other config is foreign. Buckets are coarse on purpose: a bucket is one config,
so a new batch size or sequence length compiles a kernel at most once per bucket.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch

Config = dict[str, int]
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
ROW_BOUNDS = (2**14, 2**16, 2**18, 2**20)
"""Upper ends of attention's buckets: B x heads x T. GPT-2 124M at 8 x 1024 has 98,304."""


def attention_bucket(D: int, rows: int, *, plain: bool, dropout: bool) -> str | None:
    """Bucket of causal attention with ``rows`` = B x heads x T and at most dropout for an option; None for all else."""
    if D != 64 or not plain:
        return None
    bound = next((f"<={bound}" for bound in ROW_BOUNDS if rows <= bound), f">{ROW_BOUNDS[-1]}")
    return f"D{D}{' dropout' if dropout else ''} rows{bound}"


def layer_norm_bucket(C: int) -> str:
    """Whatever the number of rows: a new batch size compiles nothing."""
    return f"C{C}"


def cross_entropy_bucket(V: int, logit_softcap: float | None) -> str | None:
    return "V>=8192" if V >= 8192 and logit_softcap is None else None


ADAMW_BUCKET = "any"


def brief(config: Config) -> str:
    """``128x128x64 w8 s3 chunk=2``, or ``BLOCK_M=128 BLOCK_N=32 w8 s3``; ``cuBLAS``."""
    values = dict(config)
    if values == CUBLAS:
        return "cuBLAS"
    blocks = [str(values.pop(key)) for key in ("block_m", "block_n", "block_k") if key in values]
    values.pop("group", None)
    short = {"num_warps": "w", "num_stages": "s"}
    words = [f"{short.get(key, key + '=')}{value}" for key, value in values.items()]
    return " ".join((["x".join(blocks)] if blocks else []) + words)


FEWEST_TOKENS = 2048
"""Of a matmul that tables know of: a micro-batch of GPT-2 350M on 12 GB has as many."""


def linear_bucket(N: int, K: int, tokens: int) -> str | None:
    """Bucket of a linear layer's matmul: (tokens, K) by (K, N), or the gradient (N, K) of a weight. Exact in N and K, which
    a model has few of; any number of tokens from FEWEST_TOKENS on, so that a new batch size compiles nothing."""
    return f"N{N} K{K}" if tokens >= FEWEST_TOKENS else None


CUBLAS: Config = {"cublas": 1}
"""The config of a matmul that cuBLAS computes, what follows it being a sweep of memory of its own."""


def has_library(kernel: str) -> bool:
    """Whether ``kernel`` has a rival in a library, which stands until a measurement on such a card says otherwise."""
    return kernel.startswith("linear.")


# ---------------------------------------------------------------- spaces


def _attention(owned: str, walked: str, shapes: tuple[tuple[int, int], ...], stages: tuple[int, ...]) -> list[Config]:
    """(rows of the side that a program owns, warps) x (rows of the other side) x stages; 8 warps on 128 queries also in
    128 registers, so that two blocks fit an SM."""
    found = []
    for (own, warps), walk, stage in product(shapes, (16, 32, 64), stages):
        base = {owned: own, walked: walk, "num_warps": warps, "num_stages": stage}
        found.append(base)
        if warps == 8 and owned == "BLOCK_M":
            found.append({**base, "maxnreg": 128})
    return found


def _layer_norm_forward() -> list[Config]:
    return [{"rows": rows, "num_warps": warps} for rows, warps in product((1, 2, 4, 8, 16), (2, 4, 8))]


def _layer_norm_backward() -> list[Config]:
    axes = product((1, 2, 4, 8), (4, 8, 16), (1, 2, 3, 4, 6), (1, 2))
    names = ("rows", "num_warps", "programs_per_sm", "num_stages")
    return [dict(zip(names, values)) for values in axes]


def _cross_entropy_rows() -> list[Config]:
    return [{"tile": tile, "num_warps": warps} for tile, warps in product((2048, 4096, 8192), (4, 8, 16))]


def _adamw() -> list[Config]:
    # 4 elements a thread: with more, triton passes every store through shared memory to keep it coalesced.
    return [
        {"BLOCK": 128 * warps, "CHUNK": chunk, "num_warps": warps}
        for warps, chunk in product((4, 8, 16), (4096, 8192, 16384, 32768))
    ]


CHUNK_LIMITS = {"linear": 128, "weight_grad": 64}
"""Most products that may be summed in fp16 where results are stored in 16 bits, and in weight gradients, stored in fp32:
docs/precision-modes.md has the errors. In no table is there a config beyond."""
_TILES = ((128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8), (256, 128, 16), (128, 64, 4))
_DEPTHS = ((32, 3), (32, 4), (32, 5), (64, 3), (64, 4))
SPLITS = (1, 2, 3, 4, 5, 6, 7, 8)


def _linear(kind: str, *, fast: bool) -> list[Config]:
    """Tiles of C and warps, x depth of a block of K and stages, x products to a sum in fp16 (``fast``), x ways to split the
    tokens of a weight gradient; and cuBLAS, which has no sums in fp16 by chunks."""
    grad = kind.startswith("weight_grad")
    limit = CHUNK_LIMITS["weight_grad" if grad else "linear"]
    found = [] if fast else [CUBLAS]
    for (m, n, warps), (k, stages) in product(_TILES, _DEPTHS):
        base = {"block_m": m, "block_n": n, "block_k": k, "group": 8, "num_warps": warps, "num_stages": stages}
        chunks = [{"chunk": products // k} for products in (64, 128) if products <= limit] if fast else [{}]
        ways = [{"splits": splits} for splits in SPLITS] if grad else [{}]
        found += [{**base, **chunk, **split} for chunk, split in product(chunks, ways)]
    return found


LINEAR_KINDS = ("none", "bias", "residual", "gelu", "dgelu", "weight_grad", "weight_grad_bias")
"""What follows a matmul (in "dgelu": precedes the next), or which gradient of a weight it is. "none" and "bias" stay with
cuBLAS, which adds a bias itself, unless sums are in fp16."""


def _linears() -> dict[str, list[Config]]:
    found = {f"linear.{kind}": _linear(kind, fast=False) for kind in LINEAR_KINDS[2:]}
    return found | {f"linear_fast.{kind}": _linear(kind, fast=True) for kind in LINEAR_KINDS}


@lru_cache(maxsize=1)
def spaces() -> dict[str, list[Config]]:
    """Every config of every kernel, by the kernel's name in the tables."""
    return {
        "attention.forward": _attention("BLOCK_M", "BLOCK_N", ((64, 4), (128, 4), (128, 8)), (2, 3)),
        "attention.backward_q": _attention("BLOCK_M", "BLOCK_N", ((64, 4), (128, 4), (128, 8)), (1, 2)),
        "attention.backward_kv": _attention(
            "BLOCK_N", "BLOCK_M", ((32, 4), (32, 8), (64, 4), (64, 8), (128, 8)), (2, 3)
        ),
        "layer_norm.forward": _layer_norm_forward(),
        "layer_norm.backward": _layer_norm_backward(),
        "cross_entropy.rows": _cross_entropy_rows(),
        "adamw.update": _adamw(),
        **_linears(),
    }


def contains(kernel: str, config: object) -> bool:
    """Whether ``config`` is one of ``kernel``'s, with integers for values."""
    if not isinstance(config, dict) or not all(type(value) is int for value in config.values()):
        return False
    return config in spaces().get(kernel, [])


def sensible(kernel: str, bucket: str, config: Config) -> bool:
    """Whether a config is worth compiling for a bucket. Layer norm: 8 to 32 elements of a tile to a thread in forward, 4
    to 16 in backward, which keeps two accumulators."""
    if not kernel.startswith("layer_norm"):
        return True
    C = int(bucket[1:])
    block = max(16, 1 << (C - 1).bit_length())
    each = config["rows"] * block / (32 * config["num_warps"])
    return 8 <= each <= 32 if kernel == "layer_norm.forward" else 4 <= each <= 16
