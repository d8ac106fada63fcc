"""Embedding: launch cases and timing entry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.ops.common import BF16, FP16, FP32, OURS, Case, Entry, Sizes, backward, peers, timed, total
from bench.parity import check
from fastgpt.kernels import fused_embedding, reference
from fastgpt.kernels.working_copy import gradients_in_place
from fastgpt.performance import flops


def launch_embedding(
    dtype: torch.dtype,
    C: int = 768,
    *,
    idx: torch.dtype = torch.int64,
    T: int = 64,
    in_place: bool = False,
    positions: bool = True,
    **options: Any,
) -> None:
    tables = [torch.nn.Parameter(torch.empty(rows, C, dtype=dtype)) for rows in ((256, 64) if positions else (256,))]
    if in_place:
        for table in tables:
            table.grad = torch.empty_like(table)
    with gradients_in_place() if in_place else nullcontext():
        backward(fused_embedding.embedding(torch.zeros(2, T, dtype=idx), *tables, **options))


def cases() -> Iterator[Case]:
    for C in (384, 768, 1600):
        yield f"embedding C{C}", partial(launch_embedding, FP32, C)
    yield "embedding C384 in place dropout", partial(launch_embedding, FP32, 384, in_place=True, dropout_p=0.1)
    yield "embedding C768 in place", partial(launch_embedding, FP32, in_place=True)
    yield "embedding bf16 C768 dropout", partial(launch_embedding, BF16, dropout_p=0.1)
    yield "embedding fp16 C99 int32", partial(launch_embedding, FP16, 99, idx=torch.int32)
    yield "embedding C768 bf16, no positions", partial(launch_embedding, FP32, positions=False, out_dtype=BF16)
    yield "embedding C768 in place, no positions", partial(launch_embedding, FP32, positions=False, in_place=True)
    yield "embedding C768 bf16 stream, odd T", partial(launch_embedding, FP32, T=33, out_dtype=BF16)


def embedding(size: Sizes, device: torch.device, compiled: bool) -> Entry:
    """fp32 tables and residual stream, as in every precision; the gradients dense, as autograd wants them."""

    rows, C, distinct, T = size.rows, size.C, min(size.V, size.rows), min(size.T, size.rows)

    def inputs() -> dict[str, Tensor]:
        tokens = torch.randint(size.V, (rows // T, T), device=device)
        return {
            "idx": tokens,
            "wte": torch.randn(size.V, size.C, device=device),
            "wpe": torch.randn(T, size.C, device=device),
        }

    positions = flops.Work(0, 3 * 4 * T * C + 4 * size.V * C)  # read, cleared and written; the table's gradient cleared
    return Entry(
        "embedding",
        f"{rows} x {C} of {size.V}",
        total(flops.embedding_forward(rows, distinct, C, 4), flops.embedding_backward(rows, distinct, C, 4), positions),
        lambda: check(fused_embedding.embedding, reference.embedding, inputs()),
        timed({OURS: fused_embedding.embedding} | peers(reference.embedding, compiled), inputs),
    )
