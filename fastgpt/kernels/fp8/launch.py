"""How the matmuls and quantisers of ops.py are run. 2-d tensors only.

A tensor in fp8 is a pair: its values (M, K), contiguous, and in fp32 either ``stats`` (2, M), the scales and norms of its rows,
or ``scale`` (groups, M), one for every K / groups columns of a row (quantise.py).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastgpt.kernels import arguments, column_sums, runtime, working_copy
from fastgpt.kernels.fp8.kernels import CHUNK, fp8_linear_kernel, fp8_quantise_kernel, fp8_sweep_kernel

FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
"""Formats of activations and weights, and of gradients (Micikevicius et al. 2022)."""
MULTIPLE = 16
"""Rows of fp8 must begin at multiples of so many bytes, for the kernel's wide reads and for torch._scaled_mm alike."""


class Fp8(NamedTuple):
    values: Tensor
    stats: Tensor

    @property
    def scale(self) -> Tensor:
        return self.stats[0]

    @property
    def norm(self) -> Tensor:
        return self.stats[1]


class Grouped(NamedTuple):
    """What attention writes, whose programs have no whole row. Only ``matmul`` takes it, as its first operand."""

    values: Tensor
    scale: Tensor

    @property
    def columns(self) -> int:
        """Columns of a row that share a scale."""
        return self.values.shape[-1] // self.scale.shape[0]


def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def refusal(device: torch.device) -> str | None:
    """Why ``device`` cannot run these kernels, or None if it can. Before sm_89 triton has no fp8 products to compile."""
    if device.type != "cuda":
        return None if runtime.INTERPRET or runtime.compile_only else "a CPU has no fp8 kernels"
    major, minor = capability(device)
    if (major, minor) >= (8, 9):
        return None
    return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor}) has no fp8 tensor cores, which come with sm_89"


def require(device: torch.device) -> None:
    """Raise ValueError if ``device`` cannot run these kernels."""
    reason = refusal(device)
    if reason is not None:
        raise ValueError(f"precision is fp8, but {reason}: use bf16")


def engine(device: torch.device) -> str:
    """Which engine multiplies: "triton", or "scaled_mm" (torch._scaled_mm and the epilogue in a sweep of its own).

    On Hopper, whose tensor cores want warp-specialised code that triton does not write, scales per row are cuBLAS's (from
    CUDA 12.9 on) or CUTLASS's, with sums in fp32 unless use_fast_accum. Elsewhere they are CUTLASS's alone
    (ScaledBlas.cpp), and cuBLAS has none on sm_120 (pytorch#192707). No GPU has measured this choice yet.
    """
    hopper = device.type == "cuda" and capability(device)[0] == 9
    return "scaled_mm" if hopper and _torch_multiplies(device) else "triton"


@lru_cache
def _torch_multiplies(device: torch.device) -> bool:
    """Whether this build of torch has the products asked of it: which formats cuBLAS takes with scales per row is not written
    down anywhere."""
    a, b = (torch.ones(64, 64, dtype=torch.bfloat16, device=device) for _ in range(2))
    ones = torch.ones(2, 64, dtype=torch.float32, device=a.device)
    try:
        for dtype in (FORWARD, GRADIENT):
            _scaled_mm(Fp8(a.to(dtype), ones), Fp8(b.to(FORWARD), ones), ones[0])
    except RuntimeError:
        return False
    return True


def config(M: int, N: int, *, halved: bool = False, sums: bool = False, chunk: int = CHUNK) -> dict[str, int]:
    """Tiles of the matmul, which depend on the shape in the interpreter alone. 8 warps hold a tile of 128 x 128 and a chunk of
    its sums (2 x 64 registers a thread) without spills; chunks of 128 spill on sm_120. ``halved``: for erf and GELU's gradient,
    which would spill with triton 3.6, and for scales of groups, whose 176 registers would keep a second block from an SM of
    sm_89; its other half for GELU's gradient with ``sums``, for the same reason. ``chunk`` of K is read, and summed, at a
    time; the stages keep the bytes in flight the same."""
    if runtime.INTERPRET:  # the cost there is per program and operation, hardly per element
        m, n = (min(max(runtime.next_power_of_2(size), 16), 512) for size in (M, N))
        return {"BM": m, "BN": n, "BK": chunk, "GROUP": 8, "num_warps": 4, "num_stages": 1}
    stages = 4 * CHUNK // chunk
    BM, BN = (128, 64) if sums else (64 if halved else 128, 128)
    return {"BM": BM, "BN": BN, "BK": chunk, "GROUP": 8, "num_warps": 8, "num_stages": stages}


