"""Benchmarks per operation, one file each, mirroring fastgpt/kernels: launch cases, tuning families, timing entry and peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bench.ops import adamw, attention, cross_entropy, embedding, fp8, layer_norm, linear, muon, qk_norm_rope, rms_norm
from bench.ops.common import Case, Entry, Family, Sizes
from fastgpt.kernels import tuning

ENTRIES: tuple[Callable[[Sizes, torch.device, bool], Entry], ...] = (
    embedding.embedding,
    layer_norm.layer_norm,
    layer_norm.layer_norm_residual,
    rms_norm.rms_norm,
    rms_norm.rms_norm_mixed,
    qk_norm_rope.qk_norm_rope,
    attention.attention,
    cross_entropy.linear_cross_entropy,
    adamw.adamw,
    muon.muon,
)

_ROWS_AND_WIDTHS: list[dict[str, Any]] = [{"C": C} for C in (384, 768, 1024, 1600)] + [{"rows": 1024}, {"rows": 32768}]
SWEEPS: dict[str, list[dict[str, Any]]] = {
    "embedding": _ROWS_AND_WIDTHS,
    "layer_norm": _ROWS_AND_WIDTHS,
    "layer_norm_residual": _ROWS_AND_WIDTHS,
    "rms_norm": _ROWS_AND_WIDTHS,
    "rms_norm_mixed": _ROWS_AND_WIDTHS,
    # 16,384 tokens and a width of 768 throughout, as in the next.
    "qk_norm_rope": [{"D": D, "H": 768 // D} for D in (32, 64, 128)],
    "attention": [
        *({"T": T, "B": 16384 // T} for T in (512, 1024, 2048, 4096)),
        *({"D": D, "H": 768 // D} for D in (32, 64, 128)),
    ],
    "linear_cross_entropy": [{"C": C} for C in (384, 768, 1024, 1600)] + [{"rows": 2048}, {"rows": 16384}],
    "adamw": [{"C": 384}, {"C": 768}, {"C": 1024, "n_layer": 24}],  # GPT-2 40M, 124M, 350M
    "muon": [{"C": 384}, {"C": 768}, {"C": 1024, "n_layer": 24}],
}
"""What differs from the base, by entry."""


def shapes(make: Callable, base: Sizes) -> list[Sizes]:
    """The sweep of one of ENTRIES around ``base``, which comes first, and each shape once."""
    return list(dict.fromkeys([base, *(replace(base, **changed) for changed in SWEEPS[make.__name__])]))


def cases() -> list[Case]:
    """The launches that training and sampling a GPT make: every kernel, in every shipped launch config."""
    ops = (embedding, qk_norm_rope, attention, layer_norm, rms_norm, cross_entropy, linear, fp8, adamw, muon)
    return [case for op in ops for case in op.cases()]


def families() -> list[Family]:
    ops = (qk_norm_rope, attention, layer_norm, rms_norm, cross_entropy, adamw, linear, muon)
    return [family for op in ops for family in op.families()]


# ---------------------------------------------------------------- what ships, for bench.audit


def table_cases(arch: int) -> list[Case]:
    """A case per distinct config in the shipped tables of sm_``arch``: what the gate of bench.audit has to let pass. Where
    tables of two cards have the same config, the smaller card's name stands for both."""
    by_key = {(family.kernel, family.dtype_name, bucket): family for family in families() for bucket in family.buckets}
    paths = tuning.SHIPPED.glob(f"sm{arch}_*.json")
    found: dict[tuple, Case] = {}
    for path in sorted(paths, key=lambda path: int(path.stem.split("_")[1])):
        for key, entry in tuning.read(path).entries.items():
            family = by_key[key]
            same = (family.name, tuple(sorted(entry.config.items())))
            found.setdefault(same, (f"table {path.stem} {' '.join(key)}", partial(_launch_entry, entry, family)))
    return list(found.values())


def _launch_entry(entry: tuning.TableEntry, family: Family) -> None:
    with tuning.forced({entry.key.kernel: entry.config}):
        for case in (*family.cases, *family.rest):
            case()
