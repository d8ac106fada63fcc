"""What is executed: the launch cases of bench/ops, on small tensors with their numbers compared, and at their real shapes.

* ``numbers``: whole grids at small sizes; every check, and outputs and gradients against fp64;
* ``shapes``: the sizes, tables and training steps that ship, of which some CTAs of each launch run: bounds, alignment, order;
* ``far``: tensors of more than 2^31 elements, of which only the touched pages exist: do addresses have 64 bits?
* ``train``: whole optimizer steps of a small GPT against the same model in fp64.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench import ops, parity
from bench.compiler import audit_step
from bench.compiler.capture import compile_for
from bench.emulator.launch import Emulation, emulated
from bench.emulator.memory import Sighting
from bench.emulator.numbers import recorded
from bench.emulator.unwritten import virtual
from bench.ops import adamw, attention, cross_entropy, embedding, fp8, layer_norm, linear, muon, qk_norm_rope, rms_norm
from bench.ops.common import BF16, FP16, FP32, SHORT, backward, leaf
from fastgpt import ops as model_ops
from fastgpt.config import ModelConfig, OptimConfig
from fastgpt.kernels import (
    fused_attn,
    fused_cross_entropy,
    fused_embedding,
    fused_layernorm,
    fused_linear,
    fused_muon,
    fused_qk_rope,
    fused_rmsnorm,
    runtime,
    tuning,
)
from fastgpt.kernels.fp8 import launch as fp8_launch
from fastgpt.kernels.offline import launched_by
from fastgpt.model import GPT
from fastgpt.optim.adamw import FusedAdamW
from fastgpt.optim.build import build_optimizer
from fastgpt.training.step import Stepper

ACCEPTED: dict[tuple[str, str, str], str] = {}
"""(kind, kernel, file:line) of findings that were looked at and change no result, and why."""


@dataclass(frozen=True)
class Case:
    """``run`` returns sentences on what is wrong besides the findings, and the share of the bound that is used."""

    name: str
    run: Callable[[Emulation], tuple[list[str], float]]
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments for ``emulated``."""


@dataclass
class CaseResult:
    case: str
    problems: list[str]
    faults: list[Sighting]
    notes: list[Sighting]
    used: float
    seconds: float
    """CPU time."""
    session: Emulation

    @property
    def passed(self) -> bool:
        return not self.problems and not self.faults


def execute(case: Case, arch: int, **options: Any) -> CaseResult:
    """Run a case for sm_``arch``. What it raises is a problem, too."""
    torch.manual_seed(zlib.crc32(case.name.encode()))
    problems: list[str] = []
    used = 0.0
    began = time.process_time()
    with emulated(arch, **case.options | options) as session:
        try:
            problems, used = case.run(session)
        except Exception as error:
            problems = [f"{type(error).__name__}: {error}"]
    session.reachable = []
    faults = [f for f in session.findings.faults() if (f.kind, f.kernel, _line(f)) not in ACCEPTED]
    return CaseResult(case.name, problems, faults, session.findings.notes(), used, time.process_time() - began, session)


def _line(finding: Sighting) -> str:
    return ":".join(finding.loc.split(":")[:2])


def cases(arch: int) -> list[Case]:
    return [*number_cases(arch), *shape_cases(arch), *far_cases(arch), *train_cases(arch)]


# ---------------------------------------------------------------- numbers

SMALL: dict[Callable, dict[str, Any]] = {
    attention.launch_attention: {"T": 130},
    fp8.launch_fp8_attention: {"T": 130},
    layer_norm.launch_norm: {"rows": 40},
    rms_norm.launch_rms_norm: {"rows": 40},
    qk_norm_rope.launch_qk: {"T": 20},
    cross_entropy.launch_loss: {"N": 8},
    linear.launch_mlp: {"rows": 1104},  # split in two, like more
    muon.launch_muon: {"shapes": ((192, 192), (256, 192), (192, 256))},  # two tiles a side
}
"""Sizes in place of those that a launch case has by default: an emulator's seconds are a GPU's microseconds."""
LARGEST_FP8 = 768
"""Columns of the fp8 linears whose numbers are compared; the wider ones make the same instructions."""


def _with_numbers(run: Callable[[], None], session: Emulation) -> tuple[list[str], float]:
    with recorded(session) as recorder:
        run()
    with mock.patch.object(runtime, "compile_only", None):  # references are PyTorch's
        return recorder.judge()


