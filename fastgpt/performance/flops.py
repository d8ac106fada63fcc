"""FLOPs per token of a GPT-2 training step, and the least work of each operation.

N counts parameters, L blocks, C the width, T the tokens of a sequence, V the vocabulary. A matmul weight costs 2 FLOP
per token forward and 4 backward, hence the 6. Attention in one block is two T x T matmuls forward and four backward, 2C
FLOP per query and key each, hence the 12. Norms, GELU, softmax and the optimizer are not counted: memory bounds them.
"""

from __future__ import annotations

from typing import NamedTuple

from fastgpt import anatomy
from fastgpt.anatomy import Shape


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def attended_keys(T: int, *, tile: int = 1, window: int = 0) -> float:
    """Keys that a causal query is multiplied with, on average: (T + 1) / 2, or less where it sees ``window`` keys at most.

    A kernel computes whole ``tile`` x ``tile`` squares of scores, n = ceil(T / tile) of them across. A row of squares has that
    on the diagonal and up to b = ceil((window - 1) / tile) before it, n - 1 without a window:
    tile^2 (b (b + 1) / 2 + (n - b) (b + 1)) / T.
    """
    n = cdiv(T, tile)
    before = min(cdiv(window - 1, tile), n - 1) if window else n - 1
    squares = before * (before + 1) / 2 + (n - before) * (before + 1)
    return tile * tile * squares / T


def palm(shape: Shape, T: int | None = None) -> float:
    """6N + 12LCT per token, N without positions: nanoGPT's and PaLM's (Chowdhery et al. 2022, appendix B). Of a modern model N
    leaves out every table that is only looked up, and a block with a window has that in the place of T."""
    attention, T = anatomy.of(shape).attention, T or shape.block_size
    keys = sum(blocks * min(window or T, T) for window, blocks in attention.reach.items())
    return 6 * anatomy.multiplied_params(shape) + 12 * attention.width * keys


PALM = "palm: 6N + 12LCT, N without positions"
"""The formula as reports name it."""


# ---------------------------------------------------------------- the least work of one operation


class Roof(NamedTuple):
    seconds: float
    bound: str  # "compute" or "memory"


class Work(NamedTuple):
    """Matmul FLOPs, and the bytes that cross the memory bus if each input is read once and each output written once."""

    flops: int
    bytes: int

    def roof(self, peak_flops: float, bytes_per_second: float) -> Roof:
        """Seconds below which this operation cannot go, and which of the two limits says so (Williams et al. 2009)."""
        compute, memory = self.flops / peak_flops, self.bytes / bytes_per_second
        return Roof(compute, "compute") if compute >= memory else Roof(memory, "memory")


def attention_forward(
    B: int, T: int, H: int, D: int, size: int = 2, *, kv_heads: int = 0, tile: int = 1, window: int = 0
) -> Work:
    """Causal, as the next. Read q, k, v; write out, and the log-sum-exp (B, H, T) in fp32. Two matmuls of 2D FLOP per query and
    key.

    ``size``: bytes of an element, here and below. ``kv_heads``: heads of k and v, if they are fewer than H. ``window``: keys
    that a query sees at most."""
    pairs = round(B * H * T * attended_keys(T, tile=tile, window=window))
    return Work(4 * D * pairs, 2 * B * T * (H + (kv_heads or H)) * D * size + 4 * B * H * T)


def attention_backward(
    B: int,
    T: int,
    H: int,
    D: int,
    size: int = 2,
    *,
    kv_heads: int = 0,
    tile: int = 1,
    window: int = 0,
    matmuls: int = 5,
) -> Work:
    """Read q, k, v, out, dout and the log-sum-exp; write dq, dk, dv. ``matmuls``: 5, or 7 with separate loops."""
    pairs = round(B * H * T * attended_keys(T, tile=tile, window=window))
    return Work(2 * matmuls * D * pairs, 4 * B * T * (H + (kv_heads or H)) * D * size + 4 * B * H * T)


def qk_norm_rope_forward(
    tokens: int, H: int, D: int, size: int = 2, *, kv_heads: int = 0, value_embedding: bool = False
) -> Work:
    """Read packed q, k, v, write as many, and 1/rms of queries and keys in fp32. With ``value_embedding`` also read that of the
    values, and its gate. The tables of cos and sin are not counted: they stay in cache."""
    kv = kv_heads or H
    embedded = kv * (D + 1) if value_embedding else 0
    return Work(0, tokens * (size * (2 * (H + 2 * kv) * D + embedded) + 4 * (H + kv)))


def qk_norm_rope_backward(
    tokens: int, H: int, D: int, size: int = 2, *, kv_heads: int = 0, value_embedding: bool = False
) -> Work:
    """Read the gradient of q, k, v, q and k themselves and their 1/rms; write the gradient of the projection. With
    ``value_embedding`` also read it and its gate, and write their gradients."""
    kv = kv_heads or H
    embedded = 2 * kv * (D + 1) if value_embedding else 0
    return Work(0, tokens * (size * ((3 * H + 5 * kv) * D + embedded) + 4 * (H + kv)))


def layer_norm_forward(rows: int, C: int, size: int = 2, *, residual: bool = False, bias: bool = False) -> Work:
    """Read x and the fp32 weight (and bias); write y, and mean and 1/std in fp32. With ``residual`` also read it and
    write the sum."""
    return Work(0, rows * C * size * (4 if residual else 2) + 8 * rows + 4 * C * (2 if bias else 1))


