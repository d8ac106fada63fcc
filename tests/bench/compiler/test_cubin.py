"""What cubin.py reads, for figures that are known; test_capture.py has real binaries."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest

from bench.compiler import cubin
from bench.compiler.cubin import Resources, occupancy


@pytest.mark.parametrize(
    "arch, registers, shared, warps, blocks, limiter",
    [
        (89, 128, 0, 4, 4, "registers"),
        (89, 129, 0, 4, 3, "registers"),  # 136 per thread in units of 256 per warp
        (89, 40, 0, 8, 6, "registers"),  # 48 warps fit the registers and the SM alike
        (89, 32, 0, 8, 6, "warps"),
        (80, 32, 0, 8, 8, "registers"),
        (90, 24, 0, 8, 8, "warps"),
        (86, 16, 0, 1, 16, "blocks"),
        (89, 16, 0, 1, 24, "blocks"),
        (89, 32, 48 * 1024, 4, 2, "shared"),  # 49 KiB with the reserved one
        (89, 32, 101_376, 4, 1, "shared"),
        (89, 32, 101_377, 4, 0, "shared"),
        (90, 32, 101_377, 4, 2, "shared"),
        (120, 255, 0, 8, 1, "registers"),
    ],
)
def test_occupancy_is_that_of_cudas_calculator(arch, registers, shared, warps, blocks, limiter):
    fit = occupancy(Resources(registers, 0, 0, shared, warps), arch)
    assert (fit.blocks, fit.limiter, fit.warps) == (blocks, limiter, blocks * warps)
    assert fit.fits == (blocks > 0)


def test_occupancy_of_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="arch is 61"):
        occupancy(Resources(32, 0, 0, 0, 4), 61)


def test_opcodes_are_counted_by_base_name_and_width():
    ops = Counter(
        {"HMMA.16816.F32.BF16": 8, "LDG.E.128": 3, "LDG.E.U16": 1, "LDGSTS.E.BYPASS.128": 2, "STG.E": 4, "LDS.128": 9}
    )
    assert cubin.count(ops, "HMMA", "HGMMA") == 8
    assert cubin.count(ops, "LDG") == 4
    assert cubin.access_widths(ops) == {128: 5, 16: 1, 32: 4}


def test_tensor_core_instructions_are_told_by_kind():
    ops = Counter({"HMMA.16816.F32.BF16": 64, "FFMA": 999, "QMMA.16832.F32.E4M3.E4M3": 96, "HFMA2.MMA": 3})
    assert cubin.tensor_core(ops) == {"QMMA.16832.F32.E4M3.E4M3": 96, "HMMA.16816.F32.BF16": 64}


@pytest.mark.parametrize(
    "line, tensor_cores",
    [
        (
            "%4 = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x64xbf16> * tensor<64x64xbf16> -> tensor<64x64xf32>",
            1,
        ),
        ("%4 = tt.dot %a, %b, %c : tensor<64x64xbf16> * tensor<64x64xbf16> -> tensor<64x64xf32>", 1),
        (
            "%4 = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x64xf32> * tensor<64x64xf32> -> tensor<64x64xf32>",
            1,
        ),
        (
            "%4 = tt.dot %a, %b, %c, inputPrecision = tf32x3 : tensor<16x16xf32> * tensor<16x16xf32> -> tensor<16x16xf32>",
            1,
        ),
        ("%4 = tt.dot %a, %b, %c : tensor<64x64xf32> * tensor<64x64xf32> -> tensor<64x64xf32>", 0),
        ("%4 = tt.dot %a, %b, %c : tensor<64x64xf64> * tensor<64x64xf64> -> tensor<64x64xf64>", 0),
    ],
    ids=["bf16", "bf16 of another triton", "tf32", "tf32x3", "fp32", "fp64"],
)
def test_products_in_true_fp32_need_no_tensor_cores(line, tensor_cores):
    compiled = SimpleNamespace(asm={"ttir": f"tt.func public @k() {{\n    {line} loc(#loc1)\n  tt.return\n}}"})
    assert cubin.dots(compiled) == (1, tensor_cores)