def new(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Fp8:
    """Unwritten: values of ``shape`` (..., K), stats of all its rows."""
    values = torch.empty(shape, dtype=dtype, device=device)
    return Fp8(values, torch.empty(2, math.prod(shape[:-1]), dtype=torch.float32, device=device))


def new_grouped(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device, columns: int) -> Grouped:
    """The same with a scale for so many ``columns``, a divisor of K."""
    scale = torch.empty(shape[-1] // columns, math.prod(shape[:-1]), dtype=torch.float32, device=device)
    return Grouped(torch.empty(shape, dtype=dtype, device=device), scale)


def quantise(x: Tensor, dtype: torch.dtype) -> Fp8:
    """x (M, K), any strides."""
    (M, K), out = x.shape, new(x.shape, dtype, x.device)
    rows, block = (64, 1024) if runtime.INTERPRET else (16, 256)
    fp8_quantise_kernel[(runtime.cdiv(M, rows),)](
        x, out.values, out.scale, out.norm, M, K, *x.stride(),
        ROWS=rows, BLOCK=block, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def quantise_weight(weight: Tensor) -> tuple[Fp8, Fp8]:
    """weight (N, K), any strides: for forward, and its transpose (K, N) for the gradient of the input. Two copies, since
    matmul instructions of 8-bit operands read the summed side contiguous, and a scale cannot vary along it."""
    return quantise(weight, FORWARD), quantise(weight.t(), FORWARD)


# ---------------------------------------------------------------- matmuls: a (M, K) b (N, K)^T


def _launch(
    a: Fp8 | Grouped, b: Fp8, out: Tensor, epilogue: str, bias: Tensor | None = None, *, pre: Tensor | None = None,
    q: Fp8 | None = None, erf: bool = False, sums: Tensor | None = None,
) -> None:  # fmt: skip
    """``sums`` (N,): of out's columns."""
    (M, K), N = a.values.shape, b.values.shape[0]
    arguments.alike("a's columns", (N, K), b=b.values)
    arguments.alike("the product's rows and columns", (M, N), pre=pre)
    arguments.alike("b's rows", (N,), scale=b.scale, bias=bias)
    arguments.alike("a's rows", (*a.scale.shape[:-1], M), scale=a.scale)
    columns = a.columns if isinstance(a, Grouped) else 0
    halved = erf or columns > 0 or epilogue == "dgelu"
    cfg = config(M, N, halved=halved, sums=sums is not None, chunk=columns or CHUNK)
    rows = runtime.cdiv(M, cfg["BM"])
    partial = column_sums.partial(rows, sums)
    fp8_linear_kernel[(rows * runtime.cdiv(N, cfg["BN"]),)](
        a.values, b.values, a.scale, b.scale, None if bias is None else bias.contiguous(), pre, out, partial,
        *_bounded(q, a, b, bias), M, N, K, EPILOGUE=epilogue, ERF=erf, EVEN_K=K % cfg["BK"] == 0,
        COLUMNS=columns, enable_fp_fusion=True, **cfg,
    )  # fmt: skip
    column_sums.add_up((partial, sums))


def _bounded(q: Fp8 | None, a: Fp8 | Grouped, b: Fp8, bias: Tensor | None) -> tuple[Tensor | None, ...]:
    """What a quantising epilogue takes: its outputs, and what bounds its rows."""
    if q is None or isinstance(a, Grouped):  # whose consumers have no such epilogue
        return (None,) * 5
    max_bias = None if bias is None else torch.linalg.vector_norm(bias, float("inf"), dtype=torch.float32)
    return q.values, q.scale, a.norm, b.norm.amax(), max_bias


def _scaled_mm(a: Fp8, b: Fp8, bias: Tensor | None = None) -> Tensor:
    bias = None if bias is None else bias.to(torch.bfloat16)
    return torch._scaled_mm(
        a.values, b.values.t(), scale_a=a.scale[:, None], scale_b=b.scale[None, :], bias=bias,
        out_dtype=torch.bfloat16, use_fast_accum=False,
    )  # fmt: skip


def matmul(a: Fp8 | Grouped, b: Fp8, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias: (M, N) in bf16. torch._scaled_mm has no scales for groups of columns."""
    forward, library = a.values.dtype == FORWARD, isinstance(a, Fp8) and engine(a.values.device) == "scaled_mm"
    with _recorded("fp8.forward" if forward else "fp8.input_grad", a, b, library):
        if isinstance(a, Fp8) and library:
            return _scaled_mm(a, b, bias)
        out = a.values.new_empty(a.values.shape[0], b.values.shape[0], dtype=torch.bfloat16)
        _launch(a, b, out, "none", bias)
        return out


def _recorded(op: str, a: Fp8 | Grouped, b: Fp8, library: bool) -> AbstractContextManager:
    shape = (a.values.shape[0], *b.values.shape)
    return runtime.record(op, shape, a.values.dtype, "cublas" if library else "triton")


def matmul_gelu(a: Fp8, b: Fp8, bias: Tensor | None, erf: bool) -> tuple[Tensor, Tensor, Fp8]:
    """(gelu(z), z) in bf16, and gelu(z) in fp8, of z = a b^T + bias."""
    shape, device = (a.values.shape[0], b.values.shape[0]), a.values.device
    out, q = a.values.new_empty(shape, dtype=torch.bfloat16), new(shape, FORWARD, device)
    library = engine(device) == "scaled_mm"
    with _recorded("fp8.gelu", a, b, library):
        if library:
            pre = _scaled_mm(a, b, bias)
            sweep(pre, None, out, q, _bounded(q, a, b, bias), erf, None)
        else:
            pre = torch.empty_like(out)
            _launch(a, b, out, "gelu", bias, pre=pre, q=q, erf=erf)
    return out, pre, q


def matmul_dgelu(a: Fp8, b: Fp8, pre: Tensor, erf: bool, sums: Tensor | None = None) -> tuple[Tensor, Fp8]:
    """(a b^T) gelu'(pre), in bf16 and in the gradients' fp8, and in ``sums`` (N,) the sums of its columns."""
    shape, device = (a.values.shape[0], b.values.shape[0]), a.values.device
    out, q = a.values.new_empty(shape, dtype=torch.bfloat16), new(shape, GRADIENT, device)
    if engine(device) == "scaled_mm":
        sweep(pre, _scaled_mm(a, b), out, q, _bounded(q, a, b, None), erf, sums)
    else:
        _launch(a, b, out, "dgelu", pre=pre, q=q, erf=erf, sums=sums)
    return out, q


def sweep(
    z: Tensor, dy: Tensor | None, out: Tensor, q: Fp8, bounded: tuple[Tensor | None, ...], erf: bool,
    sums: Tensor | None,
) -> None:  # fmt: skip
    M, N = z.shape
    arguments.alike("z", z.shape, dy=dy, out=out)
    rows, block = (256, 256) if runtime.INTERPRET else (16, 128)
    blocks = runtime.cdiv(M, rows)
    partial = column_sums.partial(blocks, sums)
    op = "gelu" if dy is None else "gelu_grad"
    with runtime.record(op, (M, N), z.dtype, "triton"):
        fp8_sweep_kernel[(blocks, runtime.cdiv(N, block))](
            z, dy, out, partial, *bounded, M, N,
            BACKWARD=dy is not None, ERF=erf, BM=rows, BN=block, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        column_sums.add_up((partial, sums))


# ---------------------------------------------------------------- forms that are kept beside a tensor
#
# Of a weight from one optimizer step to the next; of an activation or gradient from the kernel that made both to the matmul
# that reads them. The second kind is found by the identity of the tensor, as autograd and the model hand on nothing else:
# ``give`` keeps the form, ``take`` returns it, once. A tensor that was written to since (its version tells), that is a view or
# a sum of others, or that another op made has none, and is then quantised in a pass of its own: slower, the same values.

_made = WeakTensorKeyDictionary()  # a form that no matmul takes goes with its tensor
_weights = WeakTensorKeyDictionary()


def give(tensor: Tensor, form: Fp8 | Grouped) -> None:
    """Keep ``form``, which is ``tensor`` in fp8."""
    _made[tensor] = form, tensor._version


def take(tensor: Tensor, dtype: torch.dtype, grouped: bool = False) -> Fp8 | Grouped | None:
    """The form kept for ``tensor``, if it is still right and its reader takes it: a Grouped one only where ``grouped``. It is
    then forgotten: its memory is free after one matmul."""
    form, version = _made.pop(tensor, (None, None))
    readable = isinstance(form, Fp8) or (grouped and isinstance(form, Grouped))
    return form if readable and version == tensor._version and form.values.dtype == dtype else None


def of_weight(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values and stats of ``weight`` (N, K), and the same of it rounded along its other dimension.

    Kept as working_copy.py keeps its copies, from a step's first micro-batch to its last, also in CUDA graphs."""
    plain = weight.detach()
    if not working_copy.keeps(weight):
        return torch.ops.fastgpt.fp8_quantise_weight(plain)
    if runtime.capturing(weight.device):
        _weights.pop(weight, None)  # the replays to come have copies of their own
        return working_copy.once_in_captures(weight, lambda: torch.ops.fastgpt.fp8_quantise_weight(plain))
    forms = working_copy.kept(_weights, weight)
    if forms is None:
        with torch.inference_mode(False):
            forms = torch.ops.fastgpt.fp8_quantise_weight(plain)
        working_copy.keep(_weights, weight, forms)
    return forms
