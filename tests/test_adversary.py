"""The adversary is as hard as it says, no harder, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests import adversary as module
from tests.adversary import adversary


@pytest.fixture(autouse=True)
def _arithmetic():
    """As it is: these tests set the adversary up themselves."""


@pytest.fixture(autouse=True)
def _on_a_cpu(device):
    if device.type != "cpu":
        pytest.skip("about the interpreter")


@triton.jit
def functions_kernel(X, OUT, n: tl.constexpr):
    x = tl.load(X + tl.arange(0, n))
    tl.store(OUT + tl.arange(0, n), tl.exp(x))
    tl.store(OUT + n + tl.arange(0, n), tl.log(x))
    tl.store(OUT + 2 * n + tl.arange(0, n), tl.sqrt(x))
    tl.store(OUT + 3 * n + tl.arange(0, n), tl.rsqrt(x))
    tl.store(OUT + 4 * n + tl.arange(0, n), 3.0 / x)
    tl.store(OUT + 5 * n + tl.arange(0, n), tl.erf(x))
    tl.store(OUT + 6 * n + tl.arange(0, n), tl.div_rn(3.0, x))


def test_fp32_functions_err_by_what_is_allowed():
    x = torch.linspace(0.1, 4, 512)
    functions = torch.exp, torch.log, torch.sqrt, torch.rsqrt, lambda x: 3 / x, torch.erf
    exact = torch.stack([function(x.double()) for function in functions])
    found = torch.empty(7, 512)
    with adversary():
        assert torch.empty(3).isnan().all()
        functions_kernel[(1,)](x, found, 512)
    product = 4 * 1.45 * 2**-24  # x log2(e) of tl.exp, rounded
    allowed = (module.EX2 + product, module.LOG, module.SQRT, module.RSQRT, module.DIV, module.ERF)
    worst = ((found[:6] - exact) / exact).abs().amax(1).tolist()
    for error, most in zip(worst, allowed):
        rounding = 1.01 * 2**-24
        assert most - product - rounding < error < most + 2 * rounding, worst  # erf is rounded before, too
    assert torch.equal(found[6], torch.full_like(x, 3) / x), "what is asked to be exact is"


@triton.jit
def order_kernel(X, OUT, n):
    i = tl.program_id(0)
    tl.store(OUT, i)
    lanes = tl.arange(0, 4)
    tl.store(OUT + 1 + lanes, tl.load(X + lanes, mask=lanes < 0).to(tl.int32), mask=(lanes >= 0) & (i == 0))


def test_programs_run_backwards_and_masked_lanes_hold_garbage_and_all_is_undone():
    def run(x):
        out = torch.zeros(5, dtype=torch.int32)
        order_kernel[(3,)](x, out, 4)
        return out.tolist()

    plain = [2, 0, 0, 0, 0]
    assert run(torch.ones(4, dtype=torch.int32)) == plain
    with adversary():
        assert run(torch.ones(4, dtype=torch.int32)) == [0] + 4 * [2**31 - 1]
    assert run(torch.ones(4, dtype=torch.int32)) == plain
    assert not torch.are_deterministic_algorithms_enabled()
