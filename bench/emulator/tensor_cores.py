"""Tensor-core instructions: which thread holds which element (PTX ISA, "Matrix Fragments for mma"), and their arithmetic.

Products are exact; their sum with the accumulator is taken in fp64 and rounded once to the accumulator's type. Real tensor
cores cut low bits off while they add: bench/numerics/simulation.py models that.
"""

from __future__ import annotations

import numpy as np

from bench.emulator.ptx import PtxError

_LANE = np.arange(32)
_G, _T = _LANE >> 2, _LANE & 3
Places = list[tuple[np.ndarray, np.ndarray]]
"""(row, column) of each element of a thread's fragment, over the 32 lanes."""


def _gather(rows: int, columns: int, places: Places) -> np.ndarray:
    """For each element of a matrix, its index in a warp's fragments, flattened (lane, element)."""
    found = np.full((rows, columns), -1)
    for element, (row, column) in enumerate(places):
        found[row, column] = _LANE * len(places) + element
    assert (found >= 0).all()
    return found.reshape(-1)


_A16 = [(_G + 8 * (i >> 1 & 1), 2 * _T + (i & 1) + 8 * (i >> 2)) for i in range(8)]
_B16 = [(2 * _T + (i & 1) + 8 * (i >> 1), _G) for i in range(4)]
_A8 = [(_G + 8 * (r & 1), 4 * _T + b + 16 * (r >> 1)) for r in range(4) for b in range(4)]
_B8 = [(4 * _T + b + 16 * r, _G) for r in range(2) for b in range(4)]
_A32 = [(_G + 8 * (i & 1), _T + 4 * (i >> 1)) for i in range(4)]
_B32 = [(_T + 4 * i, _G) for i in range(2)]
_C = [(_G + 8 * (i >> 1), 2 * _T + (i & 1)) for i in range(4)]

_LAYOUT = {
    ("m16n8k16", 2): (_gather(16, 16, _A16), _gather(16, 8, _B16), 16),
    ("m16n8k8", 2): (_gather(16, 8, _A16[:4]), _gather(8, 8, _B16[:2]), 8),
    ("m16n8k32", 1): (_gather(16, 32, _A8), _gather(32, 8, _B8), 32),
    ("m16n8k8", 4): (_gather(16, 8, _A32), _gather(8, 8, _B32), 8),
}
"""(where A's elements lie, B's, k), by shape and bytes of an element."""
_C_GATHER = _gather(16, 8, _C)
_C_SCATTER = np.stack([row * 8 + column for row, column in _C], axis=1).reshape(-1)


def _e4m3() -> np.ndarray:
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    value = np.where((bits & 127) == 127, np.nan, value)
    return np.where(bits >> 7 == 1, -value, value)


E4M3 = _e4m3()
"""The values of all 256 codes."""
E5M2 = (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float64)

_SIZE = {"bf16": 2, "f16": 2, "e4m3": 1, "e5m2": 1, "tf32": 4}
_RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def _values(bits: np.ndarray, kind: str) -> np.ndarray:
    """fp64 of raw bits."""
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    if kind in ("e4m3", "e5m2"):
        return (E4M3 if kind == "e4m3" else E5M2)[bits]
    # bf16 is the upper half of an fp32; of tf32 the low 13 bits are ignored.
    words = bits.astype(np.uint32) << np.uint32(16) if kind == "bf16" else bits & np.uint32(0xFFFFE000)
    return words.view(np.float32).astype(np.float64)


def check(shape: str, a_kind: str, b_kind: str, accumulator: str) -> None:
    """Raise PtxError unless ``mma`` knows these."""
    if (
        (shape, _SIZE.get(a_kind)) not in _LAYOUT
        or _SIZE.get(b_kind) != _SIZE[a_kind]
        or accumulator not in ("f32", "f16")
    ):
        raise PtxError(f"mma {shape} of {a_kind} and {b_kind} into {accumulator}")


def mma(shape: str, a_kind: str, b_kind: str, accumulator: str, *fragments: list[np.ndarray]) -> list[np.ndarray]:
    """d = a b + c. The fragments a, b, c: uint32 registers of whole warps, (threads,). Returns the registers of d."""
    a, b, c = fragments
    a_places, b_places, k = _LAYOUT[shape, _SIZE[a_kind]]
    warps = a[0].shape[0] // 32

    def matrix(registers: list[np.ndarray], places: np.ndarray, rows: int, kind: str) -> np.ndarray:
        raw = np.stack(registers, axis=-1).reshape(warps, 32 * len(registers)).view(_RAW[_SIZE[kind]])
        return _values(raw.take(places, axis=1), kind).reshape(warps, rows, -1)

    product = np.matmul(matrix(a, a_places, 16, a_kind), matrix(b, b_places, k, b_kind)).reshape(warps, 128)
    dtype = np.float32 if accumulator == "f32" else np.float16
    before = np.stack(c, axis=-1).reshape(warps, -1).view(dtype).take(_C_GATHER, axis=1)
    d = (product + before).astype(dtype).take(_C_SCATTER, axis=1).reshape(warps * 32, 4).view(np.uint32)
    return [np.ascontiguousarray(d[:, i]) for i in range(d.shape[1])]


def ldmatrix(rows: np.ndarray, transposed: bool) -> list[np.ndarray]:
    """rows (warps, matrices, 8, 8) uint16 -> one uint32 register (threads,) per matrix."""
    if transposed:
        rows = rows.swapaxes(2, 3)
    words = np.ascontiguousarray(rows).view(np.uint32).reshape(*rows.shape[:2], 32)
    return [np.ascontiguousarray(words[:, i]).reshape(-1) for i in range(words.shape[1])]


def stmatrix(registers: list[np.ndarray], transposed: bool) -> np.ndarray:
    """The inverse: (warps, matrices, 8, 8) uint16."""
    words = np.stack([register.reshape(-1, 32) for register in registers], axis=1)
    halves = words.view(np.uint16).reshape(-1, len(registers), 8, 8)
    return np.ascontiguousarray(halves.swapaxes(2, 3)) if transposed else halves
