"""The kernels of Muon against the plain PyTorch of kernels/reference.py in fp64."""

import pytest
import torch

from bench.parity import assert_parity
from fastgpt.kernels import fused_muon, reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", [(1, 40, 136), (3, 33, 50), (2, 130, 130), (1, 1, 7), (0, 4, 4)])
@pytest.mark.parametrize("polynomial", [False, True])
def test_products_of_a_symmetric_matrix(device, dtype, shape, polynomial):
    """One tile and several, whole and cut off; tiles above the diagonal are those below it, to the bit."""
    x = torch.randn(shape, device=device).to(dtype)
    scale = torch.rand(shape[0], device=device)
    if polynomial:
        x = (x @ x.mT) / shape[2]
        scale = None
    out = torch.full((*x.shape[:2], x.shape[1]), float("nan"), device=device, dtype=dtype)

    def exact(x):
        z = x @ x.mT
        return -4.775 * x + 2.0315 * z if polynomial else z * scale.to(x.dtype)[:, None, None] ** 2

    if x.numel():
        fused_muon._symmetric(x, out, scale, (-4.775, 2.0315) if polynomial else None)
    assert_parity("product", out, exact(x.double()), exact(x))
    assert torch.equal(out[:, 128:, :128], out[:, :128, 128:].mT)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_new_x(device, dtype, scaled):
    p, x = torch.randn(2, 40, 40, device=device).to(dtype), torch.randn(2, 40, 200, device=device).to(dtype)
    scale = torch.rand(2, device=device) if scaled else None
    out = torch.full_like(x, float("nan"))

    def exact(p, x):
        new = 3.4445 * x + p @ x
        return new * scale.to(x.dtype)[:, None, None] if scaled else new

    fused_muon._product(p, x, out, scale, 3.4445)
    assert_parity("new x", out, exact(p.double(), x.double()), exact(p, x))


@pytest.mark.parametrize("coefficients", ["classic", "polar"])
@pytest.mark.parametrize(("dtype", "most"), [(FP32, 1e-4), (BF16, 0.03)])
def test_five_steps(device, coefficients, dtype, most):
    """The error of all elements together over the norm, beside fp64 on the same input; and far from 1 in size at the start."""
    x = (torch.randn(3, 24, 72, device=device) * torch.tensor([1e-3, 1.0, 1e3], device=device)[:, None, None]).to(dtype)
    wanted = reference.orthogonalize(x.double(), coefficients)
    error = (fused_muon.orthogonalize(x, coefficients).double() - wanted).norm(dim=(1, 2)) / wanted.norm(dim=(1, 2))
    assert error.max() <= most


def test_zeros_stay_zeros_and_nan_stays_in_its_matrix(device):
    x = torch.randn(3, 8, 16, device=device)
    x[1] = 0.0
    x[2, 3, 5] = float("nan")
    found = fused_muon.orthogonalize(x)
    assert found[0].isfinite().all() and not found[1].any() and found[2].isnan().all()


@pytest.mark.parametrize("gradient", [FP32, BF16])
@pytest.mark.parametrize("shape", [(70, 33), (5, 130)])
@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"nesterov": False}, {"grad_scale": 8.0, "found_inf": 0.0}, {"found_inf": 1.0}]
)
def test_momentum(device, gradient, shape, tall, options):
    options = {k: torch.tensor(v, device=device) if isinstance(v, float) else v for k, v in options.items()}
    options = {"nesterov": True} | options
    grad, start = torch.randn(shape, device=device).to(gradient), torch.randn(shape, device=device)
    hyper = torch.tensor([0.02, 0.9, 0.1, 0.0], dtype=torch.float64, device=device)
    results = []
    for compute, dtype in ((fused_muon, FP32), (reference, torch.float64), (reference, FP32)):
        momentum = start.to(dtype, copy=True)
        out = torch.full(
            shape[::-1] if tall else shape, float("nan"), device=device, dtype=BF16 if dtype == FP32 else dtype
        )
        out = out.mT if tall else out
        compute.muon_momentum(grad, momentum, out, hyper, **options)
        results.append((momentum, out))
    for name, ours, exact, plain in zip(("momentum", "direction"), *results):
        assert_parity(name, ours, exact, plain)
    assert torch.equal(results[0][0], start) == bool(options.get("found_inf", 0))


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("copy", [None, BF16, FP16])
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
def test_update(device, tall, copy, cautious, found_inf):
    shape = (70, 33)
    direction = torch.randn(shape[::-1] if tall else shape, device=device).to(BF16)
    direction = direction.mT if tall else direction
    start, rows = torch.randn(shape, device=device), torch.rand(shape[0], device=device) if copy else None
    flag = None if found_inf is None else torch.tensor(found_inf, device=device)
    hyper = torch.tensor([0.02, 0.9, 0.5, 0.0], dtype=torch.float64, device=device)
    results = []
    for compute, dtype in ((fused_muon, FP32), (reference, torch.float64), (reference, FP32)):
        param, copied = start.to(dtype, copy=True), None if copy is None else start.to(copy)
        version = param._version
        compute.muon_update(param, direction, hyper, 1.5, cautious, rows, flag, copied)
        assert param._version > version
        results.append((param, copied))
    assert_parity("parameter", *(param for param, _ in results))
    assert copy is None or torch.equal(results[0][1], results[0][0].to(copy))
    assert torch.equal(results[0][0], start) == bool(found_inf)


def test_what_does_not_fit_is_refused(device):
    hyper = torch.zeros(4, dtype=torch.float64, device=device)
    a, b = torch.zeros(4, 6, device=device), torch.zeros(6, 4, device=device)
    with pytest.raises(ValueError, match=r"grad is \(6, 4\): momentum_buffer of \(4, 6\) needs \(4, 6\)"):
        fused_muon.muon_momentum(b, a, a, hyper, True)
    with pytest.raises(ValueError, match="rows or its columns must be adjacent"):
        fused_muon.muon_update(a, torch.zeros(4, 12, device=device)[:, ::2], hyper, 1.0, False)
    with pytest.raises(ValueError, match="param has strides"):
        fused_muon.muon_update(b.mT, a, hyper, 1.0, False)