def _smaller(run: Callable[[], None]) -> Callable[[], None] | None:
    """A launch case at a size that can be emulated; None if there is none."""
    function, given = (run.func, run.keywords) if isinstance(run, partial) else (run, {})
    sizes = {key: size for key, size in SMALL.get(function, {}).items() if given.get(key, size) >= size}
    if function is cross_entropy.launch_loss and given.get("accumulate") == "fp16":
        sizes["V"] = 1000 if given.get("V", 50304) % 64 == 0 else 901
    if function is fp8.launch_fp8 and isinstance(run, partial) and run.args[0] > LARGEST_FP8:
        return None
    return partial(run, **sizes) if sizes else run


def number_cases(arch: int) -> Iterator[Case]:
    for name, run in ops.cases():
        smaller = _smaller(run)
        direct = isinstance(run, partial) and run.func is fp8.launch_fp8_sweep  # no public operation: _fp8_sweep
        if smaller is not None and not direct and _has(arch, name):
            yield Case(f"numbers {name}", partial(_with_numbers, smaller))
    for name, run in _more():
        yield Case(f"numbers {name}", partial(_with_numbers, run))
    yield Case("numbers embedding ids that have no row", _ids_of_no_row)
    yield Case("numbers linear_cross_entropy targets that are no class", _targets_of_no_class)
    if arch >= 89:
        yield Case("numbers fp8 quantise, bit for bit", _fp8_rounding)
        for approximate in ("tanh", "none"):
            yield Case(f"numbers fp8 sweep {approximate}", partial(_fp8_sweep, approximate))


