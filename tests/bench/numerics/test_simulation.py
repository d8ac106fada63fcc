"""The simulation of tensor-core rounding, against sums worked out one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bench.numerics import simulation
from bench.numerics.simulation import (
    BF16,
    FP8,
    FP8_FAST,
    FP8_PROMOTED,
    FP8_ROWS,
    FP16,
    FP16_FAST,
    FP32,
    MODES,
    Mode,
    matmul,
)


def operands(M=5, K=200, N=3, scale=1.0):
    torch.manual_seed(0)
    return scale * torch.randn(M, K), 0.1 * torch.randn(K, N)


def error(mode, a, b, **options):
    return simulation.relative_error(matmul(a, b, mode, **options), a.double() @ b.double())


def one_by_one(a, b, chunk, step):
    """Chunked fp16 sums of numpy scalars: each group of ``step`` exact products and the accumulator are added in fp64 and
    rounded once to fp16; chunks are added in fp32."""
    a, b = a.half().numpy(), b.half().numpy()
    out = np.zeros((a.shape[0], b.shape[1]), dtype=np.float32)
    for i, j in np.ndindex(out.shape):
        for first in range(0, a.shape[1], chunk):
            total = np.float16(0)
            for k in range(first, min(first + chunk, a.shape[1]), step):
                part = slice(k, min(k + step, first + chunk, a.shape[1]))
                total = np.float16(
                    np.float64(total) + np.dot(a[i, part].astype(np.float64), b[part, j].astype(np.float64))
                )
            out[i, j] += np.float32(total)
    return torch.from_numpy(out)


@pytest.mark.parametrize(("chunk", "step"), [(32, 8), (64, 8), (64, 16), (128, 4)])
@pytest.mark.parametrize("K", [1, 64, 200])
def test_chunked_fp16_is_the_sum_worked_out_one_by_one(chunk, step, K):
    a, b = operands(K=K)
    mode = Mode("m", "fp16", "fp16", "fp16", chunk=chunk, step=step)
    torch.testing.assert_close(matmul(a, b, mode), one_by_one(a, b, chunk, step), rtol=2e-7, atol=1e-7)


def test_an_unchunked_sum_is_one_chunk():
    a, b = operands(K=136)
    assert torch.equal(matmul(a, b, FP16_FAST.with_chunk(None)), matmul(a, b, FP16_FAST.with_chunk(136)))


def test_truncated_fp16_never_gains_magnitude():
    a, b = operands(K=64)
    a, b = a.abs(), b.abs()
    cut = Mode("m", "fp16", "fp16", "fp16", chunk=64, toward_zero=True)
    exact = a.half().double() @ b.half().double()
    assert (matmul(a, b, cut).double() <= exact).all()
    assert (matmul(a, b, FP16_FAST).double() > exact).any()
    huge = torch.full((1, 8), 1e4)
    assert matmul(huge, huge.t(), cut).item() == simulation.HALF_MAX  # 8e8, cut to the largest number


def test_fp22_keeps_13_fraction_bits():
    one, small = torch.ones(1, 1), torch.tensor([[2.0**-7]])
    mode = Mode("m", "fp32", "fp32", "fp22", step=1)
    a = torch.cat([one, small, small], 1)
    for b_small, expected in ((2.0**-6, 1 + 2 * 2.0**-13), (2.0**-7, 1.0)):  # 2^-13 is the last bit, 2^-14 is lost
        b = torch.tensor([[1.0], [b_small], [b_small]])
        assert matmul(a, b, mode).item() == expected


def test_promotion_bounds_what_fp22_loses():
    a, b = operands(K=8192, M=8, N=8)
    assert error(FP8_PROMOTED, a, b) < 1.02 * error(simulation.FP8_FP32, a, b) < 0.99 * error(FP8, a, b)


def test_fp32_sums_round_only_the_operands():
    a, b = operands()
    for form, mode in (("fp32", FP32), ("bf16", BF16), ("fp16", FP16)):
        dtype = simulation.FORMATS[form]
        assert torch.equal(matmul(a, b, mode), a.to(dtype).float() @ b.to(dtype).float())


def test_the_order_of_the_modes_at_a_gpt_s_K():
    """bf16's error is the rounding of its operands, 2.4e-3; fp16-fast's stays below it at any K; fp8's is far above."""
    for K in (768, 3072):
        a, b = operands(M=32, K=K, N=32)
        assert error(FP16, a, b) < error(FP16_FAST, a, b) < 0.3 * error(BF16, a, b)
        assert error(BF16, a, b) == pytest.approx(2.3e-3, rel=0.1)
        assert 0.03 < error(FP8_PROMOTED, a, b) < 0.045


def test_chunks_limit_the_growth_with_K():
    a, b = operands(M=16, K=16384, N=16)
    assert error(FP16_FAST, a, b) < 0.3 * error(BF16, a, b)
    assert error(FP16_FAST.with_chunk(None), a, b) > error(BF16, a, b)
    errors = [error(FP16_FAST.with_chunk(chunk), a, b) for chunk in (32, 64, 128, 256)]
    assert errors == sorted(errors)


def test_overflow_inside_a_chunk_is_seen_though_the_whole_sum_fits():
    a = torch.cat([torch.full((1, 64), 300.0), torch.full((1, 64), -300.0)], 1)
    b = torch.full((128, 1), 10.0)  # +192,000, then -192,000
    assert matmul(a, b, FP16).item() == 0.0
    for chunk in (64, 128):
        found = matmul(a, b, FP16_FAST.with_chunk(chunk))
        assert not found.isfinite().any() and simulation.overflowed(found) == 1.0
        assert simulation.relative_error(found, torch.ones(1, 1).double()) == math.inf
    assert matmul(a / 4, b, FP16_FAST).item() == 0.0


