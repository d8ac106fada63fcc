"""What bench.tune compares: for every kernel, dtype and shape bucket, the launches to compile and the operation to time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastgpt.kernels import _attn_launch as attention
from fastgpt.kernels import _linear_launch as launch
from fastgpt.kernels import fused_adamw, fused_cross_entropy, fused_layernorm, launch_cases, ranking, runtime, tuning

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
    rest: tuple[Callable[[], None], ...] = ()
    """Cases that a config which ships must be good for, too: compiled by the gate of bench.audit only."""

    @property
    def dtype_name(self) -> str:
        return tuning.DTYPES[self.dtype]

    @property
    def name(self) -> str:
        """Such as "attention.forward bf16 D64 dropout"; --kernel picks by it."""
        alike = "" if self.kernel.startswith("linear") else f" {self.buckets[0].split(' rows')[0]}"
        return f"{self.kernel} {self.dtype_name}{alike}"

    def configs(self) -> list[dict[str, int]]:
        """Those worth compiling."""
        return tuning.sensible_configs(self.kernel, self.buckets[0])


def families() -> list[Family]:
    return [*_attention(), *_layer_norm(), *_rows(), _adamw(), *_linears()]


def _attention() -> list[Family]:
    bounds = [*attention.ROW_BOUNDS, attention.ROW_BOUNDS[-1] + 1]
    found = []
    for dtype in (BF16, FP16):
        for dropout in (False, True):
            buckets = [attention.attention_bucket(64, rows, plain=True, dropout=dropout) for rows in bounds]
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
                bucket = fused_layernorm.layer_norm_bucket(C)
                found.append(Family(f"layer_norm.{kernel}", dtype, (bucket,), f"layer_norm_{kernel}_kernel", cases))
    return found


def _rows() -> list[Family]:
    found = []
    for dtype in (BF16, FP16, FP32):
        loss = partial(launch_cases._loss, dtype, V=8192, N=64)
        cases = (loss, partial(loss, label_smoothing=0.1, z_loss=1e-4, vocab_size=8190))
        bucket = fused_cross_entropy.cross_entropy_bucket(8192, None)
        assert bucket is not None
        found.append(Family("cross_entropy.rows", dtype, (bucket,), "rows_kernel", cases))
    return found


def _adamw() -> Family:
    cases = (partial(launch_cases._adamw, FP32, copy=BF16), partial(launch_cases._adamw, FP32, offset=1))
    return Family("adamw.update", FP32, (fused_adamw.ADAMW_BUCKET,), "_adamw_kernel", cases)


# Linear layers of GPT-2's blocks: (N, K) of a weight, in units of the width.
_FORWARD = ((3, 1), (1, 1), (1, 4))  # without the MLP's first, whose epilogue is "gelu"
_SHAPES = {
    "none": (*_FORWARD, (1, 3)),  # also the input gradients, where N and K have changed places
    "bias": _FORWARD,
    "residual": ((1, 1), (1, 4)),
    "gelu": ((4, 1),),
    "dgelu": ((4, 1),),
    "weight_grad": (*_FORWARD, (4, 1)),
    "weight_grad_bias": (*_FORWARD, (4, 1)),
}
LINEAR_WIDTHS = WIDTHS[:3]


def _linears() -> Iterator[Family]:
    for kernel in tuning.spaces():
        if not kernel.startswith("linear"):
            continue
        kind, fast = kernel.split(".")[1], kernel.startswith("linear_fast")
        grad = kind.startswith("weight_grad")
        known = [
            launch.linear_bucket(n * C, k * C, launch.FEWEST_TOKENS) for C in LINEAR_WIDTHS for n, k in _SHAPES[kind]
        ]
        buckets = tuple(bucket for bucket in known if bucket is not None)
        for dtype in (FP16,) if fast else (BF16, FP16):
            case = partial(_launch_linear, kind, dtype, fast)
            # Adding takes registers, and so do sums of columns: some tiles spill only then.
            heavy = {"add": True} if grad else {"sums": True} if kind == "dgelu" else None
            cases = (case,) if heavy is None else (case, partial(case, **heavy))
            rest = {"none": ({"transposed": True},), "gelu": ({"bias": False}, {"save": False})}.get(kind, ())
            function = "weight_grad_kernel" if grad else "linear_kernel"
            yield Family(kernel, dtype, buckets, function, cases, tuple(partial(case, **more) for more in rest))


def _launch_linear(kind: str, dtype: torch.dtype, fast: bool, **options: Any) -> None:
    linear(kind, dtype, fast, **options)()


def linear(
    kind: str,
    dtype: torch.dtype,
    fast: bool,
    N: int = 256,
    K: int = 256,
    tokens: int = launch.FEWEST_TOKENS,
    device: torch.device | str = "cpu",
    *,
    bias: bool = True,
    save: bool = True,
    add: bool = False,
    transposed: bool = False,
    sums: bool = False,
) -> Callable[[], Any]:
    """The matmul of a bucket ``N.. K..`` with what goes with it, on random operands: what it gives at each call.

    ``bias`` and ``save``: of "gelu". ``add``: to a gradient that is there. ``transposed``: of "none", an input gradient.
    ``sums``: of "dgelu", with the gradient of a bias."""

    def make(*shape: int, like: torch.dtype = dtype) -> torch.Tensor:
        if runtime.compile_only:
            return torch.empty(shape, dtype=like)
        return torch.randn(shape, device=device).to(like)

    if kind.startswith("weight_grad"):
        dz, x, dw = make(tokens, N), make(tokens, K), make(N, K, like=FP32)
        db = make(N, like=FP32) if kind.endswith("bias") else None

        def gradient() -> list[torch.Tensor]:
            launch.weight_grad(dz, x, dw, db, fast, add=add)
            return [dw] if db is None else [dw, db]

        return gradient
    x, shift = make(tokens, K), make(N, like=FP32) if bias and kind != "none" else None
    weight = (make(K, N) if transposed or kind == "dgelu" else make(N, K).t()).mul_(K**-0.5)
    if kind == "gelu":
        return lambda: launch.matmul_gelu(x, weight, shift, False, fast, save)
    if kind == "dgelu":
        pre = make(tokens, N)
        return lambda: launch.matmul_dgelu(x, weight, pre, False, fast, FP32 if sums else None)[0]
    residual = make(tokens, N, like=FP32) if kind == "residual" else None
    return lambda: launch.matmul(x, weight, shift, residual, None, 0.0, fast)


def of_family(family: Family, bucket: str, device: torch.device) -> Callable[[], Any]:
    """The matmul of a family of linear layers, at a size that stands for its bucket."""
    prefix, kind = family.kernel.split(".")
    N, K = ranking.linear_sizes(bucket)
    return linear(kind, family.dtype, prefix == "linear_fast", N, K, ranking.typical_tokens(bucket), device)


def default_at(family: Family, bucket: str, default: dict[str, int], sms: int) -> dict[str, int]:
    """The default config in this bucket: that of a weight gradient is split as its shape wants."""
    if "splits" not in default:
        return default
    N, K = ranking.linear_sizes(bucket)
    ways = launch.splits(N, K, ranking.typical_tokens(bucket), default["block_m"], default["block_n"], sms)
    return {**default, "splits": ways}


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


def _launch_entry(entry: tuning.TableEntry, family: Family) -> None:
    with tuning.forced({entry.key.kernel: entry.config}):
        for case in (*family.cases, *family.rest):
            case()