def _more() -> Iterator[tuple[str, Callable[[], None]]]:
    """Sizes, options and configs that no launch case has, as they make no other binary."""
    attend = attention.launch_attention
    for T in (1, 17, 64, 257):
        yield f"attention bf16 D64 T{T}", partial(attend, BF16, 64, T=T)
    for dtype in (FP16, FP32):
        yield f"attention {SHORT[dtype]} D80 T17", partial(attend, dtype, 80, T=17)
        everything: dict[str, Any] = {"docs": True, "dropout_p": 0.1, "window": 70}
        yield f"attention {SHORT[dtype]} D64 grouped, all options", partial(attend, dtype, 64, T=130, H=4, **everything)
    yield "attention bf16 D64 window both ways", partial(attend, BF16, 64, T=130, window=40, causal=False)
    yield "attention bf16 D64 window 300", partial(attend, BF16, 64, T=257, window=300)
    # With a window: PyTorch's own causal attention on a CPU gives NaN for a negative scale.
    yield "attention bf16 D64 negative scale", partial(attend, BF16, 64, T=64, scale=-0.2, window=40)
    yield "attention fp16-fast D80 dropout", partial(attend, FP16, 80, T=130, dropout_p=0.1, accumulate="fp16")
    for name, lengths, T_q, causal in (
        ("", (40, 97), 17, True),
        (" of nothing", (0, 64), 17, True),
        (" decode", (1, 128), 1, True),
    ):
        yield f"attention bf16 D64 kv_len{name}", partial(_cached, BF16, lengths, T_q, causal)
    yield "attention fp32 D64 kv_len", partial(_cached, FP32, (20, 60), 17, True)
    yield "attention bf16 D64 cross", partial(_cached, BF16, None, 33, False)
    yield "attention bf16 between two linears with biases", partial(_block, BF16)
    for choice in ("rows<=16384", "rows<=262144", "rows>1048576"):
        for dropout in ("", "dropout "):
            kernels_of = ("forward", "backward_q", "backward_kv")
            configs = _table({f"attention.{kernel}": f"D64 {dropout}{choice}" for kernel in kernels_of})
            run = partial(attend, BF16, 64, T=256, dropout_p=0.1 if dropout else 0.0)
            yield f"attention bf16 D64 as in the table, {dropout}{choice}", partial(_forced, configs, run)
    for C, rows in ((1, 33), (7, 33), (513, 33), (768, 1), (384, 1000)):
        yield f"layer_norm fp32 C{C} {rows} rows", partial(layer_norm.launch_norm, C, FP32, rows=rows, bias=True)
        yield f"rms_norm fp32 C{C} {rows} rows", partial(rms_norm.launch_rms_norm, C, FP32, FP32, mixed=True, rows=rows)
    for D, T in ((2, 5), (6, 33), (250, 3)):
        yield f"qk_norm_rope fp32 D{D} T{T}", partial(qk_norm_rope.launch_qk, FP32, D, T=T, position=7)
    yield "qk_norm_rope fp16 scale 0", partial(qk_norm_rope.launch_qk, FP16, 64, T=5, scale=0.0)
    for V in (256, 5003):
        loss = partial(cross_entropy.launch_loss, V=V, N=70, C=64)
        yield f"linear_cross_entropy bf16 V{V}", partial(loss, BF16, bias=True)
        yield f"linear_cross_entropy fp16 V{V} sum", partial(loss, FP16, reduction="sum")
    yield "linear_cross_entropy bf16 one row", partial(cross_entropy.launch_loss, BF16, V=1000, N=1)
    everything = {"stream": FP32, "dropout_p": 0.1, "approximate": "none"}
    tiles = {"block_m": 128, "block_n": 128, "block_k": 64, "group": 8, "num_warps": 8, "num_stages": 3}
    gelu = {**tiles, "block_n": 64, "block_k": 32, "num_warps": 4}
    for splits in (1, 2, 5):
        grads = {f"linear.{kind}": {**tiles, "splits": splits} for kind in ("weight_grad", "weight_grad_bias")}
        configs = {"linear.gelu": gelu, "linear.dgelu": tiles, "linear.residual": tiles, **grads}
        mlp = partial(linear.launch_mlp, BF16, rows=333)
        yield f"linear bf16 mlp in tiles, {splits} splits", partial(_forced, configs, mlp)
        odd = partial(mlp, C=99, in_place=True, **everything)
        yield f"linear bf16 mlp in tiles, odd, {splits} splits", partial(_forced, configs, odd)
    small = {"block_m": 64, "block_n": 64, "block_k": 32, "group": 8, "num_warps": 8, "num_stages": 2}
    fp32 = {f"linear.{kind}": small for kind in ("gelu", "dgelu", "residual")}
    fp32 |= {f"linear.{kind}": {**small, "splits": 1} for kind in ("weight_grad", "weight_grad_bias")}
    yield "linear fp32 mlp in tiles", partial(_forced, fp32, partial(linear.launch_mlp, FP32, rows=130))
    wide = partial(linear.launch_mlp, FP16, C=384, rows=256, accumulate="fp16")
    yield "linear fp16-fast mlp C384", wide
    chunks = {f"linear_fast.{kind}": {**tiles, "chunk": 2} for kind in ("none", "bias")}
    yield "linear fp16-fast mlp in chunks of 128", partial(_forced, chunks, wide)
    for C, T, position in ((384, 1, 5), (384, 64, 0), (99, 40, 3)):
        run = partial(embedding.launch_embedding, FP32, C, T=T)
        yield f"embedding C{C} T{T} from position {position}", partial(run, position=position)
    yield "embedding C384 one token repeated", _one_token
    yield "adamw fp32 fp16 copy", partial(adamw.launch_adamw, FP32, copy=FP16)
    yield "adamw bf16 unaligned", partial(adamw.launch_adamw, BF16, offset=3)
    yield "adamw fp32 NaN is skipped", _skipped_step


def _table(wanted: dict[str, str]) -> dict[str, tuning.Config]:
    """Configs of the RTX 4070's shipped table in bf16, by kernel, for these buckets."""
    entries = tuning.read(tuning.SHIPPED / "sm89_46.json").entries
    return {kernel: entries[tuning.Key(kernel, "bf16", bucket)].config for kernel, bucket in wanted.items()}


def _forced(configs: dict[str, tuning.Config], run: Callable[[], None]) -> None:
    with tuning.forced(configs):
        run()


def _cached(dtype: torch.dtype, lengths: tuple[int, ...] | None, T_q: int, causal: bool) -> None:
    """T_q queries against 128 keys, of which the first ``lengths`` of each sequence exist."""
    q, k, v = (leaf(2, T, 2, 64, dtype=dtype) for T in (T_q, 128, 128))
    kv_len = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    backward(fused_attn.attention(q, k, v, causal=causal, kv_len=kv_len))


