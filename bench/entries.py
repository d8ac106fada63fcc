"""The operations that bench.kernels times: their inputs, least work, parity check, and peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.parity import assert_parity, check
from bench.timing import Work
from fastgpt import anatomy, flops
from fastgpt.kernels import reference

OURS = "triton"


@dataclass(frozen=True)
class Sizes:
    """Shapes of the entries: GPT-2 124M's at a micro-batch of 8 x 1024 and, for attention, 16 x 1024. SWEEPS has more."""

    rows: int = 8192
    C: int = 768
    V: int = 50304
    B: int = 16
    T: int = 1024
    H: int = 12
    D: int = 64
    n_layer: int = 12
    dtype: torch.dtype = torch.bfloat16
    parity_rows: int = 1024
    """fp64 references are large: they get this many tokens, and one sequence."""


TINY = Sizes(rows=64, C=64, V=256, B=1, T=64, H=2, D=32, n_layer=1, dtype=torch.float32, parity_rows=64)


@dataclass(frozen=True)
class Entry:
    """One operation. ``parity`` raises AssertionError; ``variants`` are makers of what is timed, by name, ours first."""

    name: str
    shape: str
    work: flops.Work
    parity: Callable[[], None]
    variants: dict[str, Callable[[], Work]]


def forward_backward(op: Callable, device: torch.device, make: Callable[[], dict[str, Tensor]]) -> Work:
    """``op(**inputs)`` and the gradients of all its floating inputs."""
    inputs = {key: x.requires_grad_(x.is_floating_point()) for key, x in make().items()}
    wanted = [x for x in inputs.values() if x.requires_grad]

    def forward() -> tuple[Tensor, ...]:
        outputs = op(**inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    upstream = tuple(torch.randn_like(out) for out in forward())  # with gradients: torch.compile then compiles once
    return lambda: torch.autograd.grad(forward(), wanted, upstream)


def peers(eager: Callable, compiled: bool, **others: Callable | None) -> dict[str, Callable]:
    """The functions to compare with: eager, torch.compile of it if asked, and whichever others are available."""
    found = {"eager": eager}
    if compiled:
        found["compile"] = torch.compile(eager)
    return found | {name: op for name, op in others.items() if op is not None}


def timed(ops: dict[str, Callable], device: torch.device, inputs: Callable) -> dict[str, Callable[[], Work]]:
    """The variants of an entry that are given these inputs."""
    return {name: partial(forward_backward, op, device, inputs) for name, op in ops.items()}


def embedding(size: Sizes, device: torch.device, compiled: bool) -> Entry:
    """fp32 tables and residual stream, as in every precision; the gradients dense, as autograd wants them."""
    from fastgpt.kernels.fused_embedding import embedding as ours

    def inputs(rows: int = size.rows) -> dict[str, Tensor]:
        T = min(size.T, rows)
        tokens = torch.randint(size.V, (rows // T, T), device=device)
        return {
            "idx": tokens,
            "wte": torch.randn(size.V, size.C, device=device),
            "wpe": torch.randn(T, size.C, device=device),
        }

    rows, C, distinct, T = size.rows, size.C, min(size.V, size.rows), min(size.T, size.rows)
    positions = flops.Work(0, 3 * 4 * T * C + 4 * size.V * C)  # read, cleared and written; the table's gradient cleared
    return Entry(
        "embedding",
        f"{rows} x {C} of {size.V}",
        total(flops.embedding_forward(rows, distinct, C, 4), flops.embedding_backward(rows, distinct, C, 4), positions),
        lambda: check(ours, reference.embedding, inputs(size.parity_rows)),
        timed({OURS: ours} | peers(reference.embedding, compiled), device, inputs),
    )


def layer_norm(size: Sizes, device: torch.device, compiled: bool) -> Entry:
    """bf16 in and out; weight and bias are fp32 for ours, and bf16 for the peers, which would have to cast them."""
    from fastgpt.kernels.fused_layernorm import layer_norm as ours

    def inputs(rows: int = size.rows) -> dict[str, Tensor]:
        x = torch.randn(rows, size.C, device=device).to(size.dtype)
        return {"x": x, "weight": torch.rand(size.C, device=device), "bias": torch.rand(size.C, device=device)}

    def of_one_dtype() -> dict[str, Tensor]:
        return {name: tensor.to(size.dtype) for name, tensor in inputs().items()}

    liger = liger_function("liger_layer_norm")
    ops = peers(
        reference.layer_norm,
        compiled,
        liger=liger and (lambda x, weight, bias: liger(x, weight, bias, 1e-5)),
    )
    e = size.dtype.itemsize
    forward = flops.layer_norm_forward(size.rows, size.C, e, bias=True)
    backward = flops.layer_norm_backward(size.rows, size.C, e, bias=True)
    return Entry(
        "layer_norm",
        f"{size.rows} x {size.C}",
        total(forward, backward),
        lambda: check(ours, reference.layer_norm, inputs(size.parity_rows)),
        timed({OURS: ours}, device, inputs) | timed(ops, device, of_one_dtype),
    )


def layer_norm_residual(size: Sizes, device: torch.device, compiled: bool) -> Entry:
    """As in a block under autocast: low-precision branch, fp32 residual stream, both outputs with a gradient."""
    from fastgpt.kernels.fused_layernorm import layer_norm as fused

    def inputs(rows: int = size.rows) -> dict[str, Tensor]:
        x, residual = torch.randn(2, rows, size.C, device=device)
        return {"x": x.to(size.dtype), "residual": residual, "weight": torch.rand(size.C, device=device)}

    def ours(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        return fused(x, weight, residual=residual)

    def eager(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        return reference.layer_norm(x, weight, residual=residual)

    e, rows, C = size.dtype.itemsize, size.rows, size.C
    # Forward reads x and residual, writes y and the sum; backward reads dy, dsum and the sum, writes dx and dresidual.
    moved = rows * C * ((2 * e + 2 * 4) + (2 * e + 3 * 4)) + 2 * 8 * rows + 3 * 4 * C
    return Entry(
        "layer_norm + residual",
        f"{rows} x {C}",
        flops.Work(0, moved),
        lambda: check(ours, eager, inputs(size.parity_rows)),
        timed({OURS: ours} | peers(eager, compiled), device, inputs),
    )


def attention(size: Sizes, device: torch.device, compiled: bool) -> Entry:
    """Packed qkv to packed dqkv: the peers' transposes and copies are part of their time."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from fastgpt.kernels.fused_attn import qkv_attention as fused

    def inputs(B: int = size.B, H: int = size.H) -> dict[str, Tensor]:
        return {"qkv": torch.randn(B, size.T, 3 * H * size.D, device=device).to(size.dtype)}

    def eager(qkv: Tensor) -> Tensor:
        return reference.qkv_attention(qkv, qkv.shape[-1] // (3 * size.D))

    def backend(which: SDPBackend) -> Callable:
        def op(qkv: Tensor) -> Tensor:
            with sdpa_kernel(which):
                return reference.qkv_attention(qkv, size.H)

        return op

    def ours(qkv: Tensor) -> Tensor:
        return fused(qkv, qkv.shape[-1] // (3 * size.D))

    ops = peers(eager, compiled)
    if device.type == "cuda":
        names = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
        names["efficient"] = SDPBackend.EFFICIENT_ATTENTION
        ops |= {f"sdpa {name}": backend(which) for name, which in names.items()}
    shape = (size.B, size.T, size.H, size.D, size.dtype.itemsize)
    return Entry(
        "attention",
        f"B={size.B} T={size.T} H={size.H} D={size.D}, causal",
        total(flops.attention_forward(*shape), flops.attention_backward(*shape)),
        # Scores in fp64 are 100 MB a head at T = 4096, several times over: fewer heads where sequences are long.
        lambda: check(
            ours, eager, inputs(1, max(1, size.H * 1024**2 // max(size.T, 1024) ** 2)), operand_dtype=size.dtype
        ),
        timed({OURS: ours} | ops, device, inputs),
    )


def linear_cross_entropy(size: Sizes, device: torch.device, compiled: bool) -> Entry:
    """Mean loss over the vocabulary; the peers hold the logits, in fp32 for the loss."""
    from fastgpt.kernels.fused_cross_entropy import linear_cross_entropy as ours

    def inputs(rows: int = size.rows) -> dict[str, Tensor]:
        x = torch.randn(rows, size.C, device=device).to(size.dtype)
        weight = (0.02 * torch.randn(size.V, size.C, device=device)).to(size.dtype)
        return {"x": x, "weight": weight, "target": torch.randint(size.V, (rows,), device=device)}

    liger = liger_function("liger_fused_linear_cross_entropy")
    ops = peers(
        reference.linear_cross_entropy,
        compiled,
        **_torch_linear_cross_entropy(),
        liger=liger and (lambda x, weight, target: liger(x, weight, target)),
    )
    return Entry(
        "linear_cross_entropy",
        f"{size.rows} x {size.C} x {size.V}",
        flops.linear_cross_entropy(size.rows, size.C, size.V, size.dtype.itemsize, grad_size=size.dtype.itemsize),
        lambda: check(ours, reference.linear_cross_entropy, inputs(size.parity_rows), operand_dtype=size.dtype),
        timed({OURS: ours} | ops, device, inputs),
    )


def adamw(size: Sizes, device: torch.device, compiled: bool) -> Entry:
    """Clip and update of all parameters of a GPT-2, fp32; the peer is torch's fused AdamW after clip_grad_norm_."""
    from fastgpt.optim import FusedAdamW

    shapes = list(anatomy.parameters(anatomy.Shape(size.n_layer, size.H, size.C, size.T, size.V)).values())
    options: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}

    def parameters(shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
        made = [torch.nn.Parameter(0.02 * torch.randn(shape, device=device)) for shape in shapes]
        for p in made:
            p.grad = torch.randn_like(p)
        return made

    def ours(params: list) -> Work:
        return FusedAdamW(params, max_grad_norm=1.0, **options).step

    def torchs(params: list) -> Work:
        optimizer = torch.optim.AdamW(params, fused=True, **options)

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()

        return step

    def parity() -> None:
        start = parameters(shapes[2:8])  # the first block
        results = []
        for make, dtype in ((ours, torch.float32), (torchs, torch.float32), (torchs, torch.float64)):
            params = [torch.nn.Parameter(p.detach().to(dtype, copy=True)) for p in start]
            step = make(params)
            for _ in range(3):
                for p, q in zip(params, start):
                    assert q.grad is not None
                    p.grad = q.grad.to(dtype, copy=True)  # clip_grad_norm_ scales in place
                step()
            results.append(params)
        for i, (mine, theirs, exact) in enumerate(zip(*results)):
            assert_parity(f"parameter {i}", mine.detach(), exact, theirs)

    count = sum(torch.Size(shape).numel() for shape in shapes)
    return Entry(
        "adamw + clip",
        f"{count / 1e6:.1f} M parameters",
        flops.adamw(count),
        parity,
        {OURS: lambda: ours(parameters(shapes)), "torch fused": lambda: torchs(parameters(shapes))},
    )


ENTRIES: tuple[Callable[[Sizes, torch.device, bool], Entry], ...] = (
    embedding,
    layer_norm,
    layer_norm_residual,
    attention,
    linear_cross_entropy,
    adamw,
)


def shapes(make: Callable, base: Sizes) -> list[Sizes]:
    """The sweep of one of ENTRIES around ``base``, which comes first, and each shape once."""
    return list(dict.fromkeys([base, *(replace(base, **changed) for changed in SWEEPS[make.__name__])]))


_ROWS_AND_WIDTHS: list[dict[str, Any]] = [{"C": C} for C in (384, 768, 1024, 1600)] + [{"rows": 1024}, {"rows": 32768}]
SWEEPS: dict[str, list[dict[str, Any]]] = {
    "embedding": _ROWS_AND_WIDTHS,
    "layer_norm": _ROWS_AND_WIDTHS,
    "layer_norm_residual": _ROWS_AND_WIDTHS,
    # 16,384 tokens and a width of 768 throughout.
    "attention": [
        *({"T": T, "B": 16384 // T} for T in (512, 1024, 2048, 4096)),
        *({"D": D, "H": 768 // D} for D in (32, 64, 128)),
    ],
    "linear_cross_entropy": [{"C": C} for C in (384, 768, 1024, 1600)] + [{"rows": 2048}, {"rows": 16384}],
    "adamw": [{"C": 384}, {"C": 768}, {"C": 1024, "n_layer": 24}],  # GPT-2 40M, 124M, 350M
}
"""What differs from the base, by entry."""


def total(*parts: flops.Work) -> flops.Work:
    return flops.Work(sum(p.flops for p in parts), sum(p.bytes for p in parts))


def _torch_linear_cross_entropy() -> dict[str, Callable]:
    """PyTorch's own fused loss, whole and in chunks, where this PyTorch has it."""
    op = getattr(torch.nn.functional, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if op is None:
        return {}
    found = {"torch linear_ce": lambda x, weight, target: op(x, weight, target)}
    if options is not None:
        found["torch linear_ce chunked"] = lambda x, weight, target: op(x, weight, target, options=options())
    return found


def liger_function(name: str) -> Any:
    """A function of Liger-Kernel, or None where it is not installed."""
    try:
        from liger_kernel.transformers import functional
    except ImportError:
        return None
    return getattr(functional, name, None)
