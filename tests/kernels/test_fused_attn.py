"""Attention against its fp64 specification: outputs and gradients over shapes, strides, masks and dropout."""

from __future__ import annotations

import itertools
import math
from functools import cache, partial

import pytest
import torch
import triton
import triton.language as tl
from torch.utils.checkpoint import checkpoint

from bench import parity
from fastgpt.kernels import attention, fused_attn, qkv_attention, reference, runtime, tuning

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check(q, k, v, *, upstream=None, **options):
    """Parity of attention's output and its three gradients with the reference."""
    parity.check(
        lambda q, k, v: attention(q, k, v, **options),
        lambda q, k, v: reference.attention(q, k, v, **options),
        {"q": q, "k": k, "v": v},
        upstream=upstream,
        operand_dtype=None if q.dtype == torch.float32 else q.dtype,
    )


def check_packed(qkv, n_head, **options):
    parity.check(
        lambda qkv: qkv_attention(qkv, n_head, **options),
        lambda qkv: reference.qkv_attention(qkv, n_head, **options),
        {"qkv": qkv},
        operand_dtype=None if qkv.dtype == torch.float32 else qkv.dtype,
    )


def inputs(device, T_q, T_k=None, *, B=1, H=1, H_kv=None, D=16, dtype=torch.float32):
    T_k, H_kv = T_k or T_q, H_kv or H
    shapes = (B, T_q, H, D), (B, T_k, H_kv, D), (B, T_k, H_kv, D)
    return tuple(torch.randn(shape, device=device).to(dtype) for shape in shapes)


def packed(device, T, n_head=2, D=16, B=2, dtype=torch.float32, n_kv_head=None):
    return torch.randn(B, T, (n_head + 2 * (n_kv_head or n_head)) * D, device=device).to(dtype)


# ---- Values and gradients -------------------------------------------------------------------------------------------


@pytest.mark.adversarial
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("dtype", FLOATS)
def test_packed_parity(device, dtype, causal):
    # bug 15: causal=False reaches backward too. bug 24: bf16 as well, through the repaired interpreter.
    check_packed(packed(device, 100, D=32, dtype=dtype), 2, causal=causal)


@pytest.mark.parametrize("T", (1, 17, 63, 65, 127))
def test_ragged_lengths(device, T):
    # bug 16, with several heads
    check_packed(packed(device, T, B=1), 2)


@pytest.mark.parametrize("T", (1000, 1025))
def test_long_ragged_lengths(device, T):
    check_packed(packed(device, T, n_head=1, B=1), 1)


@pytest.mark.parametrize("D", (16, 64, 80, 96, 128, 256))
def test_head_dimensions(device, D):
    check_packed(packed(device, 70, n_head=1, D=D, B=1, dtype=torch.float16), 1)


@pytest.mark.parametrize("n_kv_head", (1, 2))
def test_grouped_queries_sum_gradients_over_their_group(device, n_kv_head):
    check_packed(packed(device, 40, n_head=4, n_kv_head=n_kv_head, B=2), 4, n_kv_head=n_kv_head)


def test_scale(device):
    check(*inputs(device, 70), scale=0.7)


def test_scale_of_zero_is_the_mean_of_what_is_seen(device):
    q, k, v = inputs(device, 70)
    n_seen = torch.arange(1, 71, device=device)[None, :, None, None]
    means = (x.cumsum(1) / n_seen for x in (v.double(), v))
    parity.assert_parity("out", attention(q, k, v, scale=0.0), *means)


def test_negative_scale(device):
    q, k, v = inputs(device, 70)
    parity.check(  # PyTorch's takes the square root of the scale
        lambda q, k, v: attention(q, k, v, scale=-0.3),
        lambda q, k, v: reference.attention(-q, k, v, scale=0.3),
        {"q": q, "k": k, "v": v},
    )


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("window", (1, 20, 70, 500))
def test_window(device, window, causal):
    check(*inputs(device, 150), window=window, causal=causal)


@pytest.mark.parametrize("T_q, T_k", ((1, 100), (30, 100), (100, 30), (70, 130)))
@pytest.mark.parametrize("causal", (True, False))
def test_other_number_of_keys_is_aligned_bottom_right(device, T_q, T_k, causal):
    check(*inputs(device, T_q, T_k), causal=causal)


@pytest.mark.parametrize("causal", (True, False))
def test_cache_of_which_kv_len_keys_exist(device, causal):
    # Rows without any key among them: kv_len 0, and 3 keys for 5 queries.
    kv_len = torch.tensor([0, 3, 5, 64, 100], dtype=torch.int32, device=device)
    check(*inputs(device, 5, 100, B=5), kv_len=kv_len, causal=causal)
    check(*inputs(device, 5, 100, B=5), kv_len=kv_len, causal=causal, window=30)


def test_what_lies_past_kv_len_is_never_read(device):
    q, k, v = inputs(device, 4, 100)
    kv_len = torch.tensor([37], device=device)
    expected = attention(q, k[:, :37], v[:, :37])
    k[:, 37:], v[:, 37:] = math.nan, math.nan
    assert torch.equal(attention(q, k, v, kv_len=kv_len), expected)


