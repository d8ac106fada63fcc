"""What is captured and what the compiler made of it, for kernels whose figures are known.

A process either interprets kernels or compiles them, so this file runs itself as a child without TRITON_INTERPRET; the
child compiles everything once and prints JSON, and the tests read it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from bench.compiler import cubin
from bench.compiler.capture import capture_launches
from fastgpt.kernels import runtime

ROOT = Path(__file__).parents[3]


@triton.jit
def dot_kernel(a_ptr, b_ptr, y_ptr, n, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + j[None, :])
    tl.store(y_ptr + m[:, None] * N + j[None, :], tl.dot(a, b).to(y_ptr.dtype.element_ty), mask=m[:, None] < n)


@triton.jit
def fp32_dot_kernel(a_ptr, y_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a = tl.load(a_ptr + at)
    tl.store(y_ptr + at, tl.dot(a, a, input_precision=PRECISION))


@triton.jit
def wrong_kernel(x_ptr, N: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, N), tl.zeros((2 * N,), tl.float32))  # shapes differ


def child() -> None:
    """Compile, and print the rows of each experiment."""
    bf16, out = torch.empty(64 * 64, dtype=torch.bfloat16), {}
    square = {"M": 64, "N": 64, "K": 64}

    def rows(launches):
        return [asdict(row) for row in cubin.rows(launches)]

    for arch in (80, 89, 90):
        with capture_launches(arch, case="square") as launches:
            dot_kernel[(1,)](bf16, bf16, bf16, 64, **square)
            dot_kernel[(1,)](bf16, bf16, bf16, 32, **square)  # the same binary
            dot_kernel[(1,)](bf16, bf16, bf16, 64, **square, num_warps=8)
            dot_kernel[(1,)](bf16[1:], bf16, bf16, 64, **square)  # not aligned: another binary
        out[f"sm_{arch}"] = {"launches": len(launches), "rows": rows(launches)}
    with capture_launches(89) as launches:
        dot_kernel[(1,)](bf16, bf16, bf16, 64, M=64, N=128, K=64, num_warps=4, maxnreg=40)
        dot_kernel[(1,)](bf16, bf16, bf16, 256, M=256, N=256, K=128, num_warps=8)
    out["bad"] = {"rows": rows(launches)}
    with capture_launches(89) as launches:
        for precision in ("ieee", "tf32"):
            fp32_dot_kernel[(1,)](bf16.float(), torch.empty(64 * 64), 16, precision)
    out["precision"] = {"rows": rows(launches)}
    with capture_launches(89) as launches:
        for n in (128, 128, 256):
            dot_kernel[lambda given: (triton.cdiv(given["n"], given["M"]), 3)](bf16, bf16, bf16, n, **square)
        try:
            dot_kernel[(1, 2**16)](bf16, bf16, bf16, 64, **square)
        except RuntimeError as error:
            out["grid too large"] = str(error)
    out["grids"] = {"rows": rows(launches)}
    before = triton.runtime.driver._active, runtime.compile_only, runtime.compile_only_sms
    try:
        with capture_launches(89, sms=128):
            out["sms"] = runtime.sm_count(torch.device("cpu"))
            wrong_kernel[(1,)](bf16, N=64)
    except RuntimeError as error:
        out["error"] = str(error)
    out["restored"] = before == (triton.runtime.driver._active, runtime.compile_only, runtime.compile_only_sms)
    out["launches run again"] = triton.runtime.jit.JITFunction.run.__qualname__ == "JITFunction.run"
    print(json.dumps(out))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("arch", [80, 89, 90])
def test_figures_of_a_64x64x64_dot(compiled, arch):
    found = compiled[f"sm_{arch}"]["rows"][0]
    assert (found["kernel"], found["dtype"], found["arch"], found["case"]) == ("dot_kernel", "bf16", arch, "square")
    assert found["config"] == "M=64 N=64 K=64 w4 s3"
    kind = "HGMMA.64x64x16.F32.BF16" if arch == 90 else "HMMA.16816.F32.BF16"
    assert list(found["tensor_core"]) == [kind] and found["dots"] == found["tensor_dots"] == 1
    assert found["wide_share"] == 1.0
    assert found["stack"] == found["spill_loads"] == found["spill_stores"] == 0
    assert found["shared"] == 2 * 64 * 64 * 2, "two bf16 operands"
    assert 32 <= found["registers"] <= 128 and found["blocks_per_sm"] >= 4


def test_one_process_compiles_for_several_architectures(compiled):
    keys = {row["key"] for arch in (80, 89, 90) for row in compiled[f"sm_{arch}"]["rows"]}
    assert len(keys) == 9
    wgmma, hmma = (sum(compiled[arch]["rows"][0]["tensor_core"].values()) for arch in ("sm_90", "sm_89"))
    assert wgmma < hmma, "one HGMMA of sm_90 does the work of several HMMA"


def test_equal_launches_are_one_binary_and_unaligned_pointers_another(compiled):
    assert compiled["sm_89"]["launches"] == 4
    aligned, eight_warps, unaligned = compiled["sm_89"]["rows"]
    assert eight_warps["warps"] == 8
    assert unaligned["wide_share"] < aligned["wide_share"]


def test_a_grid_that_cuda_would_refuse_is_refused(compiled):
    assert "dot_kernel is launched over (1, 65536) blocks" in compiled["grid too large"]


def test_spills_are_seen(compiled):
    spilling = compiled["bad"]["rows"][0]
    assert spilling["registers"] <= 40
    assert spilling["stack"] > 0 and spilling["spill_loads"] > 0 and spilling["spill_stores"] > 0


def test_fp32_products_run_on_tensor_cores_only_where_tf32_is_asked_for(compiled):
    exact, tf32 = compiled["precision"]["rows"]
    assert (exact["dots"], exact["tensor_dots"], exact["tensor_core"]) == (1, 0, {})
    assert tf32["tensor_dots"] == 1 and list(tf32["tensor_core"]) == ["HMMA.1688.F32.TF32"]


def test_a_grid_may_be_a_function_and_launches_are_counted_per_grid(compiled):
    assert [(row["grid"], row["launches"]) for row in compiled["grids"]["rows"]] == [([2, 3], 2), ([4, 3], 1)]


def test_shared_memory_that_does_not_fit_is_seen(compiled):
    large = compiled["bad"]["rows"][1]
    assert large["shared"] == 2 * 256 * 128 * 2 > 101_376
    assert (large["blocks_per_sm"], large["limiter"]) == (0, "shared")


def test_a_kernel_that_does_not_compile_is_named(compiled):
    assert compiled["error"].startswith("wrong_kernel does not compile for sm_89 with {'N': 64")


def test_everything_is_restored_after_an_error(compiled):
    assert compiled["sms"] == 128
    assert compiled["restored"] and compiled["launches run again"]


if __name__ == "__main__":
    child()