def layer_norm_backward(rows: int, C: int, size: int = 2, *, residual: bool = False, bias: bool = False) -> Work:
    """Read dy, x, mean, 1/std, weight; write dx and the fp32 dweight (and dbias). With ``residual`` also read the sum's
    gradient: dx then serves x and the residual."""
    return Work(0, rows * C * size * (4 if residual else 3) + 8 * rows + 4 * C * (3 if bias else 2))


def rms_norm_forward(
    rows: int, C: int, size: int = 2, *, stream: int | None = None, residual: bool = False, mixed: bool = False
) -> Work:
    """Without a weight: read x; write y, and 1/rms in fp32. With ``residual`` also read it and write the sum, ``stream`` bytes
    an element (default ``size``); ``mixed``: read x0, too."""
    stream = stream or size
    return Work(0, rows * C * (2 * size + stream * (2 * residual + mixed)) + 4 * rows)


def rms_norm_backward(
    rows: int, C: int, size: int = 2, *, stream: int | None = None, residual: bool = False, mixed: bool = False
) -> Work:
    """Read dy, x and 1/rms; write dx. With ``residual`` read the sum for x, and the sum's gradient, and write the residual's if
    dx does not serve as that; ``mixed``: read x, residual and x0 for the sum, and write dx0."""
    stream = stream or size
    moved = 2 * size + (size if mixed or not residual else 0) + 2 * stream * mixed
    moved += stream * (2 + (stream != size)) if residual else 0
    return Work(0, rows * C * moved + 4 * rows)


def linear_forward(M: int, N: int, K: int, size: int = 2, *, bias: bool = False) -> Work:
    """y (M, N) = x (M, K) w^T (N, K): read x and w (and bias), write y. 2MNK FLOP, as the next two."""
    return Work(2 * M * N * K, size * (M * K + N * K + M * N + (N if bias else 0)))


def linear_input_grad(M: int, N: int, K: int, size: int = 2) -> Work:
    """dx (M, K) = dy (M, N) w (N, K): read dy and w, write dx."""
    return Work(2 * M * N * K, size * (M * N + N * K + M * K))


def linear_weight_grad(M: int, N: int, K: int, size: int = 2, *, grad_size: int = 4, accumulate: bool = False) -> Work:
    """dw (N, K) = dy^T x: read dy and x, write dw; ``accumulate`` also reads it."""
    return Work(2 * M * N * K, size * (M * N + M * K) + grad_size * N * K * (2 if accumulate else 1))


def linear_cross_entropy(rows: int, C: int, V: int, size: int = 2, *, grad_size: int = 4) -> Work:
    """Head and loss in one, logits never in memory: read x (rows, C), w (V, C), int64 targets; write fp32 losses, dx and dw.
    Three matmuls: logits, dx, dw."""
    return Work(6 * rows * C * V, size * (2 * rows * C + V * C) + 12 * rows + grad_size * V * C)


def cross_entropy(rows: int, V: int, size: int = 2, *, grad: bool = True) -> Work:
    """Loss over logits that are in memory: read them and int64 targets, write fp32 losses. ``grad`` reads logits and
    targets again, and fp32 log-sum-exps that forward then writes too; writes dlogits."""
    forward = rows * V * size + 12 * rows
    return Work(0, forward + (2 * rows * V * size + 16 * rows if grad else 0))


def embedding_forward(rows: int, distinct: int, C: int, size: int = 2) -> Work:
    """Read int64 tokens and the table's rows of the ``distinct`` tokens among them; write a row per token."""
    return Work(0, 8 * rows + (distinct + rows) * C * size)


def embedding_backward(rows: int, distinct: int, C: int, size: int = 2) -> Work:
    """Read int64 tokens and dy; add into the fp32 rows of the ``distinct`` tokens among them."""
    return Work(0, 8 * rows + rows * C * size + 2 * distinct * C * 4)


def adamw(params: int) -> Work:
    """All in fp32: read the gradient for its norm; read it again, read and write the parameter and two moments."""
    return Work(0, params * 4 * (2 + 6))


def muon_matrices(parts: anatomy.Anatomy) -> list[tuple[int, int, int]]:
    """(count, smaller side, larger side) of the matrices that Muon orthogonalizes: the blocks' weights, packed q, k and v each
    alone."""
    found = []
    for linear in parts.block_linears:
        rows = [linear.n_out]
        if linear.sink == "attention":
            packed = (linear.n_out - linear.n_in) // 2
            rows = [linear.n_in, packed, packed]
        found += [(linear.count, min(n, linear.n_in), max(n, linear.n_in)) for n in rows]
    return found


def muon(parts: anatomy.Anatomy, steps: int = 5) -> Work:
    """Muon's update of them, weights and momentum in fp32, iterations in 16 bits (kernels/fused_muon.py): of each matrix (n, m)
    n^2 m + n^3 + 2 n^2 m FLOP per iteration, as of two symmetric products only half is computed.

    Per weight: read the gradient, twice with its norm's; read and write momentum and weight; write and read X, and once for
    its norm. Per iteration: X X^T reads X; the polynomial reads and writes (n, n), as do those before and after it; the
    product reads and writes X."""
    matrices = muon_matrices(parts)
    products = sum(count * (3 * n * n * m + n**3) for count, n, m in matrices)
    moved = sum(count * (6 * n * m + 8 * n * n) for count, n, m in matrices)
    weights = sum(count * n * m for count, n, m in matrices)
    return Work(steps * products, weights * (4 * 6 + 2 * 3) + steps * moved)
