"""Kernels whose results are known, and broken ones, for the emulator to run: in a process whose triton compiles.

``python -m tests.bench.emulator.known`` prints as JSON, by the name of each check, what is wrong with it: "" if nothing.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
import triton
import triton.language as tl

from bench.emulator import mutants
from bench.emulator.dropout import philox
from bench.emulator.launch import emulated
from bench.emulator.unwritten import virtual

# ---------------------------------------------------------------- kernels of known result


@triton.jit
def add_kernel(X, Y, Z, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Z + at, tl.load(X + at, mask=at < n) + tl.load(Y + at, mask=at < n), mask=at < n)


@triton.jit
def softmax_kernel(X, Y, n, BLOCK: tl.constexpr):
    row, cols = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(X + row * n + cols, mask=cols < n, other=float("-inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(Y + row * n + cols, (e / tl.sum(e, 0)).to(Y.dtype.element_ty), mask=cols < n)


@triton.jit
def matmul_kernel(
    A, B, C, M, N, K, am, ak, bk, bn, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, F16: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(N, BN)
    rm, rn = tl.program_id(0) // columns * BM + tl.arange(0, BM), tl.program_id(0) % columns * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        left = (k + rk) < K
        a = tl.load(A + rm[:, None] * am + (k + rk)[None, :] * ak, mask=(rm < M)[:, None] & left[None, :], other=0.0)
        b = tl.load(B + (k + rk)[:, None] * bk + rn[None, :] * bn, mask=(rn < N)[None, :] & left[:, None], other=0.0)
        if F16:
            acc += tl.dot(a, b, out_dtype=tl.float16).to(tl.float32)
        else:
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(C + rm[:, None] * N + rn[None, :], acc, mask=(rm < M)[:, None] & (rn < N)[None, :])


@triton.jit
def integers_kernel(A, B, OUT, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b = tl.load(A + at), tl.load(B + at)
    tl.store(OUT + at, a // b)
    tl.store(OUT + n + at, a % b)
    tl.store(OUT + 2 * n + at, a * b)
    tl.store(OUT + 3 * n + at, tl.maximum(a, b))
    tl.store(OUT + 4 * n + at, (a & b) ^ (a | 5))
    tl.store(OUT + 5 * n + at, a >> (b & 7))
    tl.store(OUT + 6 * n + at, a << (b & 7))
    tl.store(OUT + 7 * n + at, tl.abs(a))
    tl.store(OUT + 8 * n + at, tl.where(a < b, a, b))


@triton.jit
def floats_kernel(X, Y, OUT, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x, y = tl.load(X + at), tl.load(Y + at)
    tl.store(OUT + at, tl.exp(x))
    tl.store(OUT + n + at, tl.log(tl.abs(x)))
    tl.store(OUT + 2 * n + at, tl.sqrt(tl.abs(x)))
    tl.store(OUT + 3 * n + at, tl.rsqrt(tl.abs(x)))
    tl.store(OUT + 4 * n + at, x / y)
    tl.store(OUT + 5 * n + at, tl.erf(x))
    tl.store(OUT + 6 * n + at, tl.sigmoid(x))
    tl.store(OUT + 7 * n + at, tl.fma(x, y, x))
    tl.store(OUT + 8 * n + at, tl.floor(x))
    tl.store(OUT + 9 * n + at, tl.maximum(x, y))
    tl.store(OUT + 10 * n + at, tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL))
    tl.store(OUT + 11 * n + at, tl.where(x < y, 1.0, 0.0) + tl.where(x != x, 2.0, 0.0))
    tl.store(OUT + 12 * n + at, tl.div_rn(x, y))


@triton.jit
def cast_kernel(X, Y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(Y + at, tl.load(X + at).to(Y.dtype.element_ty))


@triton.jit
def reduce_kernel(X, OUT, M: tl.constexpr, N: tl.constexpr):
    rows, cols = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(X + rows[:, None] * N + cols[None, :])
    tl.store(OUT + rows, tl.sum(x, 1))
    tl.store(OUT + M + rows, tl.max(x, 1))
    tl.store(OUT + 2 * M + rows, tl.argmax(x, 1).to(tl.float32))
    tl.store(OUT + 3 * M + cols, tl.sum(x, 0))
    tl.store(OUT + 3 * M + N + rows[:, None] * N + cols[None, :], tl.cumsum(x, 1))


@triton.jit
def transpose_kernel(X, Y, M: tl.constexpr, N: tl.constexpr):
    rows, cols = tl.arange(0, M), tl.arange(0, N)
    x = tl.trans(tl.load(X + rows[:, None] * N + cols[None, :]))
    tl.store(Y + cols[:, None] * M + rows[None, :], x)


@triton.jit
def philox_kernel(OUT, SEED, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b, c, d = tl.philox(tl.load(SEED), at, at * 0 + 1, at * 0 + 2, at * 0 + 3)
    tl.store(OUT + at, a)
    tl.store(OUT + BLOCK + at, b)
    tl.store(OUT + 2 * BLOCK + at, c)
    tl.store(OUT + 3 * BLOCK + at, d)


@triton.jit
def loops_kernel(COUNT, OUT, BLOCK: tl.constexpr):
    """Different numbers of rounds per program, and a branch."""
    pid = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.load(COUNT + pid)):
        total += i + tl.arange(0, BLOCK)
        if i % 3 == 2:
            total = tl.where(total > tl.sum(total, 0) / BLOCK, total, 2 * total)
    tl.store(OUT + pid * BLOCK + tl.arange(0, BLOCK), total)


def assert_close(got, wanted, tolerance=0.0):
    torch.testing.assert_close(got.double(), wanted.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def known_sums_of_all_types():
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.int8):
        for n in (1, 77, 1024):
            x, y = (torch.randint(-9, 9, (n,)).to(dtype) for _ in range(2))
            z = torch.empty(n, dtype=dtype)
            add_kernel[(triton.cdiv(n, 256),)](x, y, z, n, BLOCK=256)
            assert torch.equal(z, x + y), (dtype, n)


def known_softmax():
    for n, warps in ((64, 1), (100, 4), (1000, 8)):
        x, y = torch.randn(5, n), torch.empty(5, n)
        softmax_kernel[(5,)](x, y, n, BLOCK=triton.next_power_of_2(n), num_warps=warps)
        assert_close(y, torch.softmax(x.double(), 1), 2e-6)


def multiplied(a, b, f16=False, precision="ieee", **options):
    (M, K), N = a.shape, b.shape[1]
    c = torch.empty(M, N)
    matmul_kernel[(triton.cdiv(M, 64) * triton.cdiv(N, 32),)](
        a, b, c, M, N, K, *a.stride(), *b.stride(), BM=64, BN=32, BK=32, F16=f16, PRECISION=precision, **options
    )
    return (c - a.double() @ b.double()).abs().max().item()


def known_matrix_products():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2):
        for a_t, b_t, warps, stages in ((False, True, 4, 3), (True, False, 2, 1)):
            a = torch.randn(96, 70).to(dtype).t() if a_t else torch.randn(70, 96).to(dtype)
            b = torch.randn(50, 96).to(dtype).t() if b_t else torch.randn(96, 50).to(dtype)
            error = multiplied(a, b, num_warps=warps, num_stages=stages)
            assert error < 5e-4, (dtype, a_t, b_t, error)


def known_rounding_of_matrix_products():
    a, b = torch.randn(70, 96), torch.randn(96, 50)
    assert 1e-4 < multiplied(a, b, precision="tf32") < 3e-2
    a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))  # exact in tf32
    assert multiplied(a, b, precision="tf32") < 1e-4
    assert 1e-4 < multiplied(a.half(), b.half(), f16=True) < 5e-2


def known_integers():
    for dtype in (torch.int32, torch.int64):
        n = 256
        a, b = torch.randint(-(2**31), 2**31 - 1, (n,)).to(dtype), torch.randint(1, 50, (n,)).to(dtype)
        b[::2] *= -1
        out = torch.empty(9, n, dtype=dtype)
        integers_kernel[(1,)](a, b, out, n, BLOCK=n)
        quotient, rest = torch.div(a, b, rounding_mode="trunc"), torch.fmod(a, b)
        wanted = [quotient, rest, a * b, torch.maximum(a, b), (a & b) ^ (a | 5), a >> (b & 7), a << (b & 7), a.abs()]
        assert torch.equal(out, torch.stack([*wanted, torch.where(a < b, a, b)])), dtype


def known_floats():
    n, nan = 256, float("nan")
    x, y = torch.randn(n) * 3, torch.randn(n)
    x[:4], y[:4] = torch.tensor([nan, 1.0, nan, 0.5]), torch.tensor([1.0, nan, nan, 0.25])
    out = torch.empty(13, n)
    floats_kernel[(1,)](x, y, out, n, BLOCK=n)
    a, b = x.double(), y.double()
    near = [a.exp(), a.abs().log(), a.abs().sqrt(), a.abs().rsqrt(), a / b, torch.erf(a), torch.sigmoid(a), a * b + a]
    exact = [a.floor(), torch.fmax(a, b), torch.maximum(a, b), (a < b).double() + 2 * torch.isnan(a), (x / y).double()]
    assert_close(out[:8], torch.stack(near), 5e-6)
    assert_close(out[8:], torch.stack(exact))


def known_casts():
    ends = [0.0, -0.0, 1e-42, 6e4, 7e4, -1e9, 3.5, 2.5, 448.0, 460.0, 1e5, 2**-10, 2**-17, 0.3, -449.0, 1.0]
    x = torch.cat([torch.randn(200), torch.randn(40) * 1e-6, torch.tensor(ends)])

    def cast(values, dtype):
        y = torch.empty(256, dtype=dtype)
        cast_kernel[(1,)](values, y, BLOCK=256)
        return y

    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(cast(x, dtype), x.to(dtype)), dtype
        assert torch.equal(cast(x.to(dtype), torch.float32), x.to(dtype).float()), dtype
    for dtype in (torch.int32, torch.int8, torch.int64):
        assert torch.equal(cast(x.clamp(-100, 100), dtype), x.clamp(-100, 100).to(dtype)), dtype
    for dtype, largest in ((torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)):
        half = x.half().clamp(-60000, 60000).float()  # what fits fp16 exactly is rounded once
        wanted = half.clamp(-largest, largest).to(dtype)
        assert torch.equal(cast(half, dtype).view(torch.uint8), wanted.view(torch.uint8)), dtype
        every = torch.arange(256, dtype=torch.uint8).view(dtype)
        assert_close(cast(every, torch.float32), every.float())


def known_reductions():
    for M, N, warps in ((4, 64, 1), (8, 256, 4), (64, 32, 4)):
        x, out = torch.randn(M, N), torch.empty(3 * M + N + M * N)
        reduce_kernel[(1,)](x, out, M=M, N=N, num_warps=warps)
        wanted = torch.cat([x.sum(1), x.max(1).values, x.argmax(1).float(), x.sum(0), x.cumsum(1).flatten()])
        assert_close(out, wanted, 1e-4)


def known_transposes():
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        x, y = torch.randint(-100, 100, (64, 32)).to(dtype), torch.empty(32, 64, dtype=dtype)
        transpose_kernel[(1,)](x, y, M=64, N=32)
        assert torch.equal(y, x.t()), dtype


def known_philox():
    seed, at = 0x1234_5678_9ABC_DEF0, np.arange(256)
    out = torch.empty(4, 256, dtype=torch.int32)
    philox_kernel[(1,)](out, torch.tensor([seed]), BLOCK=256)
    assert np.array_equal(out.numpy().view(np.uint32), philox(seed, (at, 0 * at + 1, 0 * at + 2, 0 * at + 3), 10))


def known_loops():
    counts, out = torch.tensor([0, 7, 3, 1, 12], dtype=torch.int32), torch.empty(5, 64)
    loops_kernel[(5,)](counts, out, BLOCK=64, num_warps=2)
    for pid, n in enumerate(counts.tolist()):
        total = torch.zeros(64)
        for i in range(n):
            total += i + torch.arange(64)
            if i % 3 == 2:
                total = torch.where(total > total.sum() / 64, total, 2 * total)
        assert_close(out[pid], total, 1e-5)


# ---------------------------------------------------------------- broken kernels: the kinds of findings that each must give


@triton.jit
def no_mask_kernel(X, Y, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + at, tl.load(X + at))


@triton.jit
def shifted_kernel(X, Y, SHIFT, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + at, tl.load(X + at + SHIFT, mask=at < n, other=0.0), mask=at < n)


@triton.jit
def same_place_kernel(Y, BLOCK: tl.constexpr):
    tl.store(Y + tl.arange(0, BLOCK), tl.program_id(0).to(tl.float32))


@triton.jit
def neighbour_kernel(X, BLOCK: tl.constexpr):
    """Writes its block, reads the next program's."""
    pid, at = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(X + pid * BLOCK + at, pid + 1.0 + 0.0 * at)
    other = (pid + 1) % tl.num_programs(0)
    x = tl.load(X + other * BLOCK + at)
    tl.store(X + (tl.num_programs(0) + pid) * BLOCK + at, x)


