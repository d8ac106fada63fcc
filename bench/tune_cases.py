"""What bench.tune compares: for every kernel, dtype and shape bucket, the launches to compile and the operation to time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from fastgpt.kernels import config_space, launch_cases, tuning

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WIDTHS = (384, 768, 1024, 1600)
"""GPT-2 40M's, 124M's, 350M's, 1.5B's."""


@dataclass(frozen=True)
class Family:
    """Buckets of one kernel and dtype that compile alike. ``function``: the jit function; ``cases`` launch it, the usual
    options first, then those that a config of this bucket must also be good for."""

    kernel: str
    dtype: torch.dtype
    buckets: tuple[str, ...]
    function: str
    cases: tuple[Callable[[], None], ...]

    @property
    def dtype_name(self) -> str:
        return config_space.DTYPES[self.dtype]

    @property
    def name(self) -> str:
        """Such as "attention.forward bf16 D64 dropout"; --kernel picks by it."""
        return f"{self.kernel} {self.dtype_name} {self.buckets[0].split(' rows')[0]}"

    def configs(self) -> list[dict[str, int]]:
        """Those worth compiling."""
        space = config_space.spaces()[self.kernel]
        return [config for config in space if config_space.sensible(self.kernel, self.buckets[0], config)]


def families() -> list[Family]:
    return [*_attention(), *_layer_norm(), *_rows(), _adamw()]


def _attention() -> list[Family]:
    bounds = [*config_space.ROW_BOUNDS, config_space.ROW_BOUNDS[-1] + 1]
    found = []
    for dtype in (BF16, FP16):
        for dropout in (False, True):
            buckets = [config_space.attention_bucket(64, rows, plain=True, dropout=dropout) for rows in bounds]
            case = partial(launch_cases._qkv, dtype, 64, dropout_p=0.1 if dropout else 0.0)
            for function in ("forward", "backward_q", "backward_kv"):
                known = tuple(bucket for bucket in buckets if bucket is not None)
                found.append(Family(f"attention.{function}", dtype, known, function, (case,)))
    return found


def _layer_norm() -> list[Family]:
    found = []
    for C in WIDTHS:
        for dtype in (BF16, FP16, FP32):
            low = BF16 if dtype == FP32 else dtype
            norm = partial(launch_cases._norm, C, dtype, rows=256)
            inside = partial(norm, FP32, out_dtype=dtype)  # dy then has this dtype
            everything = partial(norm, FP32, bias=True, out_dtype=dtype, dropout_p=0.1)
            alone = partial(norm, None, bias=True)
            first = partial(norm, None, out_dtype=low)
            for kernel in ("forward", "backward"):
                cases = (
                    (inside, everything, alone) if kernel == "backward" or dtype != FP32 else (first, everything, alone)
                )
                bucket = config_space.layer_norm_bucket(C)
                found.append(Family(f"layer_norm.{kernel}", dtype, (bucket,), f"_{kernel}_kernel", cases))
    return found


def _rows() -> list[Family]:
    found = []
    for dtype in (BF16, FP16, FP32):
        loss = partial(launch_cases._loss, dtype, V=8192, N=64)
        cases = (loss, partial(loss, label_smoothing=0.1, z_loss=1e-4, vocab_size=8190))
        found.append(Family("cross_entropy.rows", dtype, ("V>=8192",), "rows_kernel", cases))
    return found


def _adamw() -> Family:
    cases = (partial(launch_cases._adamw, FP32, copy=BF16), partial(launch_cases._adamw, FP32, offset=1))
    return Family("adamw.update", FP32, (config_space.ADAMW_BUCKET,), "_adamw_kernel", cases)


# ---------------------------------------------------------------- what ships, for bench.audit


def table_cases(arch: int) -> list[launch_cases.Case]:
    """A case per distinct config in the shipped tables of sm_``arch``: what the gate of bench.audit has to let pass. Where
    tables of two cards have the same config, the smaller card's name stands for both."""
    by_key = {(family.kernel, family.dtype_name, bucket): family for family in families() for bucket in family.buckets}
    paths = tuning.SHIPPED.glob(f"sm{arch}_*.json")
    found: dict[tuple, launch_cases.Case] = {}
    for path in sorted(paths, key=lambda path: int(path.stem.split("_")[1])):
        for key, entry in tuning.read(path).entries.items():
            family = by_key[key]
            same = (family.name, tuple(sorted(entry.config.items())))
            found.setdefault(same, (f"table {path.stem} {' '.join(key)}", partial(_launch_entry, entry, family)))
    return list(found.values())


def _launch_entry(entry: tuning.Entry, family: Family) -> None:
    with tuning.forced({entry.key.kernel: entry.config}):
        for case in family.cases:
            case()