def _block(dtype: torch.dtype, C: int = 128, T: int = 130) -> None:
    """Attention forms the sums of its gradient's columns for the linear before it."""
    w_qkv, w_proj = leaf(3 * C, C, dtype=FP32), leaf(C, C, dtype=FP32)
    qkv = fused_linear.linear(leaf(1, T, C, dtype=dtype), w_qkv, leaf(3 * C, dtype=FP32))
    backward(fused_linear.linear(fused_attn.qkv_attention(qkv, 2), w_proj, leaf(C, dtype=FP32)))


def _one_token() -> None:
    tables = [torch.randn(rows, 384).requires_grad_() for rows in (8, 300)]
    backward(fused_embedding.embedding(torch.full((2, 300), 3), *tables))


def _skipped_step() -> None:
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((96, 100), (3,))]
    for p in params:
        p.grad = torch.full_like(p, float("nan"))
    FusedAdamW(params, max_grad_norm=1.0).step()


def _ids_of_no_row(session: Emulation, V: int = 50, C: int = 384) -> tuple[list[str], float]:
    """Ids outside of the table, which nobody looks for on a GPU: NaN there, no gradient, nothing accessed elsewhere."""
    idx = torch.randint(0, V, (2, 33))
    idx[0, :6] = torch.tensor([V, -1, 2**31, 2**40, -(2**40), V + 7])
    wte, wpe = torch.randn(V, C).requires_grad_(), torch.randn(40, C).requires_grad_()
    with mock.patch.object(fused_embedding, "_check_ids", lambda *_: None):
        x = fused_embedding.embedding(idx, wte, wpe)
        upstream = torch.randn(x.shape)
        x.backward(upstream)
    wrong = (idx < 0) | (idx >= V)
    exact = torch.zeros(V, C, dtype=torch.float64).index_add(0, idx[~wrong], upstream[~wrong].double())
    problems = [] if torch.equal(torch.isnan(x).any(-1), wrong) else ["NaN elsewhere than at the wrong ids"]
    assert wte.grad is not None
    return problems + ([] if torch.allclose(wte.grad.double(), exact, atol=1e-5) else ["dwte is wrong"]), 0.0


def _targets_of_no_class(session: Emulation, V: int = 1000) -> tuple[list[str], float]:
    """Targets outside of the vocabulary: NaN there, nothing accessed elsewhere."""
    x, weight = torch.randn(12, 64).to(BF16).requires_grad_(), torch.randn(V, 64).to(BF16).requires_grad_()
    target = torch.tensor([0, V - 1, V, -1, 2**40, -(2**40), 5, -100, V + 24, 3, 4, 6])
    with mock.patch.object(fused_cross_entropy, "_check_targets", lambda *_: None):
        losses = fused_cross_entropy.linear_cross_entropy(x, weight, target, reduction="none")
        losses.backward(torch.ones(12))
    wrong = ((target < 0) | (target >= V)) & (target != -100)
    assert x.grad is not None
    found = {"loss": torch.isnan(losses), "dx": torch.isnan(x.grad.float()).any(1)}
    return [
        f"{name} is NaN elsewhere than at the wrong targets" for name, nan in found.items() if not nan.equal(wrong)
    ], 0.0


def _fp8_rounding(session: Emulation, rows: int = 70, K: int = 160) -> tuple[list[str], float]:
    """The quantiser's bytes are those of PyTorch's cast, whatever instructions the compiler takes for it."""
    problems = []
    for kind, largest in ((fp8_launch.FORWARD, 448.0), (fp8_launch.GRADIENT, 57344.0)):
        x = torch.randn(rows, K).to(BF16)
        x[3], x[5] = 0, x[5] * 1e-6
        scale = (x.float().abs().amax(1) / largest).clamp(min=torch.finfo(FP32).tiny)
        wanted = (x.float() * (1 / scale)[:, None]).clamp(-largest, largest).to(kind)
        got = fp8_launch.quantise(x, kind)
        differ = int((got.values.view(torch.uint8) != wanted.view(torch.uint8)).sum())
        if differ or not torch.allclose(got.scale, scale, rtol=1e-6):
            problems.append(f"{kind}: {differ} of {wanted.numel()} bytes differ from PyTorch's, or scales do")
    return problems, 0.0