@triton.jit
def through_memory_kernel(X, Y, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    """Threads pass values to each other by way of global memory."""
    at = tl.arange(0, BLOCK)
    tl.store(X + at, at * 1.0)
    if BARRIER:
        tl.debug_barrier()
    tl.store(Y + at, tl.load(X + (BLOCK - 1 - at)))


@triton.jit
def misaligned_kernel(TABLE, Y, BLOCK: tl.constexpr):
    """Says of an address that it is a multiple of 16."""
    at = tl.arange(0, BLOCK)
    x = tl.multiple_of(tl.load(TABLE).to(tl.pointer_type(tl.float32)), 16)
    tl.store(Y + at, tl.load(x + at))


@triton.jit
def rows_kernel(X, Y, stride, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    if WIDE:
        row = row.to(tl.int64)
    tl.store(Y + tl.program_id(0) * BLOCK + at, tl.load(X + row * stride + at))


@triton.jit
def atomic_kernel(Y, BLOCK: tl.constexpr):
    tl.atomic_add(Y + tl.arange(0, BLOCK), 1.0)


def fault_out_of_bounds_read(session):
    no_mask_kernel[(2,)](torch.randn(200), torch.empty(256), BLOCK=128)
    return {"out of bounds"}


def fault_out_of_bounds_write(session):
    no_mask_kernel[(2,)](torch.randn(256), torch.empty(250), BLOCK=128)
    return {"out of bounds"}


def fault_one_before(session):
    shifted_kernel[(1,)](torch.randn(128), torch.empty(128), -1, 128, BLOCK=128)
    return {"out of bounds"}


def fault_outside_of_the_view(session):
    base = torch.randn(256)
    shifted_kernel[(1,)](base[:128], torch.empty(128), 5, 128, BLOCK=128)
    return {"outside of the view"}


def fault_uninitialised(session):
    x = torch.empty(256)
    x[:200] = 1.0
    no_mask_kernel[(2,)](x, torch.empty(256), BLOCK=128)
    return {"uninitialised read"}


def fault_two_programs_one_place(session):
    same_place_kernel[(3,)](torch.empty(64), BLOCK=64)
    return {"race between CTAs", "conflicting store", "depends on the order"}


def fault_neighbour(session):
    neighbour_kernel[(4,)](torch.zeros(8 * 64), BLOCK=64)
    return {"race between CTAs", "depends on the order"}


def fault_through_memory(session):
    through_memory_kernel[(1,)](torch.zeros(256), torch.empty(256), BLOCK=256, BARRIER=False)
    return {"race between warps", "depends on the order"}


def fault_misaligned(session):
    x = torch.randn(300)[1:]
    session.reachable = [x]
    misaligned_kernel[(1,)](torch.tensor([x.data_ptr()]), torch.empty(256), BLOCK=256)
    return {"misaligned"}


def fault_address_not_given(session):
    x = torch.randn(300)
    misaligned_kernel[(1,)](torch.tensor([x.data_ptr()]), torch.empty(256), BLOCK=256)
    return {"out of bounds"}


def fault_index_in_32_bits(session):
    x, y = virtual(40, 2**26, dtype=torch.bfloat16), torch.empty(40, 64, dtype=torch.bfloat16)
    rows_kernel[(40,)](x, y, 2**26, WIDE=False, BLOCK=64)
    return {"out of bounds"}


def fault_last_program_of_many(session):
    """Of a grid of which only some programs run: the last one is among them."""
    session.ctas = 8
    no_mask_kernel[(10000,)](torch.zeros(10000 * 128), torch.zeros(10000 * 128 - 1), BLOCK=128)
    assert session.launches[-1].ctas <= 8
    return {"out of bounds"}


def clean_index_in_64_bits(session):
    x, y = virtual(40, 2**26, dtype=torch.bfloat16), torch.empty(40, 64, dtype=torch.bfloat16)
    x[:, :64] = torch.randn(40, 64)
    rows_kernel[(40,)](x, y, 2**26, WIDE=True, BLOCK=64)
    assert torch.equal(x[:, :64], y)
    return set()


def clean_through_memory_with_a_barrier(session):
    y = torch.empty(256)
    through_memory_kernel[(1,)](torch.zeros(256), y, BLOCK=256, BARRIER=True)
    assert torch.equal(y, torch.arange(255, -1, -1).float())
    return set()


def clean_refusal_by_name(session):
    try:
        atomic_kernel[(1,)](torch.zeros(64), BLOCK=64)
    except Exception as error:
        assert "atom" in str(error) or "red" in str(error), error
        return set()
    raise AssertionError("atomics are not emulated")


# ---------------------------------------------------------------- every barrier and every wait, taken out in turn


def product(dtype, stages):
    a, b = torch.randn(128, 128).to(dtype), torch.randn(128, 64).to(dtype)
    return lambda: multiplied(a, b, num_warps=4, num_stages=stages)


def reduction():
    x, out = torch.randn(8, 256), torch.empty(3 * 8 + 256 + 8 * 256)
    return lambda: reduce_kernel[(1,)](x, out, M=8, N=256, num_warps=4)


MUTANTS = {
    "product of bf16": lambda: product(torch.bfloat16, 3),
    "product of fp32": lambda: product(torch.float32, 1),
    "product of e4m3": lambda: product(torch.float8_e4m3fn, 3),
    "reductions": reduction,
}
"""Most mutants are noticed. Not the one without the barrier before the first copy into shared memory, which nobody has used;
triton 3.8 waits more often than it has to at the end of a loop."""


def mutant_check(name):
    run = MUTANTS[name]()

    def passes(change):
        with emulated(89, rewrite=change) as session:
            run()
        return not session.findings.faults()

    ((_, made, alive),) = mutants.survivors(passes)
    return "" if made >= 4 and 2 * len(alive) < made else f"of {made} mutants survive: {alive}"


def check(name, arch=89):
    torch.manual_seed(0)
    if name in MUTANTS:
        return mutant_check(name)
    function = globals()[name]
    with emulated(arch) as session:
        wanted = (function(), set())[1] if name.startswith("known") else function(session)
    found = {finding.kind for finding in session.findings.faults()}
    return "" if found == wanted else f"found {sorted(found)}, expected {sorted(wanted)}"


CHECKS = [name for name in globals() if name.partition("_")[0] in ("known", "fault", "clean")] + list(MUTANTS)


def main(names):
    torch.set_num_threads(1)
    found = {}
    for name in names or CHECKS:
        try:
            found[name] = check(name)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
