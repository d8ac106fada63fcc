"""The fp8 kernels: quantisers bit by bit against torch's own casts, matmuls against fp64 of the operands as quantised."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.numerics.simulation import relative_error
from fastgpt.kernels.fp8 import launch
from fastgpt.kernels.fp8.launch import FORWARD, GRADIENT, Fp8, Grouped

BF16 = torch.bfloat16
TINY = torch.finfo(torch.float32).tiny
pytestmark = [
    pytest.mark.usefixtures("needs_fp8"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of inf and NaN in the interpreter
]
formats = pytest.mark.parametrize("dtype", [FORWARD, GRADIENT], ids=["e4m3", "e5m2"])
engine = launch.engine


@pytest.fixture(autouse=True)
def _products_in_triton(monkeypatch):
    """On Hopper, too, where they would be torch._scaled_mm's."""
    run_by(monkeypatch, "triton")


def run_by(monkeypatch, name: str) -> None:
    monkeypatch.setattr(launch, "engine", lambda _: name)


def small_tiles(monkeypatch) -> None:
    tiles = {"BM": 16, "BN": 32, "BK": 32, "GROUP": 2, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(launch, "config", lambda *_, **__: tiles)


def rounded(x: Tensor, dtype: torch.dtype) -> Fp8:
    """x (M, K) in fp8 with a scale per row, by torch's own cast."""
    x, largest = x.float(), torch.finfo(dtype).max
    # By a tensor: on a GPU torch divides by a number as it multiplies by 1 / number, which is rounded on its own.
    scale = (x.abs().amax(1) / torch.full((), largest, device=x.device)).clamp(min=TINY)
    values = (x * (1 / scale)[:, None]).clamp(-largest, largest).to(dtype)
    return Fp8(values, torch.stack([scale, values.float().norm(dim=1) * scale]))


def rounded_in_groups(x: Tensor, dtype: torch.dtype, columns: int = 64) -> Grouped:
    """x (M, K) in fp8 with a scale for so many columns of a row, in the same way."""
    M, K = x.shape
    groups = rounded(x.reshape(M * K // columns, columns), dtype)
    return Grouped(groups.values.view(M, K), groups.scale.view(M, K // columns).t().contiguous())


def dequantised(form: Fp8 | Grouped) -> Tensor:
    scale = form.scale[:, None] if isinstance(form, Fp8) else form.scale.t().repeat_interleave(form.columns, dim=1)
    return form.values.double() * scale.double()


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# ---------------------------------------------------------------- quantisers


@formats
@pytest.mark.parametrize("source", [torch.float32, BF16], ids=str)
def test_rows_are_rounded_as_torch_rounds(device, dtype, source):
    # Rows of every magnitude there is: subnormal, ordinary, huge; with values far below their largest; of one value; of zeros.
    exponents = torch.linspace(-130, 127, 60, device=device).trunc()
    x = torch.randn(60, 48, device=device).clamp(-1.9, 1.9).double() * 2.0 ** exponents[:, None].double()
    x[:, ::3] *= 2.0**-16
    x = x.to(source)
    x[1], x[2], x[3, 1:] = 0.0, x[2, 0], 0.0
    found, expected = launch.quantise(x, dtype), rounded(x, dtype)
    assert same_bits(found.values, expected.values)
    assert torch.equal(found.scale, expected.scale)
    assert same_bits(found.values[1], torch.zeros_like(found.values[1])), "zeros stay zeros"


@formats
def test_the_largest_of_a_row_becomes_the_largest_of_the_format(device, dtype):
    values = launch.quantise(torch.randn(40, 33, device=device), dtype).values
    assert (values.float().abs().amax(1) == torch.finfo(dtype).max).all()


@formats
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (130, 16), (17, 1030)], ids=str)
def test_any_shape_and_strides(device, dtype, shape):
    wide = torch.randn(shape[1], shape[0] + 3, 2, device=device)
    for x in (torch.randn(*shape, device=device), wide[:, 3:, 1].t(), wide[:1, :1, 0].expand(*shape)):
        assert same_bits(launch.quantise(x, dtype).values, rounded(x, dtype).values)


@pytest.mark.xdist_group("large")
def test_offsets_past_2_to_the_31(device, needs_memory):
    # bug 1: row strides whose product with the row passes int32; memory that is never touched otherwise
    rows, stride = 3, 2**30 + 8
    needs_memory(2 * rows * stride)
    x = torch.empty(rows * stride, dtype=BF16, device=device).as_strided((rows, 16), (stride, 1))
    x.copy_(torch.randn(rows, 16, device=device))
    assert same_bits(launch.quantise(x, FORWARD).values, rounded(x.clone(), FORWARD).values)
    assert same_bits(launch.quantise(x.t(), FORWARD).values, rounded(x.t().clone(), FORWARD).values)


@formats
def test_the_norm_is_a_bound(device, dtype):
    x = torch.randn(64, 200, device=device) * torch.logspace(-30, 15, 64, device=device)[:, None]
    form = launch.quantise(x, dtype)
    exact = dequantised(form).norm(dim=1)
    assert (form.norm >= exact).all() and (form.norm <= 1.2 * exact).all()


@formats
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")], ids=str)
def test_inf_and_nan_stay_what_they_are(device, dtype, bad):
    x = torch.randn(3, 40, device=device)
    x[1, 7] = bad
    form = launch.quantise(x, dtype)
    ones = Fp8(torch.ones(1, 40, device=device).to(FORWARD), torch.ones(2, 1, device=device))
    assert form.values[1, 7].float().isnan()
    assert launch.matmul(form, ones).isfinite().flatten().tolist() == [True, False, True]
    assert same_bits(form.values[::2].contiguous(), rounded(x[::2], dtype).values)


def test_a_weight_is_quantised_both_ways_round(device):
    weight = torch.randn(48, 32, device=device)
    forward, transposed = launch.quantise_weight(weight)
    assert same_bits(forward.values, rounded(weight, FORWARD).values)
    assert same_bits(transposed.values, rounded(weight.t(), FORWARD).values)
    assert (forward.norm >= dequantised(forward).norm(dim=1)).all()


# ---------------------------------------------------------------- matmuls


def operands(device, M: int, N: int, K: int, dtype: torch.dtype = FORWARD) -> tuple[Fp8, Fp8, Tensor]:
    """Two in fp8, and their product in fp64."""
    a = launch.quantise(torch.randn(M, K, device=device), dtype)
    b = launch.quantise_weight(torch.randn(N, K, device=device) / 8)[0]
    return a, b, dequantised(a) @ dequantised(b).t()


def cuts_products(device) -> bool:
    """Whether each fp8 product, and their sum, is cut 13 bits below the largest product of an instruction: Ada's and Hopper's
    tensor cores do so (simulation.py), neither the interpreter nor cards before or after."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (8, 9)


def assert_rounded_once(found: Tensor, exact: Tensor, largest: Tensor | None = None) -> None:
    """bf16 of a sum in fp32, whose error is held against ``largest``, or the largest result."""
    assert found.dtype == BF16
    cut = 2.0**-13 if cuts_products(found.device) else 1e-5
    largest = exact.abs().max() if largest is None else largest
    assert ((found.double() - exact).abs() <= 2.0**-8 * exact.abs() + cut * largest).all()


@formats
@pytest.mark.parametrize("M, N, K", [(1, 16, 16), (17, 48, 80), (70, 160, 32), (33, 16, 272)])
def test_a_product_is_that_of_its_operands(device, M, N, K, dtype, monkeypatch):
    small_tiles(monkeypatch)
    a, b, exact = operands(device, M, N, K, dtype)
    bias = torch.randn(N, device=device)
    assert_rounded_once(launch.matmul(a, b), exact)
    assert_rounded_once(launch.matmul(a, b, bias), exact + bias)


def test_chunks_of_k_that_shipped_tiles_have(device):
    a, b, exact = operands(device, 20, 32, 400)
    assert_rounded_once(launch.matmul(a, b), exact)


def test_a_product_by_the_engine_of_this_device(device, monkeypatch):
    monkeypatch.setattr(launch, "engine", engine)
    chosen, asked = engine(device), []  # at first it asks torch what it has
    scaled_mm = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *a, **options: (asked.append(1), scaled_mm(*a, **options))[1])
    a, b, exact = operands(device, 33, 48, 80)
    assert_rounded_once(launch.matmul(a, b), exact)
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    assert len(asked) == (chosen == "scaled_mm")
    assert hopper or chosen == "triton", "no GPU but Hopper's asks torch"


def torchs_scaled_mm(monkeypatch, device) -> None:
    run_by(monkeypatch, "scaled_mm")
    try:
        launch.matmul(*operands(device, 16, 16, 16)[:2])
    except RuntimeError:
        pytest.skip(f"torch._scaled_mm of this torch has no scales per row on {device.type}")


@formats
def test_the_other_engine_agrees(device, dtype, monkeypatch):
    a, b, exact = operands(device, 33, 48, 80, dtype)
    bias = torch.randn(48, device=device)
    torchs_scaled_mm(monkeypatch, device)
    assert_rounded_once(launch.matmul(a, b), exact)
    assert relative_error(launch.matmul(a, b, bias), exact + bias) < 3e-3  # it takes a bias in bf16


@pytest.mark.parametrize("name", ["triton", "scaled_mm"])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_gelu_is_written_in_both_formats(device, approximate, bias, name, monkeypatch):
    small_tiles(monkeypatch)
    if name == "scaled_mm":
        torchs_scaled_mm(monkeypatch, device)
    a, b, z = operands(device, 37, 80, 48)
    shift = torch.randn(80, device=device) if bias else None
    z = z if shift is None else z + shift
    exact = torch.nn.functional.gelu(z, approximate=approximate)
    out, pre, form = launch.matmul_gelu(a, b, shift, approximate == "none")
    assert relative_error(out, exact) < 4e-3 and relative_error(pre, z) < 4e-3
    assert relative_error(dequantised(form), exact) < 0.03


@pytest.mark.parametrize("name", ["triton", "scaled_mm"])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_the_gradient_of_gelu_is_written_in_both_formats(device, approximate, name, monkeypatch):
    small_tiles(monkeypatch)
    if name == "scaled_mm":
        torchs_scaled_mm(monkeypatch, device)
    a, b, da = operands(device, 37, 80, 48, GRADIENT)
    pre = torch.randn(37, 80, device=device).to(BF16)
    z = pre.double().requires_grad_()
    torch.nn.functional.gelu(z, approximate=approximate).backward(da)
    out, form = launch.matmul_dgelu(a, b, pre, approximate == "none")
    sums = torch.full((80,), float("nan"), device=device)
    again, _ = launch.matmul_dgelu(a, b, pre, approximate == "none", sums)
    assert form.values.dtype == GRADIENT and torch.equal(again, out)
    torch.testing.assert_close(sums, out.float().sum(0), rtol=1e-5, atol=1e-5 * float(out.float().abs().sum(0).max()))
    assert relative_error(out, z.grad) < 6e-3
    assert relative_error(dequantised(form), z.grad) < 0.06


@pytest.mark.parametrize("sign", [1, -1])
def test_a_row_that_meets_its_bound_does_not_overflow(device, sign):
    # x along a row of the weight: Cauchy-Schwarz holds with equality, and gelu keeps all of it, or nothing
    weight = torch.randn(32, 64, device=device)
    forward = launch.quantise_weight(weight)[0]
    longest = int(weight.norm(dim=1).argmax())
    x = launch.quantise(sign * 100 * weight[longest][None], FORWARD)
    out, _, form = launch.matmul_gelu(x, forward, None, False)
    largest = form.values.float().abs().max()
    assert torch.allclose(dequantised(form).float(), out.float(), rtol=0.07, atol=float(form.scale) * 2**-9)
    assert (384 <= largest <= 448) if sign == 1 else largest < 448


def test_nothing_is_written_outside_the_results(device, monkeypatch):
    small_tiles(monkeypatch)
    a, b, _ = operands(device, 19, 48, 16)
    buffers = [torch.full((19 * 48 + 200,), 77.0, device=device).to(dtype) for dtype in (BF16, BF16, FORWARD)]
    rows = torch.full((219,), 77.0, device=device)
    out, pre, values = (buffer[100:-100].view(19, 48) for buffer in buffers)
    launch._launch(a, b, out, "gelu", pre=pre, q=Fp8(values, rows[100:-100].view(1, 19)))
    for buffer in (*buffers, rows):
        untouched = torch.tensor(77.0).to(FORWARD).float() if buffer is buffers[2] else 77.0
        assert (buffer[:100].float() == untouched).all() and (buffer[-100:].float() == untouched).all()


@formats
@pytest.mark.parametrize("tiles", ["small", "shipped"])
@pytest.mark.parametrize("M, N, K, columns", [(1, 16, 64, 64), (37, 48, 192, 64), (70, 160, 128, 64), (37, 48, 96, 32)])
def test_a_product_with_scales_of_groups_is_that_of_its_operands(device, M, N, K, columns, tiles, dtype, monkeypatch):
    if tiles == "small":
        small_tiles(monkeypatch)
    # torch has no such scales, so Triton multiplies where others are torch's
    run_by(monkeypatch, "scaled_mm")
    monkeypatch.setattr(torch, "_scaled_mm", None)
    octaves = torch.randint(-20, 20, (M, K // columns), device=device).repeat_interleave(columns, dim=1)
    a = rounded_in_groups(torch.randn(M, K, device=device) * 2.0**octaves, dtype, columns)
    b = launch.quantise_weight(torch.randn(N, K, device=device) / 8)[0]
    # Groups of every magnitude: what is left of cancellation is held against the largest group's part.
    a64, b64 = (dequantised(form).unflatten(1, (-1, columns)) for form in (a, b))
    parts = a64.movedim(1, 0) @ b64.permute(1, 2, 0)
    exact, largest = parts.sum(0), parts.abs().amax(0)
    if cuts_products(device):  # what is cut from a part goes with its products, which may cancel
        largest = dequantised(a).abs() @ dequantised(b).abs().t()
    assert_rounded_once(launch.matmul(a, b), exact, largest)
    bias = torch.randn(N, device=device)
    assert_rounded_once(launch.matmul(a, b, bias), exact + bias, largest)


@formats
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")], ids=str)
def test_inf_and_nan_in_a_group_reach_the_product(device, dtype, bad):
    x = torch.randn(3, 128, device=device)
    x[1, 70] = bad
    ones = Fp8(torch.ones(16, 128, device=device).to(FORWARD), torch.ones(2, 16, device=device))
    rows = launch.matmul(rounded_in_groups(x, dtype), ones).isfinite()
    assert rows[::2].all() and not rows[1].any()