def kernels(arch: int, far: bool = False) -> set[tuple[str, str]]:
    """(file, function) of every kernel that the launch cases reach, small as they are here, or that is tried with ``far``
    addresses. Nothing is compiled or executed."""
    runs = far_runs(arch).values() if far else (_smaller(run) for name, run in ops.cases() if _has(arch, name))
    found = set()

    def note(function: Any, *args: Any, **options: Any) -> None:
        found.add((function.module.rpartition(".")[2], function.__name__))

    with compile_for(arch), launched_by(note), recorded(Emulation(), numbers=False):
        for run in runs:
            if run is not None:
                run()
    return found


def _has(arch: int, name: str) -> bool:
    """Whether the card can run the launch case."""
    return arch >= 89 or "fp8" not in name


def _fp8_sweep(approximate: str, session: Emulation, rows: int = 70, C: int = 256) -> tuple[list[str], float]:
    """What follows torch._scaled_mm: GELU and its gradient, in bf16 and in fp8."""
    z, dy = torch.randn(rows, C).to(BF16), torch.randn(rows, C).to(BF16)
    wide = z.double().requires_grad_()
    value = torch.nn.functional.gelu(wide, approximate=approximate)
    (slope,) = torch.autograd.grad(value, wide, dy.double())
    bounds, problems = (z.float().norm(dim=1), torch.tensor(1.3), None), []
    for upstream, kind, exact in ((None, fp8_launch.FORWARD, value.detach()), (dy, fp8_launch.GRADIENT, slope)):
        q, out, sums = fp8_launch.new(z.shape, kind, z.device), torch.empty_like(z), torch.empty(C)
        given = None if upstream is None else sums
        fp8_launch.sweep(z, upstream, out, q, (q.values, q.scale, *bounds), approximate == "none", given)
        found = {"out": (out, 0.01), "fp8": (q.values.float() * q.scale[:, None], 0.1)}
        for name, (got, allowed) in found.items():
            if not (rms := parity.errors(got, exact)[0]) <= allowed:
                problems.append(f"{name} in {kind}: rms error {rms:.3g}, allowed {allowed}")
        if given is not None and not torch.allclose(given, out.float().sum(0), atol=1e-3):
            problems.append("the sums of the columns are others")
    return problems, 0.0


# ---------------------------------------------------------------- real shapes, some CTAs

CTAS = 8
"""CTAs that are run of each launch at a real shape: the first, the last, and neighbours from between."""


def _sampled(run: Callable[[], None], session: Emulation) -> tuple[list[str], float]:
    with recorded(session, numbers=False):
        run()
    return [], 0.0


def shape_cases(arch: int) -> Iterator[Case]:
    options = {"ctas": CTAS, "fill": False}
    steps = [*audit_step.shipped_steps(), *audit_step.other_steps()]
    for name, run in (*ops.cases(), *ops.table_cases(arch), *steps):
        if _has(arch, name):
            yield Case(f"shapes {name}", partial(_sampled, run), options)


# ---------------------------------------------------------------- more than 2^31 elements

FAR = 2**31 + 2**21
"""Elements. Less than 2^32: an index in 32 bits is then negative, never by chance right."""


def far_cases(arch: int) -> Iterator[Case]:
    options = {"ctas": CTAS, "fill": False, "twice": False, "sms": 2048}  # many SMs: a program loops over few rows
    for name, run in far_runs(arch).items():
        yield Case(f"far {name}", partial(_sampled, run), options)


