"""RMS norm against its fp64 reference. What its kernels share with layer norm's is tested in test_fused_layernorm.py, too."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from bench import parity
from fastgpt.kernels import fused_layernorm, reference, runtime
from fastgpt.kernels.fused_rmsnorm import rms_norm
from tests.kernels.test_fused_layernorm import BF16, FP16, FP32, use_geometry


def check(arguments, op=rms_norm, reference=reference.rms_norm, **options):
    """Parity with the reference, which in fp64 rounds s as the dtypes of ``arguments`` say: of a gradient that is one number,
    as a scale's is, PyTorch's error can be small by chance."""
    dtype = arguments.get("residual", arguments["x"]).dtype

    def exact(x, *, residual=None, scale=None, x0=None, x0_scale=None, **others):
        s = (x if residual is None else x + residual) * (1 if scale is None else scale)
        s = s if x0 is None else s + x0_scale * x0
        s = s + (s.to(dtype) - s).detach()
        y = reference(s, **others)
        return y if residual is None and scale is None and x0 is None else (y, s)

    parity.check(op, reference, arguments, exact=exact, **options)


def inputs(shape, device, *, x=FP32, residual=None, x0=None, weight=None, scale=None):
    """Keyword arguments of rms_norm; each dtype says what the tensor is, None leaves it out."""

    def make(*size, dtype, about=0.0):
        return (torch.randn(size, device=device) + about).to(dtype)

    made = {"x": make(*shape, dtype=x)}
    for name, dtype in (("residual", residual), ("x0", x0)):
        if dtype is not None:
            made[name] = make(*shape, dtype=dtype)
    if x0 is not None:
        made["x0_scale"] = torch.tensor([-0.4], device=device)
    if scale is not None:
        made["scale"] = torch.tensor(0.7, device=device, dtype=scale)
    if weight is not None:
        made["weight"] = 0.1 * make(shape[-1], dtype=weight, about=10.0)
    return made


EVERYTHING = {"residual": FP32, "x0": FP32, "weight": FP32, "scale": FP32}
DTYPES = [
    {"x": FP32},
    {"x": FP16, "weight": FP16},
    {"x": BF16, "weight": FP32},
    {"x": BF16, "residual": FP32},
    {"x": FP16, "residual": FP16, "weight": FP16},
    {"x": BF16, "scale": FP32},
    {"x": FP32, "x0": FP32, "scale": FP32},
    {"x": BF16, "x0": FP32},
    {"x": BF16, "residual": FP32, "x0": FP32, "scale": FP32},
    {"x": BF16, "residual": BF16, "x0": BF16, "scale": FP32},
    {"x": FP16, "residual": FP16, "x0": FP16, "scale": FP16},
    {"x": FP32, "residual": BF16, "x0": FP16, "weight": BF16, "scale": BF16},
    {"x": FP32, **EVERYTHING},
]


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(f"{k}_{str(v)[6:]}" for k, v in d.items()))
@pytest.mark.parametrize("shape", [(33, 77), (70, 256)], ids=str)
def test_parity_for_dtypes(device, shape, dtypes):
    check(inputs(shape, device, **dtypes))


@pytest.mark.adversarial
@pytest.mark.parametrize("shape", [(7,), (1, 1), (19, 1), (1, 768), (63, 48), (2, 3, 5, 24), (2049, 16)], ids=str)
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["alone", "everything"])
def test_parity_for_shapes(device, shape, options):
    # Of one column xhat is almost 1 or -1, and dx, 1 - xhat^2 but for factors, no number that fp32 has: only with a large eps.
    eps = 1e-6 if shape[-1] > 1 else 0.5
    check(inputs(shape, device, **options), partial(rms_norm, eps=eps), partial(reference.rms_norm, eps=eps))


@pytest.mark.parametrize("C", [4097, 16384])
def test_parity_for_wide_rows(device, C, monkeypatch):
    use_geometry(monkeypatch, rows=1)
    check(inputs((3, C), device, x=BF16, **EVERYTHING))


@pytest.mark.parametrize("options", [{}, {"residual": FP32}, EVERYTHING], ids=["alone", "residual", "everything"])
def test_parity_where_several_programs_share_a_row(device, options, monkeypatch):
    monkeypatch.setattr(fused_layernorm, "MAX_BACKWARD_BLOCK", 32)  # 100 columns: three blocks and a ragged one
    check(inputs((37, 100), device, **options))


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_parity_for_several_unequal_rows_per_program(device, rows, monkeypatch):
    use_geometry(monkeypatch, rows=rows)
    arguments = inputs((13, 64), device, **EVERYTHING)
    arguments["x"] *= torch.logspace(-2, 2, 13, device=device)[:, None]
    check(arguments)


@pytest.mark.parametrize("scale, x0_scale", [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (-3.0, 1e-6)])
def test_factors_of_zero_have_gradients(device, scale, x0_scale):
    """dscale needs u, which s = scale u + ... does not give back; eps keeps a row of zeros finite."""
    arguments = inputs((12, 40), device, x=BF16, **EVERYTHING)
    arguments["scale"].fill_(scale)
    arguments["x0_scale"].fill_(x0_scale)
    check(arguments)


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.1])
def test_eps(device, eps):
    arguments = inputs((9, 32), device, residual=FP32)
    arguments["x"] *= 0.01
    check(arguments, partial(rms_norm, eps=eps), partial(reference.rms_norm, eps=eps))


@pytest.mark.parametrize("x, residual, out", [(BF16, None, FP32), (FP32, None, BF16), (BF16, FP32, FP16)])
def test_out_dtype(device, x, residual, out):
    arguments = inputs((21, 40), device, x=x, residual=residual)
    parity.check(
        partial(rms_norm, out_dtype=out),
        lambda **kw: reference.rms_norm(**kw, out_dtype=None if kw["x"].dtype == torch.float64 else out),
        arguments,
    )


def test_dtypes_of_results_and_gradients(device):
    arguments = inputs((5, 24), device, x=BF16, residual=FP32, x0=FP16, weight=FP16, scale=FP32)
    results, _ = parity.run(partial(rms_norm, out_dtype=FP16), arguments, None)
    assert {name: value.dtype for name, value in results.items()} == {
        "out0": FP16, "out1": FP32, "dx": BF16, "dresidual": FP32, "dx0": FP16, "dx0_scale": FP32, "dscale": FP32,
        "dweight": FP16,
    }  # fmt: skip
    assert results["dscale"].shape == () and results["dx0_scale"].shape == (1,)
    assert rms_norm(arguments["x"], x0=arguments["x0"], x0_scale=arguments["x0_scale"])[1].dtype == BF16


def test_with_a_scale_of_one_and_no_x0_it_is_the_plain_residual(device):
    """To the bit: the same kernel forms s again in backward."""
    arguments = inputs((20, 48), device, x=BF16, residual=FP32)
    plain, upstream = parity.run(rms_norm, arguments, None)
    scaled, _ = parity.run(partial(rms_norm, scale=torch.ones((), device=device)), arguments, upstream)
    assert all(torch.equal(scaled[name], value) for name, value in plain.items())


@pytest.mark.parametrize("layout", ["transposed", "slice", "every_other", "expanded"])
def test_any_strides(device, layout):
    wide = torch.randn(4, 16, 90, device=device)
    views = {
        "transposed": lambda t: t[..., :7].mT,
        "slice": lambda t: t[:, ::2, 5:21],
        "every_other": lambda t: t[:, :7, 0:32:2],
        "expanded": lambda t: t[:1, :1, :16].expand(4, 7, 16),
    }
    of = views[layout]
    arguments = inputs(of(wide).shape, device, **EVERYTHING)
    strided = {name: of(torch.randn_like(wide)) for name in ("x", "residual", "x0")}
    weight = torch.rand(16, 3, device=device)[:, 1]
    y = of(wide)
    check({**arguments, **strided, "weight": weight}, upstream=(y, torch.ones(1, device=device).expand(y.shape)))


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24)], ids=str)
def test_no_rows(device, shape):
    results, _ = parity.run(partial(rms_norm, dropout_p=0.1), inputs(shape, device, x=BF16, **EVERYTHING), None)
    assert results["out0"].shape == results["dx0"].shape == shape
    assert not any(results[name].any() for name in ("dweight", "dscale", "dx0_scale"))


def test_factors_of_one_vector_and_any_part_of_the_gradients(device):
    """As a model has them: scales by layer. Only what is wanted gets a gradient, the same as with all."""
    arguments = {**inputs((300, 80), device, x=BF16, **EVERYTHING)}
    everything, upstream = parity.run(rms_norm, arguments, None)
    again, _ = parity.run(rms_norm, arguments, upstream)
    assert all(torch.equal(again[name], value) for name, value in everything.items()), "sums in a fixed order"
    for wanted in ("x", "residual", "weight", "x0", "scale", "x0_scale"):
        leaves = {name: t.detach().requires_grad_(name == wanted) for name, t in arguments.items()}
        torch.autograd.backward(rms_norm(**leaves), upstream)
        assert torch.equal(leaves[wanted].grad, everything[f"d{wanted}"])
        assert all(leaf.grad is None for name, leaf in leaves.items() if name != wanted)
    factors = torch.tensor([[9.0, 9.0], [0.7, -0.4]], device=device, requires_grad=True)
    rest = {name: t for name, t in arguments.items() if name not in ("scale", "x0_scale")}
    torch.autograd.backward(rms_norm(**rest, scale=factors[1, 0], x0_scale=factors[1, 1]), upstream)
    of_both = torch.stack([everything["dscale"].flatten(), everything["dx0_scale"]]).flatten()
    assert torch.equal(factors.grad[1], of_both) and not factors.grad[0].any()


def test_only_one_of_the_two_outputs_is_used(device):
    arguments = inputs((12, 64), device, **EVERYTHING)
    results, _ = parity.run(lambda **kw: rms_norm(**kw)[1], arguments, (torch.ones(12, 64, device=device),))
    expected = torch.full((12, 64), 0.7, device=device)
    assert torch.equal(results["dx"], expected) and torch.equal(results["dresidual"], expected)
    parity.check(lambda **kw: rms_norm(**kw)[0], lambda **kw: reference.rms_norm(**kw)[0], arguments)


def test_what_backward_waits_with(device):
    """With scale and x0 what s was made of, which others hold; else s itself. Never both, and nothing per element besides."""

    def saved(**dtypes):
        made = {name: t.requires_grad_() for name, t in inputs((8, 64), device, **dtypes).items()}
        found = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.setdefault(t.data_ptr(), t), lambda t: t):
            s = rms_norm(**made)[1]
        names = {t.data_ptr(): name for name, t in {**made, "s": s}.items()}
        return {names.get(address, "rstd") for address, t in found.items() if t.numel()}

    assert saved(residual=FP32) == {"s", "rstd"}
    mixed = {"x", "residual", "x0", "scale", "x0_scale", "rstd"}
    assert saved(residual=FP32, x0=FP32, scale=FP32) == mixed


@pytest.mark.parametrize(
    "dtypes", [{}, {"residual": BF16, "scale": FP32}, {"residual": FP32, "x0": FP32, "scale": FP32}]
)
@pytest.mark.parametrize("x", [FP32, BF16])
def test_dropout_parity_under_the_same_mask(device, x, dtypes, monkeypatch):
    monkeypatch.setattr(fused_layernorm, "MAX_BACKWARD_BLOCK", 64)
    p, shape = 0.3, (35, 100)
    ones, zeros = torch.ones(shape, device=device), torch.zeros(shape, device=device)
    torch.manual_seed(5)
    keep = rms_norm(ones, residual=zeros, dropout_p=p)[1] != 0
    assert abs(keep.double().mean() - (1 - p)) < 0.05

    def op(**tensors):
        torch.manual_seed(5)
        return rms_norm(**tensors, dropout_p=p)

    def masked(*, x, **others):
        return reference.rms_norm(x * keep.to(x.dtype) / (1 - p), **others)

    upstream = tuple(torch.randn(shape, device=device) for _ in range(2 if dtypes else 1))
    parity.check(op, masked, inputs(shape, device, x=x, **dtypes), upstream=upstream)


def test_checkpointing_repeats_the_mask(device):
    x = torch.ones(16, 64, device=device, requires_grad=True)
    zeros, scale = torch.zeros(16, 64, device=device), torch.ones(1, device=device)
    s = checkpoint(lambda x: rms_norm(x, residual=zeros, scale=scale, dropout_p=0.5)[1], x, use_reentrant=False)
    torch.rand(7, device=device)  # the generator has moved on when backward recomputes
    s.sum().backward()
    assert torch.equal(x.grad, s) and 0 < (s == 0).sum() < s.numel()


@pytest.mark.parametrize("dtypes", [{}, {"residual": FP32}, EVERYTHING], ids=["alone", "residual", "everything"])
def test_opcheck_and_compiled_equals_eager(device, dtypes):
    made = {name: t.requires_grad_() for name, t in inputs((2, 5, 16), device, x=BF16, **dtypes).items()}
    seed = runtime.draw_seed(device) if dtypes else None
    names = ("x", "weight", "residual", "x0", "scale", "x0_scale")
    forward = (*map(made.get, names), seed, 0.25 if dtypes else 0.0, 1e-6, FP32)
    torch.library.opcheck(torch.ops.fastgpt.rms_norm_fwd, forward)
    arguments = {name: t.detach() for name, t in made.items()}
    eager, upstream = parity.run(rms_norm, arguments, None)
    compiled, _ = parity.run(torch.compile(rms_norm, fullgraph=True, backend="aot_eager"), arguments, upstream)
    assert all(torch.equal(compiled[name], value) for name, value in eager.items())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.tensor(1.0)}, r"x is \(\): its last dimension must have 1 to 16384"),
        ({"x": torch.zeros(4, 8, dtype=torch.float64)}, "x is torch.float64: use float32, float16 or bfloat16"),
        ({"weight": torch.ones(7)}, r"weight is \(7,\): x of \(4, 8\) needs \(8,\)"),
        ({"residual": torch.zeros(1, 8)}, r"residual is \(1, 8\): x of .* needs \(4, 8\)"),
        ({"x0": torch.zeros(4, 7), "x0_scale": torch.ones(1)}, r"x0 is \(4, 7\): x of .* needs \(4, 8\)"),
        ({"x0": torch.zeros(4, 8)}, "x0_scale is None: give x0 and x0_scale together, or neither"),
        ({"x0_scale": torch.ones(1)}, "x0 is None: give x0 and x0_scale together, or neither"),
        ({"scale": torch.ones(8)}, r"scale is \(8,\): use a tensor of one element"),
        ({"scale": torch.ones(1, device="meta")}, "scale is on meta: move it to"),
        ({"dropout_p": 1.5}, r"dropout_p is 1.5: it must lie in \[0, 1\]"),
        ({"out_dtype": torch.float64}, "out_dtype is torch.float64"),
    ],
)
def test_bad_arguments_are_named(device, change, message):
    moved = {
        name: value.to(device) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value
        for name, value in change.items()
    }
    with pytest.raises(ValueError, match=message):
        rms_norm(**{"x": torch.zeros(4, 8, device=device)} | moved)


def test_where_triton_does_not_run_the_reference_computes(device, monkeypatch):
    monkeypatch.setattr(runtime, "runs_in_triton", lambda x: False)
    arguments = {name: tensor.double() for name, tensor in inputs((5, 12), device, **EVERYTHING).items()}
    for got, expected in zip(rms_norm(**arguments), reference.rms_norm(**arguments)):
        assert got.dtype == torch.float64 and torch.equal(got, expected)
