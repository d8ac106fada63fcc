"""bfloat16 in kernels equals bfloat16 in PyTorch.

The same kernels run compiled with --device cuda, where the hardware gives these answers.
"""

import pytest
import torch
import triton
import triton.language as tl
from torch.nn.functional import gelu

from bench.parity import assert_parity
from fastgpt.kernels import interpreter, matmul, runtime

# bug 24: the stock interpreter computes bfloat16 on its raw bits.
BF16 = torch.bfloat16


@triton.jit
def cast_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0).to(y_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def binary_kernel(a_ptr, b_ptr, y_ptr, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + i, mask=i < n, other=0)
    b = tl.load(b_ptr + i, mask=i < n, other=0)
    if OP == "add":
        y = a + b
    elif OP == "sub":
        y = a - b
    elif OP == "mul":
        y = a * b
    elif OP == "div":
        y = a / b
    elif OP == "lt":
        y = a < b
    elif OP == "le":
        y = a <= b
    elif OP == "eq":
        y = a == b
    elif OP == "ne":
        y = a != b
    elif OP == "max":
        y = tl.maximum(a, b)
    elif OP == "min":
        y = tl.minimum(a, b)
    elif OP == "where":
        y = tl.where(a > b, a, b)
    elif OP == "neg":
        y = -a
    else:
        y = tl.abs(a)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def dot_kernel(a_ptr, b_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(y_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)).to(y_ptr.dtype.element_ty))


def cast(x, dtype):
    y = torch.empty_like(x, dtype=dtype)
    cast_kernel[(triton.cdiv(x.numel(), 8192),)](x, y, x.numel(), BLOCK=8192)
    return y


def binary(name, a, b, dtype=BF16):
    y = torch.empty_like(a, dtype=dtype)
    binary_kernel[(1,)](a, b, y, a.numel(), OP=name, BLOCK=triton.next_power_of_2(a.numel()))
    return y


def same(got, expected):
    """Equal bit for bit, except that any NaN equals any NaN."""
    assert got.dtype == expected.dtype
    if not expected.is_floating_point():
        assert torch.equal(got, expected)
        return
    assert torch.equal(got.isnan(), expected.isnan())
    bits = {2: torch.int16, 4: torch.int32}[expected.element_size()]
    assert torch.equal(got.nan_to_num().view(bits), expected.nan_to_num().view(bits))


