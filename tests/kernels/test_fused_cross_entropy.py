"""Linear + cross-entropy against the plain PyTorch reference. Shapes are small and odd; ``chunk_rows`` is replaced by 8
rows a chunk, so that 21 tokens take three chunks, the last of them ragged."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import parity
from bench.numerics import simulation
from fastgpt.kernels import fused_cross_entropy, matmul, reference, runtime
from fastgpt.kernels.fused_cross_entropy import linear_cross_entropy

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
REDUCTIONS = ["none", "mean", "sum"]
ALL_OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-2, "logit_softcap": 5.0}
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "softcap": {"logit_softcap": 5.0},
    "all": ALL_OPTIONS,
}


chunk_rows = fused_cross_entropy.chunk_rows


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    set_chunk(monkeypatch, 8)


def set_chunk(monkeypatch, rows: int) -> None:
    monkeypatch.setattr(fused_cross_entropy, "chunk_rows", lambda *_: rows)


def make(device, dtype=torch.float32, shape=(3, 7), C=32, V=203, bias=True, ignored=0.25, target_dtype=torch.int64):
    """x, weight and bias by name, and targets of which some are ignored. Logits have a standard deviation of 2."""
    inputs = {"x": torch.randn(*shape, C, device=device).to(dtype)}
    inputs["weight"] = (2 * torch.randn(V, C, device=device) / C**0.5).to(dtype)
    if bias:
        inputs["bias"] = torch.randn(V, device=device).to(dtype)
    target = torch.randint(0, V, shape, device=device)
    target = torch.where(torch.rand(shape, device=device) < ignored, -100, target)
    return inputs, target.to(target_dtype)


def check(inputs, target, **kwargs):
    options = {key: kwargs.pop(key) for key in ("upstream",) if key in kwargs}
    op = partial(linear_cross_entropy, target=target, **kwargs)
    parity.check(op, partial(reference.linear_cross_entropy, target=target, **kwargs), inputs, **options)


def leaves(inputs) -> dict[str, Tensor]:
    return {key: value.detach().clone().requires_grad_() for key, value in inputs.items()}


def gradients(op, inputs, **kwargs) -> list[Tensor]:
    """[loss, gradients ...] with an upstream gradient that differs from row to row."""
    inputs = leaves(inputs)
    loss = op(**inputs, **kwargs)
    upstream = torch.linspace(0.5, 2, loss.numel(), device=loss.device).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, list(inputs.values()), upstream)]


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(device, dtype, options, reduction):
    inputs, target = make(device, dtype)
    target = target.clamp(max=200)  # a class past vocab_size would end the CUDA context in PyTorch's loss
    check(inputs, target, reduction=reduction, vocab_size=201, **options)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "ignore_index": 7}], ids=["plain", "smoothing"])
@pytest.mark.parametrize("cap", [15.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap_of_an_untied_head(device, dtype, cap, options):
    """Logits on both sides of the cap, of a weight of the head's own, an fp32 master."""
    inputs, target = make(device, dtype, bias=False)
    inputs["weight"] = 10 * inputs["weight"].float()
    assert ((inputs["x"].float() @ inputs["weight"].t()).abs() > cap).float().mean() > 0.05
    target = target.where(target != -100, options.get("ignore_index", -100))
    check(inputs, target, logit_softcap=cap, **options)


@pytest.mark.adversarial
def test_softcap_keeps_the_digits_of_small_logits(device):
    # 1 - exp(-2 z / cap) has few of them near 0, and fewer on a GPU. With two classes the loss depends on each logit by half.
    inputs = {"x": torch.randn(64, 16, device=device) / 8, "weight": torch.eye(2, 16, device=device)}
    check(inputs, torch.zeros(64, dtype=torch.long, device=device), logit_softcap=15.0, reduction="none")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 2, 64, 4096, 4097, 9001])
def test_parity_at_block_edges_of_the_vocabulary(device, V, dtype):
    inputs, target = make(device, dtype, shape=(3,), V=V, ignored=0)
    check(inputs, target, label_smoothing=0.1)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("rows, block", [(1, 64), (4, 64), (4, 256)])
