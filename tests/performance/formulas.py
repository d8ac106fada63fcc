"""FLOPs per token in closed form: what the sums over a step's operations are compared with."""

from __future__ import annotations

from fastgpt import anatomy
from fastgpt.anatomy import Shape, matmul_params
from fastgpt.performance.flops import attended_keys


def _keys(T: int, is_causal: bool, tile: int = 1) -> float:
    return attended_keys(T, tile=tile) if is_causal else float(T)


def _attention_width(shape: Shape) -> int:
    """LC: columns of the queries of all blocks together."""
    attention = anatomy.of(shape).attention
    return attention.count * attention.width


def exact(shape: Shape, T: int | None = None, *, is_causal: bool = True) -> float:
    """6 (12LC^2 + VC) + 6LC (T + 1) per token: every multiplication that the mathematics needs, none twice.

    ``is_causal=False`` has 12LCT instead: what torch's FlopCounterMode counts for attention written as two matmuls.
    """
    return 6 * matmul_params(shape) + 12 * _attention_width(shape) * _keys(T or shape.block_size, is_causal)


def hardware(shape: Shape, *, is_causal: bool = True, tile: int = 1, split_backward: bool = True) -> float:
    """FLOPs that the chip executes per token: 6 (12LC^2 + VC) + L (2 + b) 2C keys.

    Flash attention's backward has b matmuls: 5 in one loop (scores again, dP, dV, dQ, dK; Dao et al. 2022), 7 with one
    loop for dQ and one for dK and dV (scores and dP in both). ``tile`` is the kernel's, see ``attended_keys``.
    """
    matmuls = 2 + (7 if split_backward else 5)
    keys = _keys(shape.block_size, is_causal, tile)
    return 6 * matmul_params(shape) + matmuls * 2 * _attention_width(shape) * keys