def all_bf16(device):
    """Every one of the 65,536 bit patterns: zeros, subnormals, infinities and NaNs among them."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32, device=device).to(torch.int16).view(BF16)


def pairs(device):
    """Two vectors of bf16: random ones, and every pair of the values that bit patterns get wrong."""
    special = torch.tensor(
        [0.0, -0.0, 1.0, -1.0, 1.0078125, -3.5, 3.0e38, 1e-40, float("inf"), float("-inf"), float("nan")]
    )
    grid = torch.cartesian_prod(special, special).T
    random = torch.randn(2, 512) * torch.logspace(-3, 3, 512)
    return torch.cat((grid, random), 1).to(device, BF16).contiguous().unbind(0)


def test_fp32_to_bf16_rounds_to_nearest_even(device):
    halfway = 2**15  # the dropped 16 bits of a tie
    upper = torch.arange(-(2**15), 2**15, 7, dtype=torch.int64)
    lower = torch.tensor([0, 1, halfway - 1, halfway, halfway + 1, 2 * halfway - 1])
    bits = (upper[:, None] * 2**16 + lower).flatten().to(torch.int32)
    x = torch.cat((bits.view(torch.float32), torch.randn(1000))).to(device)
    same(cast(x, BF16), x.to(BF16))


@pytest.mark.parametrize(
    "value",
    [1.00390625, 1.01171875, -1.00390625, 3.4e38, 3.3961775e38, 1e-45, float("nan"), float("inf"), float("-inf")],
)
def test_fp32_to_bf16_of_a_tie_an_overflow_or_a_nonfinite_value(device, value):
    x = torch.tensor([value], device=device)
    same(cast(x, BF16), x.to(BF16))


def test_nan_with_only_low_bits_set_stays_nan(device):
    x = torch.tensor([0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32).to(device)
    assert x.isnan().all() and cast(x, BF16).isnan().all()


def test_bf16_to_fp32_is_exact_for_every_pattern(device):
    x = all_bf16(device)
    same(cast(x, torch.float32), x.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32])
def test_cast_between_bf16_and_a_dtype_that_is_not_fp32(device, dtype):
    x = (torch.randn(4096) * 100).to(device, BF16)
    same(cast(x, dtype), x.to(dtype))
    y = (torch.randn(4096) * 1000).to(device, dtype)
    same(cast(y, BF16), y.to(BF16))


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_arithmetic_is_rounded_once(device, name):
    a, b = pairs(device)
    same(binary(name, a, b), getattr(torch, name)(a.float(), b.float()).to(BF16))


def test_division(device):
    # The hardware's fp32 division of triton is approximate in its last bit, which bf16 rounding can carry up.
    a, b = (x[-512:] for x in pairs(device))  # the random ones
    got, expected = binary("div", a, b), a.double() / b.double()
    assert_parity("a / b", got, expected, a / b)


@pytest.mark.parametrize("name", ["lt", "le", "eq", "ne"])
def test_comparisons_know_signs_zeros_and_nan(device, name):
    a, b = pairs(device)
    same(binary(name, a, b, torch.int32), getattr(torch, name)(a, b).int())


@pytest.mark.parametrize("name", ["max", "min", "where", "neg", "abs"])
def test_selections_and_signs(device, name):
    a, b = (x[~(sum(pairs(device)).isnan())].contiguous() for x in pairs(device))
    expected = {
        "max": lambda: torch.maximum(a, b),
        "min": lambda: torch.minimum(a, b),
        "where": lambda: torch.where(a > b, a, b),
        "neg": lambda: 0 - a,
        "abs": lambda: a.abs(),
    }[name]()
    same(binary(name, a, b) + 0, expected + 0)  # -0 + 0 is 0


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_dot(device, dtype):
    a, b = torch.randn(2, 64, 64, device=device).to(BF16)
    got = torch.empty(64, 64, dtype=dtype, device=device)
    dot_kernel[(1,)](a, b, got, N=64)
    assert_parity("a @ b", got, a.double() @ b.double(), (a.float() @ b.float()).to(dtype))


def test_install_twice_changes_nothing(device):
    if not runtime.INTERPRET:
        return  # there is nothing to install in a process that compiles
    from triton.runtime.interpreter import InterpreterBuilder

    before = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot, InterpreterBuilder.binary_op
    interpreter.install()
    assert before == (InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot, InterpreterBuilder.binary_op)


@triton.jit
def first_program_kernel(y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    mine = (i < n) & (tl.program_id(0) == 0)
    tl.store(y_ptr + tl.program_id(0) * BLOCK + i, tl.where(~mine, 1, 2))
    tl.store(y_ptr + i, 3, mask=mine)


def test_a_comparison_of_scalars_is_a_mask_over_a_block(device):
    y = torch.zeros(2, 8, dtype=torch.int32, device=device)
    first_program_kernel[(2,)](y, 3, BLOCK=8)
    assert y.tolist() == [[3] * 3 + [1] * 5, [1] * 8]


@triton.jit
def _doubled(x):
    return tl.sum(x[:, None], axis=1) * 2


@triton.jit
def nested_kernel(x_ptr, n, FAIL: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = _doubled(tl.load(x_ptr + i, mask=i < n, other=0))
    if FAIL:
        x += tl.zeros((BLOCK // 2,), tl.float32)  # no such broadcast
    tl.store(x_ptr + i, x, mask=i < n)


@pytest.mark.skipif(not runtime.INTERPRET, reason="compiled kernels do not rebind triton.language")
def test_a_launch_leaves_triton_as_it_was_and_works_after_one_that_failed():
    def language():
        return {(each, name): getattr(each, name) for each in (tl, tl.core, tl.math, tl.tensor) for name in dir(each)}

    before = language()
    for fail in (False, True, False):
        x = torch.arange(5.0)
        if fail:
            with pytest.raises(Exception, match="incompatible dimensions"):
                nested_kernel[(1,)](x, 5, FAIL=True, BLOCK=8)
        else:
            nested_kernel[(1,)](x, 5, FAIL=False, BLOCK=8)
            assert x.tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]
            assert language() == before


@triton.jit
def zeros_kernel(y_ptr, SHAPE: tl.constexpr, COLUMN: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, 4) + tl.zeros((SHAPE,), tl.int32), tl.zeros((COLUMN, 1), tl.float32).shape[0])


@pytest.mark.skipif(not runtime.INTERPRET, reason="compiled kernels know a shape when they are compiled")
@pytest.mark.parametrize(("shape", "column"), [(4.0, 8), (3, 8), (8, 8), (4, 6), (4, 2**21)])
def test_a_shape_is_refused_as_before_though_one_like_it_is_known(shape, column):
    y = torch.zeros(4)
    zeros_kernel[(1,)](y, SHAPE=4, COLUMN=8)
    assert y.tolist() == [8.0] * 4
    with pytest.raises(Exception, match=r"power of 2|must have type|incompatible dimensions|exceeds triton maximum"):
        zeros_kernel[(1,)](y, SHAPE=shape, COLUMN=column)


@triton.jit
def gelu_kernel(y_ptr):
    tl.store(y_ptr, matmul.gelu(tl.load(y_ptr), True))


def test_a_module_launches_its_own_kernels_after_another_has_called_its_functions(device):
    y = torch.ones(1, device=device)
    gelu_kernel[(1,)](y)
    assert_parity("gelu", y, gelu(torch.ones(1, device=device).double()), gelu(torch.ones(1, device=device)))
    x = torch.randn(2, 16, device=device)
    assert_parity("gelu", matmul.pointwise(None, x.dtype, x, None, 0.0, "gelu_erf", None), gelu(x.double()), gelu(x))