def test_parity_with_other_rows_per_program(device, rows, block, reduction, monkeypatch):
    # bug 4: a reduction broadcast along the wrong axis with several, unequal rows per program
    monkeypatch.setattr(fused_cross_entropy, "config", lambda *_: {"ROWS": rows, "BLOCK": block, "num_warps": 2})
    inputs, target = make(device, shape=(11,))
    check({**inputs, "x": inputs["x"] * torch.arange(11, device=device)[:, None] / 4}, target, reduction=reduction)


@pytest.mark.parametrize("shape", [(), (1,), (9,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_any_rank(device, shape, reduction):
    inputs, target = make(device, shape=shape, ignored=0)
    check(inputs, target, reduction=reduction)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(device, dtype, reduction):
    inputs, target = make(device, dtype, shape=(6, 4))
    wide = torch.randn(203, 2 * 32, device=device).to(dtype)
    inputs["x"] = inputs["x"].permute(1, 0, 2)
    inputs["bias"] = wide[:, 0]
    for weight in (wide[:, ::2], inputs["weight"].t().contiguous().t(), wide[:, 5:37]):
        check({**inputs, "weight": weight}, target.t(), reduction=reduction)
    check({**inputs, "x": inputs["x"][:1, :1].expand(4, 6, 32)}, target.t(), reduction=reduction)
    spread = torch.stack([target, target.flip(0)], -1)
    check(inputs, spread[..., 0].t(), reduction=reduction)
    check({**inputs, "x": inputs["x"][0]}, spread[:, 0, 0], reduction=reduction)
    check({**inputs, "x": inputs["x"][0]}, target[:1, 0].expand(6), reduction=reduction)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_16_bit_x_with_fp32_weight_returns_fp32_weight_gradients(device, reduction):
    inputs, target = make(device)
    inputs["x"] = inputs["x"].bfloat16()
    check(inputs, target, reduction=reduction)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_autocast_runs_the_gemms_in_its_dtype(device, reduction):
    inputs, target = make(device)

    def autocast(op, x, **kwargs):
        with torch.autocast(device.type, torch.bfloat16, enabled=x.dtype == torch.float32):
            return op(x, target=target, reduction=reduction, **kwargs)

    parity.check(partial(autocast, linear_cross_entropy), partial(autocast, reference.linear_cross_entropy), inputs)
    rounded = {key: value.bfloat16() for key, value in inputs.items()}
    assert torch.equal(
        autocast(linear_cross_entropy, **inputs), linear_cross_entropy(**rounded, target=target, reduction=reduction)
    )


def test_tied_weight(device):
    table, tokens = torch.randn(203, 32, device=device) / 4, torch.randint(0, 203, (21,), device=device)

    def tied(op, table):
        return op(torch.tanh(table[tokens]), table, tokens.roll(-1))

    parity.check(partial(tied, linear_cross_entropy), partial(tied, reference.linear_cross_entropy), {"table": table})


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_padding_of_the_vocabulary_takes_no_part_and_gets_zero_gradient(device, reduction):
    inputs, target = make(device, V=257, ignored=0)
    target = target.clamp(max=249)
    inputs["weight"][250:], inputs["bias"][250:] = float("nan"), float("inf")
    loss, dx, dw, db = gradients(
        partial(linear_cross_entropy, target=target, vocab_size=250, reduction=reduction, **ALL_OPTIONS), inputs
    )
    cut = {**inputs, "weight": inputs["weight"][:250], "bias": inputs["bias"][:250]}
    expected = gradients(partial(linear_cross_entropy, target=target, reduction=reduction, **ALL_OPTIONS), cut)
    for got, want in zip((loss, dx, dw[:250], db[:250]), expected):
        assert torch.equal(got, want)
    assert not dw[250:].any() and not db[250:].any()


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("target_dtype", [torch.int32, torch.int64], ids=str)
def test_unaligned_targets(device, target_dtype, reduction):
    # bug 6: labels = buf[1:]
    inputs, target = make(device, shape=(22,), target_dtype=target_dtype)
    inputs["x"] = inputs["x"][1:]
    check(inputs, target[1:], reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignore_index", [-100, -1, 5])
def test_ignored_rows_are_not_looked_at(device, ignore_index, reduction):
    inputs, target = make(device, shape=(21,), ignored=0)
    target = torch.where(torch.arange(21, device=device) % 4 == 0, ignore_index, torch.where(target == 5, 6, target))
    op = partial(linear_cross_entropy, target=target, ignore_index=ignore_index, reduction=reduction)
    loss, dx, *_ = gradients(op, inputs)
    assert not dx[::4].any()
    inputs["x"][::4] = float("nan")
    poisoned = gradients(op, inputs)
    assert torch.equal(poisoned[0], loss) and torch.equal(poisoned[1], dx)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_ignored_gives_zero_loss_and_zero_gradients(device, reduction):
    inputs, target = make(device, ignored=1)
    for result in gradients(linear_cross_entropy, inputs, target=target, reduction=reduction, **ALL_OPTIONS):
        assert not result.any()


@pytest.mark.parametrize("value", [-1, 203, 2**31, -(2**40)])
def test_a_target_out_of_range_raises_on_a_cpu_and_is_nan_on_a_gpu(device, monkeypatch, value):
    inputs, target = make(device, shape=(21,), ignored=0)
    target[10] = value
    if device.type == "cpu":
        with pytest.raises(ValueError, match=rf"target holds {value}: classes are 0 to 202, and -100 where ignored"):
            linear_cross_entropy(**inputs, target=target)
        monkeypatch.setattr(fused_cross_entropy, "_check_targets", lambda *_: None)  # as on a GPU
    loss, dx, _, _ = gradients(linear_cross_entropy, inputs, target=target, reduction="none")
    others = torch.arange(21, device=device) != 10
    assert loss[10].isnan() and dx[10].isnan().all()
    assert torch.isfinite(loss[others]).all() and torch.isfinite(dx[others]).all()
    assert all(result.isnan().any() for result in gradients(linear_cross_entropy, inputs, target=target))


# ---------------------------------------------------------------- numerics


@pytest.mark.adversarial
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_minus_infinity(device, dtype, reduction):
    # bug 7: a block of the vocabulary whose logits are all -inf, first and last
    inputs, target = make(device, dtype, shape=(3,), V=3 * 4096, ignored=0)
    inputs["bias"][:4096] = inputs["bias"][-4096:] = float("-inf")
    target = 4096 + target % 4096
    shift = inputs.pop("bias")
    check(inputs, target, bias=shift, reduction=reduction)


@pytest.mark.adversarial
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("p", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_a_certain_target_keeps_its_digits(device, dtype, p, reduction):
    # bug 8: p - 1 of the true class rounded before the subtraction. With weight = I, dx is the gradient of the logits.
    logits = torch.randn(64, 16, device=device) / 16
    logits[:, 3] += math.log(15 * p / (1 - p))
    target, identity = torch.full((64,), 3, device=device), torch.eye(16, device=device)

    def of_target(op, to):
        x = (logits + 10).to(dtype).to(to).requires_grad_()
        loss = op(x, identity.to(to), target, reduction=reduction)
        return loss, torch.autograd.grad(loss.sum(), x)[0][:, 3]

    got = of_target(linear_cross_entropy, dtype)
    theirs = of_target(reference.linear_cross_entropy, dtype)
    exact = of_target(reference.linear_cross_entropy, torch.float64)
    for name, *values in zip(("loss", "gradient"), got, exact, theirs):
        if name == "gradient" or reduction == "none":  # the errors of 64 certain rows cancel in their sum, by chance
            parity.assert_parity(name, *values)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_fp16_keeps_the_gradients_of_a_large_batch_and_vocabulary(device, z_loss, reduction):
    # p is 2e-5 and the loss is divided by 8192: 2.4e-9 is 0 in fp16, of which 6e-8 is the smallest number.
    inputs, target = make(device, torch.float16, shape=(2,), V=50304, bias=False, ignored=0)
    inputs["weight"] = 0.01 * inputs["weight"].float()
    options = {"target": target, "z_loss": z_loss, "reduction": reduction}
    upstream = (torch.tensor(1 / 8192, device=device),) if reduction != "none" else (torch.full((2,), 1 / 8192),)
    got, _ = parity.run(partial(linear_cross_entropy, **options), inputs, upstream)
    # The reference gets the weight as the GEMM does, rounded. PyTorch's own fp16 gradient is 0 here: no yardstick.
    exact = {"x": inputs["x"].double(), "weight": inputs["weight"].half().double()}
    ref64, _ = parity.run(partial(reference.linear_cross_entropy, **options), exact, upstream)
    assert (got["dweight"] != 0).all()
    perfect = ref64["dweight"].float()
    parity.assert_parity("dweight", got["dweight"], ref64["dweight"], perfect, operand_dtype=torch.float16)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_fp16_with_a_loss_scale_of_65536(device, reduction):
    inputs, target = make(device, torch.float16, bias=False, ignored=0)
    inputs["weight"] = inputs["weight"].float() / 256  # dW is fp32 and dx stays within fp16
    scale = torch.full((3, 7) if reduction == "none" else (), 65536.0)
    check(inputs, target, reduction=reduction, upstream=(scale,))


def test_grad_scale_cannot_overflow_fp16():
    assert fused_cross_entropy.grad_scale(torch.bfloat16, 50304, 1e-4, None) == 1
    assert fused_cross_entropy.grad_scale(torch.float16, 50304, 0.0, None) == 2**15
    for z_loss in (1e-4, 1e-2, 1.0):
        for cap in (None, 30.0):
            scale = fused_cross_entropy.grad_scale(torch.float16, 50304, z_loss, cap)
            worst = scale * (1 + 2 * z_loss * ((cap or 65504) + math.log(50304)))
            assert 65504 / 2 < worst <= 65504


# ---------------------------------------------------------------- sums in fp16


def fast(x, weight, bias=None, **options):
    return linear_cross_entropy(x, weight, bias=bias, accumulate="fp16", **options)


def check_fast(inputs, target, **kwargs):
    """What the kernel sums in fp16 is an operand's rounding more than PyTorch's fp16 has."""
    reference_ = partial(reference.linear_cross_entropy, target=target, **kwargs)
    parity.check(partial(fast, target=target, **kwargs), reference_, inputs, operand_dtype=torch.float16)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["plain", "all"])
def test_fp16_sums(device, options, reduction):
    inputs, target = make(device, torch.float16)
    check_fast(inputs, target.clamp(max=200), reduction=reduction, vocab_size=201, **options)


@pytest.mark.parametrize("V, vocab_size", [(1, 1), (64, 64), (130, 67), (203, 203), (256, 201)])
def test_fp16_sums_where_logits_are_padded(device, V, vocab_size):
    """Past the vocabulary there are rows of weight, none, or some but fewer than the padding has."""
    inputs, target = make(device, torch.float16, V=V, bias=V != 64)
    inputs["weight"] = inputs["weight"].float()
    target = target.clamp(max=vocab_size - 1)
    check_fast(inputs, target, vocab_size=vocab_size)
    got = gradients(partial(fast, target=target, vocab_size=vocab_size), inputs)[2]
    assert got.dtype == torch.float32 and got[vocab_size:].eq(0).all() and got.any() == (vocab_size > 1)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_fp16_sums_under_autocast(device, reduction):
    inputs, target = make(device)
    options = {"target": target, "reduction": reduction}
    with torch.autocast(device.type, torch.float16):
        got = gradients(fast, inputs, **options)
    rounded = gradients(fast, {key: value.half() for key, value in inputs.items()}, **options)
    for mine, wanted in zip(got, rounded):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, wanted.float(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_fp16_sums_call_no_library_and_repeat_bit_for_bit(device, reduction, gemms):
    inputs, target = make(device, torch.float16)
    first, second = (gradients(fast, inputs, target=target, reduction=reduction) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second)) and not gemms


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_fp16_sums_of_64_tokens_of_one_target_do_not_overflow(device, reduction, monkeypatch):
    # With the scale for fp32 sums, 2^15, one such product is inf already.
    set_chunk(monkeypatch, 64)
    x = torch.full((64, 16), 15.0, dtype=torch.float16, device=device, requires_grad=True)
    weight = torch.zeros(8, 16, device=device, requires_grad=True)
    loss = fast(x, weight, target=torch.zeros(64, dtype=torch.int64, device=device), reduction=reduction).sum()
    (dw,) = torch.autograd.grad(loss, weight)
    share = -7 / 8 * 15 * (64 if reduction != "mean" else 1)
    torch.testing.assert_close(dw[0], torch.full_like(dw[0], share), rtol=2e-3, atol=0)


def test_the_scale_for_fp16_sums_keeps_the_gradients_of_rare_tokens():
    """Rows of dW that are no target's, whose dz are the smallest, for GPT-2's vocabulary by Zipf's law, as tensor cores sum:
    half of bf16's error at most, in the median and in the worst row."""
    N, V, C = 256, 50304, 16
    p = torch.softmax(2 * torch.randn(N, V) - 1.07 * torch.arange(1, V + 1).log(), -1)
    x, rare = torch.randn(N, C) + 0.3, p[:, 200::500].t()
    exact = rare.double() @ x.double()

    def errors(mode, scale):
        found = simulation.matmul(rare * scale, x, mode) / scale
        return (found.double() - exact).norm(dim=1) / exact.norm(dim=1)

    scale = fused_cross_entropy.grad_scale(torch.float16, V, 0.0, None, fp16_sums=True)
    assert scale == 2**6
    fast, bf16 = errors(simulation.FP16_FAST, scale), errors(simulation.BF16, 1.0)
    assert fast.median() < 0.5 * bf16.median() and fast.max() < 0.5 * bf16.max()


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_no_gradient_is_filtered(device, reduction):
    # bug 12: exact by default, however small a probability is
    inputs, target = make(device, shape=(5,), C=4, V=300, bias=False, ignored=0)
    inputs["x"], inputs["weight"] = torch.ones_like(inputs["x"]), 5 * torch.randn_like(inputs["weight"])
    *_, dw = gradients(linear_cross_entropy, inputs, target=target, reduction=reduction)
    assert dw.abs().min() < 1e-9 and (dw != 0).all()


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_error_is_flat_in_the_number_of_chunks(device, dtype, reduction, monkeypatch):
    # bug 11: dW and db summed over chunks in 16 bits
    inputs, target = make(device, dtype, shape=(64,), ignored=0)
    inputs["weight"], inputs["bias"] = inputs["weight"].float(), inputs["bias"].float()
    options = {"target": target, "reduction": reduction}
    upstream = (torch.ones(64 if reduction == "none" else ()),)
    wide = {key: value.to(dtype).double() for key, value in inputs.items()}
    ref64, _ = parity.run(partial(reference.linear_cross_entropy, **options), wide, upstream)
    error = {}
    for rows in (64, 1):
        set_chunk(monkeypatch, rows)
        got, _ = parity.run(partial(linear_cross_entropy, **options), inputs, upstream)
        error[rows] = [parity.errors(got[name], ref64[name])[0] for name in ("dweight", "dbias")]
    for one_chunk, many in zip(error[64], error[1]):
        assert many <= 1.05 * one_chunk


# ---------------------------------------------------------------- upstream gradients, saved tensors


@pytest.mark.parametrize("layout", ["expanded", "transposed", "strided"])
def test_strided_upstream_gradient(device, layout):
    # bug 5: dO from .sum() has stride 0; another one may be transposed
    inputs, target = make(device, shape=(6, 4))
    upstream = {
        "expanded": torch.ones((), device=device).expand(6, 4),
        "transposed": torch.randn(4, 6, device=device).t(),
        "strided": torch.randn(6, 8, device=device)[:, ::2],
    }[layout]
    check(inputs, target, reduction="none", upstream=(upstream,))


def test_each_row_is_scaled_by_its_own_upstream_gradient(device):
    # bug 10: reduction="none" scaled by dO[0]
    inputs, target = make(device, shape=(21,), ignored=0)
    inputs = leaves(inputs)
    loss = linear_cross_entropy(**inputs, target=target, reduction="none")
    (dx,) = torch.autograd.grad(loss[13], inputs["x"])
    assert dx[13].any() and not dx[torch.arange(21, device=device) != 13].any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_changes_no_input_and_can_be_repeated(device, reduction):
    # bug 13: backward overwrites dY or what it saved
    inputs, target = make(device)
    leaf = leaves(inputs)
    loss = linear_cross_entropy(**leaf, target=target, reduction=reduction)
    upstream = torch.randn_like(loss)
    kept = upstream.clone()
    first = torch.autograd.grad(loss, list(leaf.values()), upstream, retain_graph=True)
    copies = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss, list(leaf.values()), upstream)
    assert torch.equal(upstream, kept)
    for one, copy, two in zip(first, copies, second):
        assert torch.equal(one, copy) and torch.equal(one, two)
    tensors = [*first, *second, upstream, loss, *leaf.values()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)
    for name, value in inputs.items():
        assert torch.equal(leaf[name], value)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_repeat_runs_are_bit_equal(device, reduction):
    # bug 18: nondeterminism
    inputs, target = make(device, torch.bfloat16)
    runs = [gradients(linear_cross_entropy, inputs, target=target, reduction=reduction) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_activation_checkpointing(device):
    inputs, target = make(device)
    plain = gradients(partial(linear_cross_entropy, target=target), inputs)

    def checkpointed(**kwargs):
        op = partial(linear_cross_entropy, target=target)
        return torch.utils.checkpoint.checkpoint(op, use_reentrant=False, **kwargs)

    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(checkpointed, inputs)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_second_derivative_is_refused(device, reduction):
    inputs, target = make(device)
    leaf = leaves(inputs)
    loss = linear_cross_entropy(**leaf, target=target, reduction=reduction).sum()
    with pytest.raises(RuntimeError):  # for "none" in torch's words, once the first derivative is differentiated
        (dx,) = torch.autograd.grad(loss, leaf["x"], create_graph=True)
        dx.square().sum().backward()


# ---------------------------------------------------------------- what is computed and held


@pytest.fixture
def gemms(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the gradient GEMMs' results, in order."""
    shapes: list[tuple[int, ...]] = []
    original = matmul.matmul_fp32

    def spy(out, a, b, *, accumulate):
        shapes.append(tuple(out.shape))
        original(out, a, b, accumulate=accumulate)

    monkeypatch.setattr(fused_cross_entropy, "matmul_fp32", spy)
    return shapes


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_gradient_is_formed_where_none_is_wanted(device, reduction, gemms):
    inputs, target = make(device)
    with torch.no_grad():
        quiet = linear_cross_entropy(**leaves(inputs), target=target, reduction=reduction)
    assert quiet.grad_fn is None
    assert linear_cross_entropy(**inputs, target=target, reduction=reduction).grad_fn is None
    assert gemms == []
    loss = linear_cross_entropy(**leaves(inputs), target=target, reduction=reduction)
    assert torch.equal(loss, quiet)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_only_wanted_gradients_are_computed(device, wanted, reduction, gemms):
    inputs, target = make(device, shape=(8,))
    everything = dict(zip(inputs, gradients(linear_cross_entropy, inputs, target=target, reduction=reduction)[1:]))
    gemms.clear()
    inputs[wanted].requires_grad_()
    rest = {key: value for key, value in inputs.items() if key != wanted}
    (got,) = gradients(
        partial(linear_cross_entropy, target=target, reduction=reduction, **rest), {wanted: inputs[wanted]}
    )[1:]
    assert torch.equal(got, everything[wanted])
    assert gemms == {"x": [(8, 32)], "weight": [(203, 32)], "bias": []}[wanted]


class Allocations(TorchDispatchMode):
    """Largest storage that any operation returned, in bytes."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


def test_no_tensor_is_larger_than_a_chunk_of_logits(device):
    inputs, target = make(device, shape=(40,), C=4, V=2000, bias=False)
    _, stats = fused_cross_entropy._new_statistics(inputs["x"])
    losses = torch.empty_like(stats[:, 0])
    with Allocations() as seen:
        options = -100, 0.0, 0.0, None, 2000, False
        arguments = inputs["x"], inputs["weight"], target, None, options, stats
        fused_cross_entropy._run_chunks(*arguments, losses=losses, wants=(True, True, True))
    assert seen.largest == 8 * 2048 * 4  # 8 rows, padded from 2000 to 2048, fp32; all the logits are 5 times that


@pytest.mark.parametrize(
    "V, C, dtype", [(50304, 768, torch.bfloat16), (50257, 1600, torch.float32), (256, 64, torch.float16)]
)
@pytest.mark.parametrize("sms", [4, 46, 132])
@pytest.mark.parametrize("rows", [0, 1, 1000, 8192, 65536])
def test_chunks_stay_within_the_budget_and_fill_the_sms(V, C, dtype, sms, rows):
    chunk = chunk_rows(rows, V, C, dtype, sms)
    assert chunk >= 128 and chunk % 128 == 0 and chunk < rows + 128 + (rows == 0)
    assert chunk * fused_cross_entropy.padded(V) * dtype.itemsize <= fused_cross_entropy.LOGITS_BUDGET
    if rows >= 8192 and C >= 768:
        tiles = chunk // 128 * math.ceil(C / 128)
        assert tiles >= 0.65 * sms * math.ceil(tiles / sms)


@pytest.mark.xdist_group("large")
def test_peak_memory_is_at_most_a_quarter_of_eagers(device, needs_memory, monkeypatch):
    monkeypatch.setattr(
        fused_cross_entropy, "chunk_rows", chunk_rows
    )  # no small chunks: a GPU measures what training would
    N, C, V = 8192, 768, 50304
    chunk = chunk_rows(N, V, C, torch.bfloat16, 46)
    forward = chunk * V * 2 + V * C * (2 + 4) + N * C * 4  # logits, weight in bf16, dW, dx
    backward = 2 * V * C * 4 + N * C * (4 + 2)
    eager = 3 * N * V * 4
    assert max(forward, backward) <= eager / 4
    if device.type == "cuda":
        needs_memory(2 * eager)
        peaks = []
        for op in (linear_cross_entropy, reference.linear_cross_entropy):
            inputs, target = make(device, torch.bfloat16, shape=(N,), C=C, V=V, bias=False)
            inputs["weight"] = inputs["weight"].float()
            inputs = leaves(inputs)
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            op(**inputs, target=target).backward()
            peaks.append(torch.cuda.max_memory_allocated() - before)
        assert peaks[0] <= peaks[1] / 4


def test_the_kernel_writes_nothing_outside_its_rows(device):
    # bug 2: unmasked stores; canaries around each buffer, an odd vocabulary
    stride, V, rows = 256, 203, 3
    logits = torch.full((rows + 2, stride), 77.0, device=device)
    logits[1:-1] = 0
    logits[1:-1, :V] = torch.randn(rows, V, device=device)
    loss, stats = torch.full((rows + 2,), 77.0, device=device), torch.full((rows + 2, 2), 77.0, device=device)
    target = torch.tensor([5, -100, 202], device=device)
    fused_cross_entropy.rows_kernel[(2,)](
        *(logits[1:-1], target, loss[1:-1], stats[1:-1], None),
        *(rows, V, stride, -100, 1.0, 0.1, 0.0, 0.0),
        **{"LOSS": True, "GRAD": True, "PER_ROW": False, "SMOOTH": True, "CAP": False},
        **{"ROWS": 2, "BLOCK": 64, "num_warps": 1},
    )
    for buffer in (logits, loss, stats):
        assert (buffer[[0, -1]] == 77).all() and (buffer[1:-1] != 77).all()
    assert not logits[1:-1, V:].any() and not logits[2].any()


# ---------------------------------------------------------------- torch.library, torch.compile


def op_inputs(device, dtype=torch.float32):
    inputs, target = make(device, dtype, shape=(5,), C=16, V=67)
    inputs = leaves(inputs)
    target = target.clamp(max=65)  # within the vocabulary below: past it a loss on a GPU is NaN
    return (inputs["x"], inputs["weight"], target, inputs["bias"]), (-100, 0.1, 1e-2, 5.0, 66, dtype == torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(device, dtype):
    inputs, options = op_inputs(device, dtype)
    torch.library.opcheck(fused_cross_entropy._forward.registered, (*inputs, *options))
    torch.library.opcheck(fused_cross_entropy._forward_backward.registered, ([True, True, True], *inputs, *options))
    torch.library.opcheck(fused_cross_entropy._forward_backward.registered, ([True, False, False], *inputs, *options))
    detached = [tensor.detach() for tensor in inputs]
    losses, stats = fused_cross_entropy._forward(*detached, *options)
    for wants in ([True, True, True], [False, True, False]):
        torch.library.opcheck(fused_cross_entropy._backward.registered, (losses, stats, wants, *detached, *options))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiled_equals_eager(device, reduction):
    # bug 9: the compiled loss was wrong with ignored rows; a quarter of these are ignored
    inputs, target = make(device, shape=(4, 5))
    op = partial(linear_cross_entropy, target=target, reduction=reduction, **ALL_OPTIONS)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(gradients(op, inputs), gradients(compiled, inputs)))
    with torch.no_grad():
        assert torch.equal(compiled(**inputs), op(**inputs))


def test_a_gradient_wanted_inside_a_compiled_graph(device, gemms):
    inputs, target = make(device)

    def step(x, weight, bias):
        return linear_cross_entropy(x * 2, weight, target, bias=bias)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(gradients(step, inputs), gradients(compiled, inputs)))
    gemms.clear()
    with torch.no_grad():
        compiled(**leaves(inputs))
    assert gemms == []


def test_batch_sizes_share_one_compiled_graph(device):
    # bug 27: recompiles per batch size
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=counter)
    for rows in (3, 5, 9, 12):
        inputs, target = make(device, shape=(rows,))
        got, want = (gradients(op, inputs, target=target) for op in (compiled, linear_cross_entropy))
        assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert counter.frame_count <= 2  # the second one takes any size


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_tokens(device, reduction):
    inputs, target = make(device, shape=(0, 4))
    loss, dx, *others = gradients(linear_cross_entropy, inputs, target=target, reduction=reduction)
    assert loss.shape == ((0, 4) if reduction == "none" else ()) and not loss.any()
    assert dx.shape == (0, 4, 32) and not any(gradient.any() for gradient in others)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cpu_tensors_outside_the_interpreter_get_the_reference(reduction, monkeypatch):
    monkeypatch.setattr(runtime, "INTERPRET", False)
    inputs, target = make("cpu", torch.float64)
    options = {"target": target, "reduction": reduction, "vocab_size": 202, **ALL_OPTIONS}
    got, want = (gradients(op, inputs, **options) for op in (linear_cross_entropy, reference.linear_cross_entropy))
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(gradients(compiled, inputs, **options), want))
    with pytest.raises(ValueError, match="target holds 203"):
        linear_cross_entropy(**inputs, target=torch.full_like(target, 203))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(5, 31)}, r"x is \(5, 31\) and weight \(67, 16\)"),
        ({"weight": torch.zeros(16)}, r"weight \(16,\): they have to be \(..., C\) and \(vocabulary, C\)"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, r"target is \(4,\): x of \(5, 16\) needs \(5,\)"),
        ({"target": torch.zeros(5)}, "target is torch.float32: use int64 or int32"),
        ({"bias": torch.zeros(66)}, r"bias is \(66,\)"),
        ({"reduction": "average"}, "reduction is 'average': use 'none', 'mean' or 'sum'"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        ({"z_loss": -1.0}, "z_loss is -1.0"),
        ({"accumulate": "bf16"}, "accumulate is 'bf16': use 'fp32' or 'fp16'"),
        ({"accumulate": "fp16"}, "accumulate is 'fp16', but the operands are torch.float32"),
        ({"logit_softcap": 0.0}, "logit_softcap is 0.0"),
        ({"vocab_size": 68}, "vocab_size is 68: weight has rows for 1 to 67"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"x": torch.zeros(5, 16, dtype=torch.float64)}, "x is torch.float64: use float32"),
        ({"weight": torch.zeros(67, 16, device="meta")}, "weight is on meta: move it to .*, where x is"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_fit(device, change, message):
    good = {"x": torch.zeros(5, 16), "weight": torch.zeros(67, 16), "target": torch.zeros(5, dtype=torch.int64)}
    arguments = {
        key: value.to(device) if isinstance(value, Tensor) and value.device.type == "cpu" else value
        for key, value in {**good, **change}.items()
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)
