"""What bench.tune compares: for every kernel, dtype and shape bucket, the launches to compile and the operation to time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgpt.kernels import _linear_launch as launch
from fastgpt.kernels import fused_adamw, fused_cross_entropy, fused_layernorm, launch_cases, ranking, runtime, tuning
from fastgpt.kernels._attn_launch import ROW_BOUNDS, attention_bucket
from fastgpt.kernels.fused_attn import qkv_attention
from fastgpt.optim import FusedAdamW

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
    timed: Callable[[str, torch.device], Callable[[], Any]]
    """For a bucket: the public operation around the kernel, at the size that stands for it. Returns its results."""
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
    return [
        *attention_families(),
        *layer_norm_families(),
        *cross_entropy_families(),
        adamw_family(),
        *linear_families(),
    ]


def pass_of(kernel: str, op: Callable[..., Any], inputs: list[Tensor]) -> Callable[[], Any]:
    """The forward pass of ``op`` over its inputs, or its backward pass, as the name of ``kernel`` ends."""
    if kernel.endswith(".forward"):

        def forward() -> Any:
            with torch.no_grad():
                torch.manual_seed(0)  # the same dropout for every config
                return op(*inputs)

        return forward
    inputs = [x.requires_grad_() for x in inputs]
    found = op(*inputs)
    outputs: tuple[Tensor, ...] = found if isinstance(found, tuple) else (found,)
    upstream = [torch.randn_like(out) for out in outputs]
    return lambda: torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)


def attention_families() -> list[Family]:
    bounds = [*ROW_BOUNDS, ROW_BOUNDS[-1] + 1]
    found = []
    for dtype in (BF16, FP16):
        for dropout in (False, True):
            buckets = [attention_bucket(64, rows, plain=True, dropout=dropout) for rows in bounds]
            case = partial(launch_cases.launch_attention, dtype, 64, dropout_p=0.1 if dropout else 0.0)
            for function in ("forward", "backward_q", "backward_kv"):
                known = tuple(bucket for bucket in buckets if bucket is not None)
                timed = partial(time_attention, f"attention.{function}", dtype)
                found.append(Family(f"attention.{function}", dtype, known, function, (case,), timed))
    return found


def time_attention(kernel: str, dtype: torch.dtype, bucket: str, device: torch.device) -> Callable[[], Any]:
    heads = ranking.sizes(bucket)[-1]
    H = min(heads, 12)
    qkv = torch.randn(-(-heads // H), 1024, 3 * H * 64, device=device).to(dtype)
    return pass_of(kernel, partial(qkv_attention, n_head=H, dropout_p=0.1 if "dropout" in bucket else 0.0), [qkv])


def layer_norm_families() -> list[Family]:
    found = []
    for C in WIDTHS:
        for dtype in (BF16, FP16, FP32):
            low = BF16 if dtype == FP32 else dtype
            norm = partial(launch_cases.launch_norm, C, dtype, rows=256)
            inside = partial(norm, FP32, out_dtype=dtype)  # dy then has this dtype
            everything = partial(norm, FP32, bias=True, out_dtype=dtype, dropout_p=0.1)
            alone = partial(norm, None, bias=True)
            first = partial(norm, None, out_dtype=low)
            for kernel in ("forward", "backward"):
                cases = (
                    (inside, everything, alone) if kernel == "backward" or dtype != FP32 else (first, everything, alone)
                )
                bucket = fused_layernorm.layer_norm_bucket(C)
                function, timed = f"layer_norm_{kernel}_kernel", partial(time_layer_norm, f"layer_norm.{kernel}", dtype)
                found.append(Family(f"layer_norm.{kernel}", dtype, (bucket,), function, cases, timed))
    return found


def time_layer_norm(kernel: str, dtype: torch.dtype, bucket: str, device: torch.device) -> Callable[[], Any]:
    C = int(bucket[1:])
    x, residual = torch.randn(2, 8192, C, device=device)

    def op(x: Tensor, weight: Tensor, residual: Tensor) -> Any:
        return fused_layernorm.layer_norm(x, weight, residual=residual, out_dtype=dtype)

    return pass_of(kernel, op, [x.to(dtype), torch.rand(C, device=device), residual])


def cross_entropy_families() -> list[Family]:
    found = []
    for dtype in (BF16, FP16, FP32):
        loss = partial(launch_cases.launch_loss, dtype, V=8192, N=64)
        cases = (loss, partial(loss, label_smoothing=0.1, z_loss=1e-4, vocab_size=8190))
        bucket = fused_cross_entropy.cross_entropy_bucket(8192, None)
        assert bucket is not None
        timed = partial(time_cross_entropy, dtype)
        found.append(Family("cross_entropy.rows", dtype, (bucket,), "rows_kernel", cases, timed))
    return found


def time_cross_entropy(dtype: torch.dtype, bucket: str, device: torch.device) -> Callable[[], Any]:
    """Forward, which forms the gradients, too. Narrow: the matmuls around the kernel are not what is compared."""
    x, weight = (torch.randn(rows, 64, device=device).to(dtype).requires_grad_() for rows in (8192, 50304))
    target = torch.randint(0, 50304, (8192,), device=device)
    return lambda: fused_cross_entropy.linear_cross_entropy(x, weight, target)


def adamw_family() -> Family:
    cases = (partial(launch_cases.launch_adamw, FP32, copy=BF16), partial(launch_cases.launch_adamw, FP32, offset=1))
    return Family("adamw.update", FP32, (fused_adamw.ADAMW_BUCKET,), "_adamw_kernel", cases, time_adamw)


def time_adamw(bucket: str, device: torch.device) -> Callable[[], Any]:
    params = [torch.nn.Parameter(torch.randn(4096, 1024, device=device)) for _ in range(16)]
    for p in params:
        p.grad = torch.randn_like(p)
    return FusedAdamW(params, max_grad_norm=1.0).step


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


def linear_families() -> Iterator[Family]:
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
            timed = partial(time_linear, kernel, dtype)
            yield Family(kernel, dtype, buckets, function, cases, timed, tuple(partial(case, **more) for more in rest))


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

    def make(*shape: int, like: torch.dtype = dtype) -> Tensor:
        if runtime.compile_only:
            return torch.empty(shape, dtype=like)
        return torch.randn(shape, device=device).to(like)

    if kind.startswith("weight_grad"):
        dz, x, dw = make(tokens, N), make(tokens, K), make(N, K, like=FP32)
        db = make(N, like=FP32) if kind.endswith("bias") else None

        def gradient() -> list[Tensor]:
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


def time_linear(kernel: str, dtype: torch.dtype, bucket: str, device: torch.device) -> Callable[[], Any]:
    prefix, kind = kernel.split(".")
    N, K = ranking.linear_sizes(bucket)
    return linear(kind, dtype, prefix == "linear_fast", N, K, ranking.typical_tokens(bucket), device)


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