def far_runs(arch: int) -> dict[str, Callable[[], None]]:
    """Every launch that may have such tensors. The loss has none: it works in chunks of tokens."""
    C = 768
    rows = FAR // C

    def far(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return virtual(*shape, dtype=dtype).requires_grad_()

    def differentiate(outputs: tuple[Tensor, ...], *inputs: Tensor) -> None:
        torch.autograd.grad(outputs, inputs, [virtual(*out.shape, dtype=out.dtype) for out in outputs])

    def norm() -> None:
        x, residual, weight = far(rows, C), far(rows, C, dtype=FP32), torch.ones(C, requires_grad=True)
        y, total = fused_layernorm.layer_norm(x, weight, residual=residual, dropout_p=0.1, out_dtype=BF16)
        differentiate((y, total), x, weight, residual)

    def mixed_norm() -> None:
        tensors = far(rows, C), far(rows, C, dtype=FP32), far(rows, C, dtype=FP32)
        factors = torch.ones(2, requires_grad=True)
        x, residual, x0 = tensors
        mix: dict[str, Any] = {"residual": residual, "scale": factors[0], "x0": x0, "x0_scale": factors[1]}
        outputs = fused_rmsnorm.rms_norm(x, dropout_p=0.1, out_dtype=BF16, **mix)
        differentiate(outputs, *tensors, factors)

    def attend() -> None:
        qkv = far(FAR // (1024 * 3 * C) + 1, 1024, 3 * C)
        differentiate((fused_attn.qkv_attention(qkv, 12),), qkv)

    def turn() -> None:
        qkv, tables = far(FAR // (1024 * 3 * C) + 1, 1024, 3 * C), [torch.zeros(1024, 32) for _ in range(2)]
        differentiate((fused_qk_rope.qk_norm_rope(qkv, 12, 12, *tables),), qkv)

    def cache() -> None:
        k, v = (virtual(1, FAR // (12 * 64), 12, 64, dtype=BF16) for _ in range(2))
        with torch.no_grad():  # a window: few of the keys are read, those at the end
            fused_attn.attention(virtual(1, 1, 12, 64, dtype=BF16), k, v, window=512)

    def embed() -> None:
        ids = torch.randint(0, 50304, (rows // 1024 + 1, 1024))
        wte, wpe = (torch.zeros(size, C, requires_grad=True) for size in (50304, 1024))
        differentiate((fused_embedding.embedding(ids, wte, wpe, out_dtype=BF16),), wte, wpe)

    def sweep() -> None:
        seed = torch.zeros(1, dtype=torch.int64)
        torch.ops.fastgpt.pointwise_bwd(far(rows, C), None, seed, 0.1, None, BF16, BF16)
        torch.ops.fastgpt.pointwise_bwd(far(rows, C), virtual(rows, C, dtype=BF16), None, 0.0, "gelu_erf", BF16, BF16)

    def product(kind: str, N: int, K: int, tokens: int) -> None:
        linear.product(kind, FP16, True, N, K, tokens)()

    def update() -> None:
        p = torch.nn.Parameter(virtual(FAR, dtype=FP32))
        p.grad = virtual(FAR, dtype=FP32)
        with mock.patch.object(torch, "zeros_like", lambda x, **options: virtual(*x.shape, dtype=FP32)):  # the moments
            FusedAdamW([p], max_grad_norm=1.0).step()

    def muon() -> None:
        """One matrix, its direction by rows and by columns, and a batch for the iterations."""
        hyper = torch.tensor([0.02, 0.95, 0.01], dtype=torch.float64)
        shape = (FAR // 2048, 2048)
        for tall in (False, True):
            direction = virtual(*shape[:: -1 if tall else 1], dtype=BF16)
            direction = direction.mT if tall else direction
            p, grad, momentum = (virtual(*shape, dtype=FP32) for _ in range(3))
            fused_muon.muon_momentum(grad, momentum, direction, hyper, nesterov=True)
            copy = virtual(*shape, dtype=BF16)
            fused_muon.muon_update(p, direction, hyper, 0.2, cautious=True, copy=copy)
        batch = virtual(FAR // 256**2 + 1, 256, 256, dtype=BF16)
        with mock.patch.object(torch.linalg, "vector_norm", lambda x, **options: torch.ones(len(x))):  # it reads all
            fused_muon.orthogonalize(batch, steps=1)

    def quantised() -> None:
        a = fp8_launch.quantise(virtual(rows, C, dtype=BF16), fp8_launch.FORWARD)
        fp8_launch.matmul(a, fp8_launch.quantise(virtual(C, C, dtype=BF16), fp8_launch.FORWARD))
        z, dy, out = (virtual(rows, C, dtype=BF16) for _ in range(3))
        bounds = torch.ones(rows), torch.ones(()), None
        fp8_launch.sweep(z, dy, out, a, (a.values, a.scale, *bounds), False, None)

    runs: dict[str, Callable[[], None]] = {
        "layer_norm": norm,
        "rms_norm": mixed_norm,
        "attention": attend,
        "attention cache": cache,
    }
    runs |= {"embedding": embed, "sweeps": sweep, "adamw": update, "qk_norm_rope": turn, "muon": muon}
    for kind in ("none", "bias", "residual", "gelu", "dgelu"):
        runs[f"linear fp16-fast {kind}"] = partial(product, kind, N=C, K=64, tokens=rows)
    for kind in ("weight_grad", "weight_grad_bias"):
        runs[f"linear fp16-fast {kind}"] = partial(product, kind, N=FAR // 2048, K=16, tokens=2048)
    if arch >= 89:
        runs["fp8"] = quantised
    return runs


# ---------------------------------------------------------------- training steps


def train_cases(arch: int) -> Iterator[Case]:
    for precision in ("fp32", "bf16", "fp16", "fp16-fast", *(("fp8",) if arch >= 89 else ())):
        for bias in (False, True):
            yield Case(f"train {precision}{' bias' if bias else ''}", partial(_train, precision, bias=bias))
    yield Case("train bf16 bias dropout", partial(_train, "bf16", bias=True, dropout=0.1))
    yield Case("train bf16 documents", partial(_train, "bf16", documents=True))
    yield Case("train bf16 modern", partial(_train, "bf16", documents=True, modern=True))


def _train(
    precision: str,
    session: Emulation,
    bias: bool = False,
    dropout: float = 0.0,
    documents: bool = False,
    modern: bool = False,
) -> tuple[list[str], float]:
    """Two optimizer steps of a small GPT, two micro-batches each, against the same model in fp64 with torch's AdamW, a modern
    one with plain PyTorch's Muon: losses, gradient norms and updates, no further off than twice plain PyTorch in bf16."""
    C, T, steps = 128, 64, 2
    shape = ModelConfig(n_layer=2, n_head=2, n_embd=C, block_size=T, vocab_size=256, bias=bias, dropout=dropout)
    optim = OptimConfig()
    if modern:
        parts: dict[str, Any] = dict.fromkeys(
            ("qk_norm", "embedding_norm", "residual_scalars", "value_embeddings"), True
        )
        parts |= {"rotary_base": 1e4, "activation": "relu2", "tied_head": False, "softcap": 15.0}
        shape = replace(shape, family="modern", **parts)
        optim = OptimConfig(optimizer="muon", muon_normuon=True, muon_cautious=True, muon_weight_decay=0.1)

    def run(kernels: str, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """((steps, 2) of loss and gradient norm, all parameters' updates) in fp64."""
        torch.manual_seed(3)
        model = GPT(shape, model_ops.get(kernels, kind))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4 if p.dim() == 2 and not modern else 1)  # so that something happens in two steps of AdamW
        model = model.to(dtype)
        start = torch.cat([p.detach().double().flatten() for p in model.parameters()])
        scaler = torch.amp.GradScaler("cpu", enabled=kernels == "triton" and model_ops.scales_loss(kind))
        stepper = Stepper(model, model, build_optimizer(model, optim, kernels), scaler, kind, optim.grad_clip)
        stepper.adds_in_place = kernels == "triton"
        torch.manual_seed(4)
        seen = []
        for _ in range(steps):
            batches = []
            for _ in range(2):
                tokens = torch.randint(0, 256, (2, T + 1))
                ids = (torch.randint(0, 3, (2, T), dtype=torch.int32).sort(dim=1).values,) if documents else ()
                batches.append((tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), *ids))
            seen.append(torch.stack([torch.as_tensor(x).detach().double() for x in stepper(batches, 2, 1e-3)]))
        return torch.stack(seen), torch.cat([p.detach().double().flatten() for p in model.parameters()]) - start

    with recorded(session, numbers=False, integers=False):
        mine, moved = run("triton", precision, FP32)
    if dropout:  # the eager model draws other masks
        return [] if mine.isfinite().all() else [f"losses and gradient norms are {mine.tolist()}"], 0.0
    with mock.patch.object(runtime, "compile_only", None):
        exact, exact_moved = run("eager", "fp32", torch.float64)
        plain, plain_moved = run("eager", "fp32" if precision == "fp32" else "bf16", FP32)
    coarse = 6.0 if precision == "fp8" else 2.0
    errors = [((found - exact) / exact).abs().amax(0) for found in (mine, plain)]
    updates = [((found - exact_moved).norm() / exact_moved.norm()).item() for found in (moved, plain_moved)]
    rows = [
        ("loss", errors[0][0].item(), coarse * (errors[1][0].item() + 2e-3)),
        ("gradient norm", errors[0][1].item(), coarse * (errors[1][1].item() + 2e-3)),
        ("updates", updates[0], coarse * updates[1] + 1e-2),
    ]
    problems = [
        f"{name}: error {error:.3g}, allowed {allowed:.3g}" for name, error, allowed in rows if not error <= allowed
    ]
    return problems, max(error / allowed for _, error, allowed in rows)