def test_subnormals_are_kept():
    tiny = torch.tensor([[2.0**-24]])
    assert matmul(tiny, torch.ones(1, 1), FP16_FAST).item() == 2.0**-24
    assert matmul(tiny / 2, torch.ones(1, 1), FP16_FAST).item() == 0.0


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_batches_and_transposed_operands(mode):
    torch.manual_seed(2)
    a, b = torch.randn(2, 3, 6, 70), torch.randn(2, 3, 4, 70).transpose(-1, -2)
    found = matmul(a, b, mode)
    assert found.shape == (2, 3, 6, 4) and found.dtype == torch.float32
    if mode.scale != "tensor":  # whose scale is that of the whole batch
        torch.testing.assert_close(found[1, 2], matmul(a[1, 2], b[1, 2].contiguous(), mode), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 8, 3), (4, 0, 3)])
def test_empty_operands(shape):
    M, K, N = shape
    for mode in (BF16, FP16_FAST):
        assert torch.equal(matmul(torch.zeros(M, K), torch.zeros(K, N), mode), torch.zeros(M, N))


# fp8


def test_fp8_scales_are_taken_out_again():
    a, b = operands()
    for mode in (FP8, FP8_ROWS, FP8_FAST):
        base = matmul(a, b, mode)
        torch.testing.assert_close(matmul(1024 * a, b / 64, mode), 16 * base, rtol=1e-5, atol=0)
        assert torch.equal(matmul(0 * a, b, mode), 0 * base)


def test_scales_per_row_save_small_rows():
    a, b = operands(M=4, K=256, N=8)
    a[0] *= 1e-6
    exact = a.double() @ b.double()
    by_tensor, by_rows = (simulation.relative_error(matmul(a, b, mode)[:1], exact[:1]) for mode in (FP8, FP8_ROWS))
    assert by_tensor > 0.9 and by_rows < 0.05


def test_fp8_in_fp16_sums_cannot_overflow():
    """Not even a chunk in which every element is the largest, all of one sign."""
    for chunk in (32, 64, 128, 256):
        mode = Mode("m", "e4m3", "e5m2", "fp16", chunk=chunk, scale="tensor", step=16)
        for forms in (("e4m3", "e4m3"), ("e5m2", "e4m3")):
            found = matmul(torch.full((2, 512), 7.0), torch.full((512, 2), 3.0), mode, forms=forms)
            assert found.isfinite().all() and found == pytest.approx(21.0 * 512, rel=2e-3)
            assert math.prod(simulation.fp8_target(form, mode) for form in forms) * chunk <= simulation.HALF_MAX
    assert simulation.fp8_target("e4m3", FP8) == 448.0 and simulation.fp8_target("e5m2", FP8) == 57344.0


def test_gradients_have_a_format_of_their_own():
    a, b = operands()
    assert error(FP8, a, b, forms=("e5m2", "e4m3")) > 1.2 * error(FP8, a, b)  # 2 fraction bits, not 3


# Formats


def test_rounding_to_a_format():
    x = torch.tensor([1.0, 1 + 2.0**-9, 2.0**-25, 7e4, -1e6, 0.0, 500.0])
    assert simulation.round_to(x, "fp32") is x
    assert simulation.round_to(x, "fp16").tolist() == [1.0, 1 + 2.0**-9, 0.0, math.inf, -math.inf, 0.0, 500.0]
    assert simulation.round_to(x, "bf16")[1].item() == 1.0
    assert simulation.round_to(x, "e4m3").tolist() == [1.0, 1.0, 0.0, 448.0, -448.0, 0.0, 448.0]  # saturates
    assert simulation.round_to(x, "e5m2")[4].item() == -57344.0


def test_where_values_fall_in_a_format():
    x = torch.tensor([0.0, 1.0, 2.0**-26, -(2.0**-20), 1e5])
    found = simulation.range_of(x, "fp16")
    assert (found.to_zero, found.subnormal, found.overflow) == (0.25, 0.25, 0.25)  # of the four that are not 0
    assert simulation.range_of(torch.tensor([500.0, 1.0, 2.0**-12]), "e4m3") == simulation.Range(1 / 3, 0.0, 1 / 3)
    assert simulation.range_of(torch.zeros(3), "fp16") == simulation.Range(0.0, 0.0, 0.0)


def test_only_fp16_storage_needs_loss_scaling():
    assert {mode.name for mode in MODES.values() if mode.needs_loss_scaling} == {"fp16", "fp16-fast"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forward": "fp4"}, "forward of mode 'm' is 'fp4': it must be one of fp32, bf16"),
        ({"accumulate": "fp8"}, "accumulate of mode 'm' is 'fp8'"),
        ({"scale": "block"}, "scale of mode 'm' is 'block'"),
        ({"output": "e4m3"}, "output of mode 'm' is 'e4m3'"),
        ({"chunk": 4}, "chunk of mode 'm' is 4: it must be a multiple of step, 8"),
        ({"chunk": 60}, "chunk of mode 'm' is 60"),
        ({"step": 0}, "of mode 'm' is"),
    ],
)
def test_a_mode_that_does_not_exist_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Mode("m", **options)