def test_decoding_equals_the_last_rows(device):
    q, k, v = inputs(device, 80, H=2)
    wide, same = reference.attention(q.double(), k.double(), v.double()), reference.attention(q, k, v)
    for i in (0, 63, 64, 79):
        row = slice(i, i + 1)
        one = attention(q[:, row], k, v, kv_len=torch.tensor([i + 1], device=device))
        parity.assert_parity(f"row {i}", one, wide[:, row], same[:, row])


DOCUMENTS = {
    "runs": [0] * 50 + [1] * 1 + [2] * 80 + [7] * 19,
    "interleaved": [i % 3 for i in range(150)],
    "negative and large": [-(2**31)] * 70 + [2**31 - 1] * 80,
}


@pytest.mark.adversarial
@pytest.mark.parametrize("options", ({}, {"causal": False}, {"window": 20}), ids=str)
@pytest.mark.parametrize("ids", DOCUMENTS)
def test_documents(device, ids, options):
    docs = torch.tensor([DOCUMENTS[ids], [4] * 150], dtype=torch.int32, device=device)
    check_packed(packed(device, 150, n_head=1), 1, doc_ids=docs, **options)


@pytest.mark.parametrize("options", ({}, {"causal": False}, {"window": 90}), ids=str)
def test_documents_of_16_bits(device, options):
    """Blocks within one document then go without a mask."""
    docs = torch.tensor([[0] * 10 + [1] * 200, [2] * 210], dtype=torch.int32, device=device)
    check_packed(packed(device, 210, n_kv_head=1, dtype=torch.float16), 2, n_kv_head=1, doc_ids=docs, **options)


def test_left_padding_as_a_document(device):
    docs = torch.tensor([[-1] * 80 + [0] * 50], device=device)
    check(*inputs(device, 60, 130), doc_ids=docs)
    check(*inputs(device, 60, 130), doc_ids=docs, kv_len=torch.tensor([110], device=device))


# ---- Blocks that are visited ----------------------------------------------------------------------------------------


@triton.jit
def ends_kernel(
    out, starts, extents, offset, T_q, n_keys, T_k, window, KEYS: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Ends of the three parts that a program walks over: of forward and dQ (KEYS), or of dK and dV."""
    start = tl.load(starts + tl.program_id(0))
    if KEYS:
        ends = fused_attn._key_blocks(
            start, offset, T_q, n_keys, T_k, extents, window, CAUSAL, True, True, BLOCK_M, BLOCK_N
        )
    else:
        ends = fused_attn._query_blocks(
            start, offset, T_q, n_keys, T_k, extents, window, CAUSAL, True, True, BLOCK_M, BLOCK_N
        )
    for part in tl.static_range(4):
        tl.store(out + tl.program_id(0) * 4 + part, ends[part])


@cache
def extents_of_equal_documents(T, length, device):
    return fused_attn.document_extents((torch.arange(T, dtype=torch.int32, device=device) // length)[None])


def walked(device, T, keys, starts, *, block, extents, window, causal):
    """(first blocks, unmasked blocks, last blocks) of each program that owns block[0] positions from one of ``starts``."""
    out = torch.empty(len(starts), 4, dtype=torch.int32, device=device)
    at = torch.tensor(starts, dtype=torch.int32, device=device)
    M, N = block if keys else block[::-1]
    ends_kernel[(len(starts),)](out, at, extents, 0, T, T, T, window, KEYS=keys, CAUSAL=causal, BLOCK_M=M, BLOCK_N=N)
    return [tuple(range(a, b, block[1]) for a, b in itertools.pairwise(row)) for row in out.tolist()]


@pytest.mark.parametrize("keys, block", [(True, (128, 32)), (True, (64, 32)), (False, (32, 64)), (False, (64, 32))])
@pytest.mark.parametrize(
    "T, length, window, causal",
    [(65536, None, 1024, True), (65536, None, 700, False), (8192, 3000, None, True), (8192, 3000, 1000, True),
     (8192, 90, None, False)],
)  # fmt: skip
def test_no_block_outside_of_window_and_document_is_walked_over(device, keys, block, T, length, window, causal):
    """For some programs: what is walked over are the blocks that have a visible pair; those of which every pair is visible
    go without a mask."""
    own = block[0]
    starts = [start // own * own for start in (0, own, 3000, 5000, 7000, T - own)]
    extents = None if length is None else extents_of_equal_documents(T, length, device)
    found = walked(device, T, keys, starts, block=block, extents=extents, window=window, causal=causal)
    for start, parts in zip(starts, found):
        ranges = []
        for p in range(start, start + own):  # what a query sees, or which queries see a key
            first, last = (
                (0, T - 1) if length is None else (p // length * length, min(T, (p // length + 1) * length) - 1)
            )
            if window is not None:
                first, last = max(first, p - window + 1), min(last, p + window - 1)
            ranges.append((first if keys or not causal else p, p if keys and causal else last))
        lowest, highest = min(a for a, _ in ranges) // block[1] * block[1], max(b for _, b in ranges)
        visited = [n for part in parts for n in part]
        assert visited == list(range(lowest, highest + 1, block[1])), start
        whole = max(a for a, _ in ranges), min(b for _, b in ranges)
        assert list(parts[1]) == [n for n in visited if whole[0] <= n and n + block[1] - 1 <= whole[1]], start


def test_ids_in_any_order_leave_no_block_out(device):
    """Ids that come back later, and fall: extents are of ids between the least and the greatest of a span."""
    torch.manual_seed(3)
    docs = torch.randint(-3, 3, (2, 40), device=device).repeat_interleave(25, 1).to(torch.int32)
    docs[1] = docs[1].sort(descending=True).values
    first, end, run_first, run_end = fused_attn.document_extents(docs).cpu().unbind(1)
    for b, span in itertools.product(range(2), range(first.shape[1])):
        ids = docs[b].cpu()
        mine = ids[span * 32 : span * 32 + 32]
        met = ((ids >= mine.min()) & (ids <= mine.max())).nonzero()
        assert (first[b, span], end[b, span]) == (met[0], met[-1] + 1)
        if mine.unique().numel() > 1:
            assert run_first[b, span] >= run_end[b, span]
        else:
            a, z = int(run_first[b, span]), int(run_end[b, span])
            assert a <= span * 32 and z >= min(span * 32 + 32, 1000) and ids[a:z].unique().numel() == 1
            assert (a == 0 or ids[a - 1] != mine[0]) and (z == 1000 or ids[z] != mine[0])


def test_more_sequences_than_the_second_side_of_a_grid_takes(monkeypatch):
    grids = []
    monkeypatch.setattr(fused_attn, "document_extents_kernel", Launched(grids))
    fused_attn.document_extents(torch.zeros(70_000, 33, dtype=torch.int32))
    assert grids == [(70_000, 2)]


class Launched:
    """Stands for a kernel; notes the grids that it is launched with."""

    def __init__(self, grids):
        self.grids = grids

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **options: None


def test_a_long_context_of_documents_is_each_of_them_alone(device):
    """Sliding window, grouped queries: outputs, lse and gradients of every document are those of it alone."""
    T, lengths = 600, (200, 33, 100, 67, 200)
    docs = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths)).to(device, torch.int32)[None]
    qkv, upstream = packed(device, T, n_head=2, n_kv_head=1, B=1), torch.randn(1, T, 32, device=device)

    def results(qkv, upstream, docs):
        out, lse = fused_attn._qkv_attention_fwd(qkv, docs, None, 2, 1, True, 0.25, 150, 0.0, False)
        return out, lse.mT, fused_attn._qkv_attention_bwd(
            upstream, qkv, out, lse, docs, None, 2, 1, True, 0.25, 150, 0.0, False
        )  # fmt: skip

    together = results(qkv, upstream, docs)
    for begin, length in zip(itertools.accumulate((0, *lengths)), lengths):
        alone = results(*(x[:, begin : begin + length].contiguous() for x in (qkv, upstream)), None)
        for whole, part in zip(together, alone):
            torch.testing.assert_close(whole[:, begin : begin + length], part, rtol=1e-4, atol=1e-5)


LONG, WINDOW = 4096, 128


@pytest.mark.parametrize("begin, end", [(LONG - 100, LONG), (2950, 3050)])
def test_a_part_of_a_long_context_is_what_its_window_and_document_say(device, begin, end):
    """Against the specification of the queries begin..end and the keys in their window: outputs, gradients and lse."""
    docs = torch.repeat_interleave(torch.arange(3), torch.tensor((1000, 2000, LONG - 3000))).to(device, torch.int32)[
        None
    ]
    whole, first = inputs(device, LONG), begin - WINDOW + 1
    parts = whole[0][:, begin:end], whole[1][:, first:end], whole[2][:, first:end]

    def placed(q, k, v):
        starts = zip(whole, (begin, first, first), (q, k, v))
        return [torch.cat((x[:, :at], part, x[:, end:]), 1) for x, at, part in starts]

    near = docs[:, first:end]
    parity.check(
        lambda q, k, v: attention(*placed(q, k, v), window=WINDOW, doc_ids=docs)[:, begin:end],
        lambda q, k, v: reference.attention(q, k, v, window=WINDOW, doc_ids=near),
        dict(zip("qkv", parts)),
    )
    lse = fused_attn._attention_fwd(*whole, docs, None, None, True, 0.25, WINDOW, 0.0, False)[1][0, 0, begin:end]
    scores = (parts[0][0, :, 0].double() @ parts[1][0, :, 0].double().T) / 4
    distance = torch.arange(begin, end, device=device)[:, None] - torch.arange(first, end, device=device)
    seen = (0 <= distance) & (distance < WINDOW) & (docs[0, begin:end, None] == near)
    expected = scores.masked_fill(~seen, -math.inf).logsumexp(1) / math.log(2)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-5)


def test_forward_and_backward_of_a_long_context_drop_the_same(device):
    """With a fixed mask the output is linear in v, so (A v) u = v (A^T u): A^T u is the gradient. 0.3 of the weight is dropped
    at late positions as at early ones."""
    q, k, _ = inputs(device, LONG)
    v, u = torch.ones(2, 1, LONG, 1, 16, device=device, dtype=torch.float32)
    v.requires_grad_()
    u[:, : LONG - 300] = 0
    out = attention(q, k, v, window=WINDOW, dropout_p=0.3)
    out.backward(u)
    torch.testing.assert_close((out * u).sum(), (v * v.grad).sum())
    late = out.detach()[0, -300:, 0, 0]
    assert abs(late.mean() - 1) < 0.05 and late.std() > 0.05 and out.detach()[0, :300, 0, 0].std() > 0.05


# ---- Order of launch ------------------------------------------------------------------------------------------------


@triton.jit
def turns_kernel(out, n_blocks, together):
    row, turn = fused_attn._in_turn(n_blocks, together)
    tl.store(out + 2 * tl.program_id(0), row)
    tl.store(out + 2 * tl.program_id(0) + 1, turn)


@pytest.mark.parametrize("rows, blocks, together", [(1, 4, 1), (5, 1, 2), (7, 3, 1), (7, 3, 3), (6, 4, 3), (6, 4, 6)])
def test_heads_of_a_group_take_turns(device, rows, blocks, together):
    out = torch.empty(rows * blocks, 2, dtype=torch.int32, device=device)
    turns_kernel[(rows * blocks,)](out, blocks, together)
    every = itertools.product(range(rows), range(blocks))
    assert list(map(tuple, out.tolist())) == sorted(every, key=lambda at: (at[0] // together, at[1], at[0]))


@pytest.mark.parametrize(
    "rows, T, l2_mb, together",
    [(96, 1024, 36, 48), (192, 1024, 36, 64), (48, 1024, 36, 48), (48, 4096, 36, 16), (12, 65536, 36, 1), (97, 1024, 6, 11)],
)  # fmt: skip
def test_heads_are_grouped_by_what_l2_holds(rows, T, l2_mb, together):
    """K and V of 64 columns in 16 bits: 256 KB for 1024 tokens of a head."""
    assert fused_attn.heads_together(rows, rows * T * 256, l2_mb * 2**20) == together


def test_the_order_of_launch_changes_no_bit(device, monkeypatch):
    """Grouped queries, documents, window and dropout's mask, which all go by a program's head and block."""
    docs = torch.tensor([[0] * 40 + [1] * 30], dtype=torch.int32, device=device)
    qkv, results = packed(device, 70, n_head=6, n_kv_head=3, B=1), []
    for l2_bytes, groups in ((1, (1, 1)), (36_000, (3, 1)), (72_000, (6, 2))):
        monkeypatch.setattr(runtime, "l2_bytes", lambda device, found=l2_bytes: found)
        q, k, _ = fused_attn.unpack(qkv, 6, 3)
        walked = ((6, 2 * k.nbytes), (3, 2 * q.nbytes))
        assert tuple(fused_attn.heads_together(*of, l2_bytes) for of in walked) == groups
        torch.manual_seed(11)
        leaf = qkv.clone().requires_grad_()
        out = qkv_attention(leaf, 6, n_kv_head=3, doc_ids=docs, window=50, dropout_p=0.2)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaf)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


# ---- Sums in fp16 ---------------------------------------------------------------------------------------------------
#
# The interpreter rounds a block's sum once, where tensor cores round every 8 products: these tests hold the wiring to the
# parity bound of fp16. What the rounding costs on a chip is simulated in bench/numerics/test_simulation.py and bench.precision.


def check_fast(op, ref, inputs):
    """A block's sum is one more quantised intermediate, which the bound's operand term is for."""
    parity.check(partial(op, accumulate="fp16"), ref, inputs, operand_dtype=torch.float16)


def check_packed_fast(qkv, n_head, **options):
    options = {"n_head": n_head, **options}
    check_fast(partial(qkv_attention, **options), partial(reference.qkv_attention, **options), {"qkv": qkv})


def check_separate_fast(q, k, v, **options):
    check_fast(partial(attention, **options), partial(reference.attention, **options), {"q": q, "k": k, "v": v})


@pytest.mark.parametrize("options", ({}, {"causal": False}, {"window": 20}, {"scale": -0.3}), ids=str)
@pytest.mark.parametrize("T", (1, 65, 130))
def test_fp16_sums(device, T, options):
    if options.get("scale"):  # PyTorch's takes the square root of the scale
        q, k, v = inputs(device, T, dtype=torch.float16)
        check_fast(
            partial(attention, scale=-0.3),
            lambda q, k, v: reference.attention(-q, k, v, scale=0.3),
            {"q": q, "k": k, "v": v},
        )
    else:
        check_packed_fast(packed(device, T, D=32, B=1, dtype=torch.float16), 2, **options)


@pytest.mark.parametrize("D", (16, 64, 80, 256))
def test_fp16_sums_over_head_dimensions(device, D):
    check_packed_fast(packed(device, 70, n_head=1, D=D, B=1, dtype=torch.float16), 1)


def test_fp16_sums_of_grouped_queries_documents_and_caches(device):
    docs = torch.tensor([[0] * 40 + [1] * 30, [3] * 70], dtype=torch.int32, device=device)
    qkv = packed(device, 70, n_head=4, n_kv_head=2, dtype=torch.float16)
    check_packed_fast(qkv, 4, n_kv_head=2, doc_ids=docs, window=30)
    q, k, v = inputs(device, 20, 70, B=2, H=2, H_kv=1, dtype=torch.float16)
    check_separate_fast(q, k, v, kv_len=torch.tensor([70, 45], device=device))


def test_fp16_sums_with_dropout_drop_the_same_and_repeat_bit_for_bit(device):
    """Forward and backward, against the kernel with fp32 sums, which has the same seed and so the same mask."""
    qkv, p = packed(device, 70, B=1, dtype=torch.float16), 0.3
    results = []
    for accumulate in ("fp32", "fp16", "fp16"):
        torch.manual_seed(11)
        leaf = qkv.clone().requires_grad_()
        out = qkv_attention(leaf, 2, dropout_p=p, accumulate=accumulate)
        results.append((out.detach(), torch.autograd.grad(out.float().square().sum(), leaf)[0]))
    for exact, fast, again in zip(*results):
        assert torch.equal(fast, again) and not torch.equal(fast, exact)
        assert (fast - exact).float().norm() < 2e-3 * exact.float().norm()


def test_fp16_sums_change_every_result_and_no_statistic(device, monkeypatch):
    """Scores are summed in fp32 in either mode: lse is equal bit by bit in the same tiles, of which tables know either's."""

    def choose(kernel, dtype, bucket, device, default):
        return tuning.Choice(tuning.Key(kernel, "-", "-"), default, default, "default", device)

    monkeypatch.setattr(fused_attn, "_prepared", fused_attn._prepared.__wrapped__)  # without its memory
    monkeypatch.setattr(tuning, "choose", choose)
    qkv, seed = packed(device, 100, D=64, B=1, dtype=torch.float16), None
    calls = [
        fused_attn._qkv_attention_fwd(qkv, None, seed, 2, 2, True, 0.125, None, 0.0, fast) for fast in (False, True)
    ]
    (out, lse), (out_fast, lse_fast) = calls
    assert torch.equal(lse, lse_fast) and not torch.equal(out, out_fast)
    grads = [
        fused_attn._qkv_attention_bwd(out, qkv, out, lse, None, seed, 2, 2, True, 0.125, None, 0.0, fast)
        for fast in (False, True)
    ]
    for exact, fast in zip(*(grad.split(128, -1) for grad in grads)):
        assert not torch.equal(exact, fast)


def test_no_block_of_fp16_sums_is_longer_than_its_limit(monkeypatch):
    """64 products, whatever the shape: keys in forward and dQ, queries in dK and dV."""
    limit = fused_attn.CHUNK.value
    assert limit == 64
    for interpreted in (True, False):
        monkeypatch.setattr(runtime, "INTERPRET", interpreted)
        for kernel, walked in (("forward", "BLOCK_N"), ("backward_q", "BLOCK_N"), ("backward_kv", "BLOCK_M")):
            for D, T, dropout, plain in itertools.product((32, 64, 128, 256), (1, 4096), (False, True), (False, True)):
                options = {"dropout": dropout, "plain": plain and not dropout, "fp16_sums": True}
                assert fused_attn.config(kernel, torch.float16, D, T, **options)[walked] <= limit


def test_tuning_tables_of_the_usual_kernels_are_not_for_fp16_sums(device):
    asked = []
    with tuning.heard(lambda choice: asked.append(choice.key.kernel)):
        for accumulate in ("fp32", "fp16"):
            qkv = packed(device, 17, dtype=torch.float16).requires_grad_()
            qkv_attention(qkv, 2, accumulate=accumulate).sum().backward()
    names = ("forward", "backward_q", "backward_kv")
    assert asked == [f"attention.{name}" for name in names] + [f"attention_fast.{name}" for name in names]


def test_fp16_sums_under_autocast(device):
    qkv = packed(device, 40).requires_grad_()
    with torch.autocast(device.type, dtype=torch.float16):
        out = qkv_attention(qkv, 2, accumulate="fp16")
    assert torch.equal(out, qkv_attention(qkv.half(), 2, accumulate="fp16"))
    (grad,) = torch.autograd.grad(out.float().sum(), qkv)
    assert grad.dtype == torch.float32


@pytest.mark.parametrize("accumulate, message", [("fp16", "the operands are torch.float32"), ("bf16", "'bf16': use")])
def test_operands_that_cannot_be_summed_so_are_named(device, accumulate, message):
    qkv = packed(device, 4)
    with pytest.raises(ValueError, match=message):
        qkv_attention(qkv, 2, accumulate=accumulate)
    with pytest.raises(ValueError, match=message):
        attention(*fused_attn.unpack(qkv, 2, 2), accumulate=accumulate)


# ---- What must not change -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ("later tokens", "another document"))
def test_unseen_tokens_change_nothing(device, other):
    """Bit for bit, in outputs and in gradients of what is seen."""
    docs = torch.tensor([[0] * 50 + [1] * 60], device=device) if other == "another document" else None
    mine = slice(50, 110) if docs is not None else slice(0, 50)
    qkv = packed(device, 110, B=1)
    changed = torch.randn_like(qkv)
    changed[:, mine] = qkv[:, mine]
    results = []
    for x in (qkv, changed):
        x.requires_grad_()
        out = qkv_attention(x, 2, doc_ids=docs)[:, mine]
        results.append((out, torch.autograd.grad(out.square().sum(), x)[0][:, mine]))
    for before, after in zip(*results):
        assert torch.equal(before, after)


def test_runs_are_bit_equal(device):
    # bug 18
    qkv = packed(device, 100, n_head=4, n_kv_head=2, B=1, dtype=torch.float16)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        leaf = qkv.clone().requires_grad_()
        out = qkv_attention(leaf, 4, n_kv_head=2, dropout_p=0.2)
        results.append((out, torch.autograd.grad(out.float().square().sum(), leaf)[0]))
    for first, second in zip(*results):
        assert torch.equal(first, second)


def test_inputs_are_left_alone_and_outputs_are_new(device):
    # bug 13
    qkv = packed(device, 40).requires_grad_()
    grad_out = torch.randn(2, 40, 32, device=device)
    kept = qkv.detach().clone(), grad_out.clone()
    out = qkv_attention(qkv, 2)
    out_kept = out.detach().clone()
    (grad,) = torch.autograd.grad(out, qkv, grad_out)
    assert torch.equal(qkv, kept[0]) and torch.equal(grad_out, kept[1]) and torch.equal(out, out_kept)
    assert len({x.untyped_storage().data_ptr() for x in (qkv, grad_out, out, grad)}) == 4
    assert out.is_contiguous() and grad.is_contiguous()


def test_scratch_may_hold_nan(device):
    # bugs 7, 17: rows and whole documents without a key, ragged lengths, and NaN in everything torch.empty returns.
    docs = torch.tensor([[0] * 3 + [1] * 70 + [2]], device=device)
    kv_len = torch.tensor([20], device=device)
    q, k, v = (x.requires_grad_() for x in inputs(device, 70, 74))
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        assert torch.empty(3).isnan().all()
        out = attention(q, k, v, doc_ids=docs, kv_len=kv_len, window=9)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        qkv = packed(device, 70).requires_grad_()
        (grad_qkv,) = torch.autograd.grad(qkv_attention(qkv, 2).sum(), qkv)
    finally:
        torch.use_deterministic_algorithms(False)
    for x in (out, grad_qkv, *grads):
        assert torch.isfinite(x).all()
    assert out[:, :50].eq(0).all() and out[:, 50:].ne(0).all(), "queries before the first key see nothing"
    assert grads[0][:, :50].eq(0).all()
    assert grads[1][:, 20:].eq(0).all() and grads[2][:, 20:].eq(0).all(), "keys past kv_len get no gradient"


# ---- Strides --------------------------------------------------------------------------------------------------------


def test_any_strides(device):
    by_head = tuple(x.transpose(1, 2) for x in (torch.randn(3, 2, 2, 70, 16, device=device)).unbind())
    check(*by_head)
    every_other = tuple(x[..., ::2] for x in inputs(device, 70, D=32))
    check(*every_other)
    q, k, v = inputs(device, 70, B=2, H=2)
    check(q, k[:1].expand(2, -1, -1, -1), v[:, :, :1].expand(-1, -1, 2, -1))


def test_upstream_gradients_of_any_strides(device):
    # bug 5: from .sum() (all strides 0), transposed, and with strided columns
    q, k, v = inputs(device, 70, B=2, H=2)
    for grad in (
        torch.ones((), device=device).expand(2, 70, 2, 16),
        torch.randn(2, 2, 70, 16, device=device).transpose(1, 2),
        torch.randn(2, 70, 2, 32, device=device)[..., ::2],
        torch.randn(16, 2, 70, 2, device=device).permute(1, 2, 3, 0),
    ):
        check(q, k, v, upstream=(grad,))


@pytest.mark.xdist_group("large")
def test_offsets_past_two_to_the_31(device, needs_memory):
    # bug 1: rows 2^30 + 64 elements apart, so that the offset of row 2 needs more than 31 bits. Untouched pages of
    # such a tensor take no memory on a CPU.
    stride, D = 2**30 + 64, 16
    needs_memory(4 * stride)
    q, k, v, grad_out = (torch.randn(1, 3, 1, D, device=device).half() for _ in range(4))
    stretched = torch.empty(2 * stride + 7 * D, dtype=torch.float16, device=device)

    def view(i):
        return stretched.as_strided((1, 3, 1, D), (3 * stride, stride, D, 1), i * D)

    for i, x in enumerate((q, k, v, grad_out)):
        view(i).copy_(x)
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    expected = attention(*leaves)
    expected_grads = torch.autograd.grad(expected, leaves, grad_out)
    options = (None, None, None, True, D**-0.5, None, 0.0, False)
    lse = fused_attn.launch_forward(view(0), view(1), view(2), view(4), *options)
    assert torch.equal(view(4), expected)
    grads = view(5), view(6), torch.empty_like(v)
    fused_attn.launch_backward(view(3), view(0), view(1), view(2), view(4), lse, *grads, *options)
    for got, wanted in zip(grads, expected_grads):
        assert torch.equal(got, wanted)


# ---- Dropout --------------------------------------------------------------------------------------------------------


def dropped_probabilities(device, q, k, p, seed=11, **options):
    """What dropout leaves of P, (B, H, T_q, T_k): attention's output when v is the identity."""
    T_k, H_kv = k.shape[1:3]
    identity = torch.eye(T_k, device=device)[None, :, None].expand(k.shape[0], -1, H_kv, -1)
    pad = (0, T_k - q.shape[-1])  # q, k and v share D; columns of zeros change no score
    q, k = torch.nn.functional.pad(q, pad), torch.nn.functional.pad(k, pad)
    torch.manual_seed(seed)
    return attention(q, k, identity, dropout_p=p, scale=0.25, **options).transpose(1, 2)


@pytest.mark.parametrize("p", (0.1, 0.5))
def test_dropout_keeps_the_right_share_everywhere_differently(device, p):
    # bug 19
    q, k, _ = inputs(device, 128, B=2, H=2)
    kept = dropped_probabilities(device, q, k, p, causal=False) > 0
    n, rate = kept.numel(), kept.float().mean().item()
    assert abs(rate - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    for dim in (0, 1):  # a batch, a head, a query, a key is no copy of its neighbour: they agree as chance has it
        agree = (kept.select(dim, 0) == kept.select(dim, 1)).float().mean().item()
        assert abs(agree - (p * p + (1 - p) ** 2)) < 0.03
    for lag in (1, 2, 4, 64):
        for dim in (2, 3):
            length = kept.shape[dim] - lag
            same = kept.narrow(dim, 0, length) == kept.narrow(dim, lag, length)
            assert abs(same.float().mean().item() - (p * p + (1 - p) ** 2)) < 0.03, (lag, dim)
    assert (kept.float().mean((0, 1, 2)) - (1 - p)).abs().max() < 5 * math.sqrt(p * (1 - p) / 512)


@pytest.mark.parametrize("H_kv", (1, 2))
def test_dropout_gradients_use_the_forward_mask(device, H_kv):
    p = 0.3
    q, k, v = inputs(device, 70, B=2, H=2, H_kv=H_kv)
    kept = (dropped_probabilities(device, q, k, p, causal=False) > 0).double() / (1 - p)

    def explicit(q, k, v):
        mask = reference.attention_mask(70, 70, q.device, causal=True, window=None, doc_ids=None, kv_len=None)
        q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(2 // H_kv, 2), v.repeat_interleave(2 // H_kv, 2)))
        scores = (q @ k.mT * 0.25).masked_fill(~mask, -math.inf)
        return (torch.softmax(scores, -1) * kept.to(q.dtype) @ v).transpose(1, 2)

    def fused(q, k, v):
        torch.manual_seed(11)  # the mask depends on the seed, never on the values or on who sees whom
        return attention(q, k, v, dropout_p=p, scale=0.25)

    parity.check(fused, explicit, {"q": q, "k": k, "v": v})


def test_dropout_does_not_depend_on_the_blocks(device, monkeypatch):
    q, k, _ = inputs(device, 96)
    kept = dropped_probabilities(device, q, k, 0.5) > 0
    smaller = {"BLOCK_M": 16, "BLOCK_N": 32}
    monkeypatch.setattr(fused_attn, "_prepared", fused_attn._prepared.__wrapped__)  # without its memory
    monkeypatch.setattr(fused_attn, "config", lambda *_, **__: smaller)
    assert torch.equal(kept, dropped_probabilities(device, q, k, 0.5) > 0)


def test_dropout_differs_by_call_and_repeats_under_checkpointing(device):
    # bug 19
    qkv = packed(device, 40).requires_grad_()

    def op(x):
        return qkv_attention(x, 2, dropout_p=0.4)

    assert not torch.equal(op(qkv), op(qkv))
    results = []
    for run in (op, lambda x: checkpoint(op, x, use_reentrant=False)):
        torch.manual_seed(3)
        out = run(qkv)
        results.append((out, torch.autograd.grad(out.square().sum(), qkv)[0]))
    for plain, checkpointed in zip(*results):
        assert torch.equal(plain, checkpointed)


# ---- PyTorch around it ----------------------------------------------------------------------------------------------


def operator_calls(device):
    q, k, v = inputs(device, 20, 30, H=2, H_kv=1)
    qkv = packed(device, 20)
    docs = torch.zeros(1, 30, dtype=torch.int32, device=device)
    kv_len = torch.tensor([25], device=device)
    seed = torch.tensor([3], device=device)
    separate = docs, kv_len, seed, True, 0.25, 9, 0.1, False
    together = None, None, 2, 2, True, 0.25, None, 0.0, False
    out, lse = fused_attn._attention_fwd(q, k, v, *separate)
    packed_out, packed_lse = fused_attn._qkv_attention_fwd(qkv, *together)
    leaves, leaf = tuple(x.clone().requires_grad_() for x in (q, k, v)), qkv.clone().requires_grad_()
    return {
        "attention_fwd": (fused_attn._attention_fwd, (*leaves, *separate)),
        "attention_bwd": (fused_attn._attention_bwd, (torch.randn_like(out), q, k, v, out, lse, *separate)),
        "qkv_attention_fwd": (fused_attn._qkv_attention_fwd, (leaf, *together)),
        "qkv_attention_bwd": (
            fused_attn._qkv_attention_bwd,
            (torch.randn_like(packed_out), qkv, packed_out, packed_lse, *together),
        ),
    }


@pytest.mark.parametrize("name", ("attention_fwd", "attention_bwd", "qkv_attention_fwd", "qkv_attention_bwd"))
def test_opcheck(device, name):
    op, arguments = operator_calls(device)[name]
    torch.library.opcheck(op.registered, arguments)


def test_compiled_equals_eager(device):
    qkv = packed(device, 40).requires_grad_()

    def step(x):
        dropped = qkv_attention(x, 2, dropout_p=0.2)
        q, k, v = x.view(2, 40, 6, 16).split(2, dim=2)
        return qkv_attention(x * 1.5, 2) + attention(q, k, v, causal=False).flatten(2), dropped

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (eager, _), (got, dropped) = step(qkv), compiled(qkv)
    assert torch.equal(got, eager)
    assert not torch.equal(dropped, compiled(qkv)[1]), "each call of the compiled function draws its own mask"
    grads = (torch.autograd.grad(out.square().sum(), qkv)[0] for out in (eager, got))
    assert torch.equal(*grads)


def test_autocast(device):
    qkv = packed(device, 40).requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = qkv_attention(qkv, 2)
        separate = attention(*fused_attn.unpack(qkv, 2, 2))
    assert out.dtype == separate.dtype == torch.bfloat16
    assert torch.equal(out, qkv_attention(qkv.bfloat16(), 2)) and torch.equal(out, separate.flatten(2))
    (grad,) = torch.autograd.grad(out.float().sum(), qkv)
    assert grad.dtype == torch.float32


def test_gradient_of_one_input_only(device):
    q, k, v = inputs(device, 20)
    k.requires_grad_()
    attention(q, k, v).sum().backward()
    assert k.grad is not None and q.grad is None


@pytest.mark.parametrize("shape", ((0, 5, 96), (2, 0, 96)))
def test_empty_packed(device, shape):
    qkv = torch.randn(shape, device=device, requires_grad=True)
    out = qkv_attention(qkv, 2)
    out.sum().backward()
    assert out.shape == (*shape[:2], 32) and qkv.grad.shape == shape


def test_no_keys_at_all(device):
    q = torch.randn(1, 3, 2, 16, device=device, requires_grad=True)
    k = torch.randn(1, 0, 2, 16, device=device)
    out = attention(q, k, k)
    out.sum().backward()
    assert out.eq(0).all() and q.grad.eq(0).all()


def test_cpu_without_the_interpreter_takes_the_reference(monkeypatch):
    monkeypatch.setattr(runtime, "INTERPRET", False)
    qkv = torch.randn(1, 9, 96, dtype=torch.float64, requires_grad=True)
    assert torch.equal(qkv_attention(qkv, 2), reference.qkv_attention(qkv, 2))
    q, k, v = fused_attn.unpack(qkv, 2, 2)
    assert torch.equal(attention(q, k, v, window=3), reference.attention(q, k, v, window=3))


# ---- Bad input ------------------------------------------------------------------------------------------------------

BAD_SEPARATE = {
    "D differs": (((1, 4, 2, 16), (1, 4, 2, 8)), {}, "use q"),
    "rank": (((4, 2, 16), (4, 2, 16)), {}, "use q"),
    "heads": (((1, 4, 3, 16), (1, 4, 2, 16)), {}, "q has 3 heads and k has 2"),
    "head dimension": (((1, 4, 1, 512), (1, 4, 1, 512)), {}, "the head dimension is 512"),
    "window": (((1, 4, 1, 16), (1, 4, 1, 16)), {"window": 0}, "window is 0"),
    "dropout": (((1, 4, 1, 16), (1, 4, 1, 16)), {"dropout_p": 1.5}, r"dropout_p is 1.5: it must lie in \[0, 1\]"),
    "doc_ids": (((1, 4, 1, 16), (1, 4, 1, 16)), {"doc_ids": torch.zeros(1, 5)}, "doc_ids is"),
    "kv_len": (((2, 4, 1, 16), (2, 4, 1, 16)), {"kv_len": torch.zeros(1, dtype=torch.int32)}, "kv_len is"),
}


@pytest.mark.parametrize("case", BAD_SEPARATE)
def test_bad_arguments_are_named(device, case):
    (q_shape, k_shape), options, message = BAD_SEPARATE[case]
    q, k = torch.zeros(q_shape, device=device), torch.zeros(k_shape, device=device)
    with pytest.raises(ValueError, match=message):
        attention(q, k, k, **options)


def test_bad_dtypes_are_named(device):
    q = torch.zeros(1, 4, 1, 16, device=device)
    with pytest.raises(ValueError, match="use one dtype"):
        attention(q, q.half(), q)
    with pytest.raises(ValueError, match=r"torch.float64: use float32"):
        attention(q.double(), q.double(), q.double())


def test_bad_packing_is_named(device):
    with pytest.raises(ValueError, match="n_head=5"):
        qkv_attention(torch.zeros(1, 4, 96, device=device), 5)
    with pytest.raises(ValueError, match="n_kv_head=2"):
        qkv_attention(torch.zeros(1, 4, 7 * 16, device=device), 3, n_kv_head=2)
