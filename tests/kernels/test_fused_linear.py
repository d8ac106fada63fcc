"""Linear layers against the plain PyTorch reference. Every matmul is made to run in Triton unless a test says otherwise, in
tiles of 16 x 32 x 16, so that small odd shapes have several tiles, several splits and ragged edges."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from bench import parity
from fastgpt.kernels import fused_linear as module
from fastgpt.kernels import matmul as launch
from fastgpt.kernels import reference, runtime, tuning, working_copy
from fastgpt.kernels.fused_linear import linear, linear_gelu, linear_relu2, mlp
from fastgpt.kernels.working_copy import gradients_in_place

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def in_tiles(monkeypatch, block_m: int, block_n: int, block_k: int, splits: int = 3) -> None:
    """Every matmul in Triton, in these tiles."""

    def choose(kind, M, N, K, dtype, device, fp16=False, **_):
        more = ({"chunk": 2} if fp16 else {}) | ({"splits": splits} if kind.startswith("weight_grad") else {})
        return chosen(kind, {**tiles(block_m, block_n, block_k), **more})

    monkeypatch.setattr(launch, "choose", choose)


def tiles(block_m: int, block_n: int, block_k: int) -> tuning.Config:
    blocks = {"block_m": block_m, "block_n": block_n, "block_k": block_k}
    return {**blocks, "group": 2, "num_warps": 4, "num_stages": 2}


def chosen(kind: str, config: dict) -> tuning.Choice:
    return tuning.Choice(tuning.Key(f"linear.{kind}", "-", "-"), config, config, "forced", torch.device("cpu"))


def run_by(monkeypatch, name: str) -> None:
    if name == "cublas":
        monkeypatch.setattr(launch, "choose", lambda kind, *_, **__: chosen(kind, tuning.CUBLAS))


@pytest.fixture(autouse=True)
def _small_tiles_in_triton(monkeypatch):
    in_tiles(monkeypatch, 16, 32, 16)


def make(device, dtype=torch.float32, shape=(3, 7), K=40, N=50, bias=True) -> dict[str, Tensor]:
    inputs = {"x": torch.randn(*shape, K, device=device).to(dtype)}
    inputs["weight"] = (torch.randn(N, K, device=device) / max(K, 1) ** 0.5).to(dtype)
    if bias:
        inputs["bias"] = torch.randn(N, device=device).to(dtype)
    return inputs


def make_mlp(device, dtype=torch.float32, shape=(3, 7), C=40, H=50, out=33, bias=True) -> dict[str, Tensor | None]:
    inputs = {"x": torch.randn(*shape, C, device=device).to(dtype)}
    inputs["w_fc"] = (2 * torch.randn(H, C, device=device) / C**0.5).to(dtype)
    inputs["w_proj"] = (torch.randn(out, H, device=device) / H**0.5).to(dtype)
    inputs["b_fc"] = torch.randn(H, device=device).to(dtype) if bias else None
    inputs["b_proj"] = torch.randn(out, device=device).to(dtype) if bias else None
    return inputs


def check(op, inputs, **options):
    """Parity with the reference of the same name."""
    parity.check(partial(op, **options), partial(getattr(reference, op.__name__), **options), inputs)


def gradients(op, inputs, **options) -> list[Tensor]:
    leaves = [v.requires_grad_() for v in (v.detach() for v in inputs.values() if v is not None)]
    named = dict(zip((k for k, v in inputs.items() if v is not None), leaves))
    out = op(**{**inputs, **named}, **options)
    upstream = torch.linspace(-1, 2, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("name", ["triton", "cublas"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(device, dtype, name, monkeypatch):
    run_by(monkeypatch, name)
    check(linear, make(device, dtype))


@pytest.mark.parametrize("name", ["triton", "cublas"])
def test_linear_without_a_bias(device, name, monkeypatch):
    run_by(monkeypatch, name)
    check(linear, make(device, bias=False))


@pytest.mark.parametrize("name", ["triton", "cublas"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_keeps_its_dtype_and_gets_its_own_gradient(device, dtype, name, monkeypatch):
    run_by(monkeypatch, name)
    check(linear, {**make(device, dtype), "residual": torch.randn(3, 7, 50, device=device).to(dtype)})
    check(linear, {**make(device, dtype), "residual": torch.randn(3, 7, 50, device=device)})


@pytest.mark.parametrize("name", ["triton", "cublas"])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_gelu(device, dtype, approximate, name, monkeypatch):
    run_by(monkeypatch, name)
    check(linear_gelu, make(device, dtype), approximate=approximate)


@pytest.mark.adversarial
@pytest.mark.parametrize("name", ["triton", "cublas"])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mlp(device, dtype, approximate, name, monkeypatch):
    run_by(monkeypatch, name)
    check_mlp(make_mlp(device, dtype), approximate=approximate)


def check_mlp(inputs, **options):
    given = {key: value for key, value in inputs.items() if value is not None}
    rest = {key: None for key, value in inputs.items() if value is None}
    check(mlp, given, **rest, **options)


def test_mlp_without_biases_and_with_a_residual(device):
    residual = torch.randn(3, 7, 33, device=device)
    check_mlp({**make_mlp(device, torch.bfloat16, bias=False), "residual": residual})


RELU2 = partial(mlp, activation="relu2")


@pytest.mark.adversarial
@pytest.mark.parametrize("name", ["triton", "cublas"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relu2(device, dtype, name, monkeypatch):
    run_by(monkeypatch, name)
    check(linear_relu2, make(device, dtype))
    check_mlp(make_mlp(device, dtype), activation="relu2")
    residual = torch.randn(3, 7, 33, device=device)
    check_mlp({**make_mlp(device, dtype, bias=False), "residual": residual}, activation="relu2")


def test_relu2_of_a_small_scale(device):
    """Where fp16 loses a = relu(z)^2: its derivative, from z, stays."""
    for dtype in DTYPES:
        inputs = make_mlp(device, dtype, bias=False)
        check_mlp({**inputs, "x": 2e-3 * inputs["x"]}, activation="relu2")


@pytest.mark.parametrize("name", ["triton", "cublas"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relu2_hides_no_nan(device, dtype, name, monkeypatch):
    run_by(monkeypatch, name)
    x = torch.tensor([float("nan"), float("-inf"), float("inf"), -2.0, 0.0, 3.0], device=device, dtype=dtype)[:, None]
    one = torch.ones(1, 1, device=device, dtype=dtype)
    out, dx = gradients(lambda x: linear_relu2(x, one), {"x": x})
    assert torch.equal(out.nan_to_num(7, 8).flatten(), torch.tensor([7, 0, 8, 0, 0, 9], device=device).to(dtype))
    assert torch.equal(dx.isnan().flatten(), out.isnan().flatten()) and not dx[[1, 3, 4]].any()


@pytest.mark.parametrize("dtype, fewer", [(torch.float16, 0), (torch.bfloat16, 1), (torch.float32, 1)], ids=str)
def test_relu2_saves_no_pre_activation(device, dtype, fewer):
    """But in fp16; memory that backward waits with, in tensors of 21 x 50."""

    def saved(activation):
        found = {}
        inputs = {key: t.requires_grad_() for key, t in make_mlp(device, dtype).items()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.setdefault(t.data_ptr(), t), lambda t: t):
            mlp(**inputs, activation=activation)
        return sum(t.untyped_storage().nbytes() for t in found.values())

    assert saved("gelu") - saved("relu2") == fewer * 21 * 50 * dtype.itemsize


@pytest.mark.adversarial
@pytest.mark.parametrize("values", [[-1e4, -50.0, -12.0, -5.5, -0.5, -1e-6, 0.0, 1e-6, 0.5, 5.5, 50.0, 1e4]])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_in_its_tails(device, values, approximate):
    x = torch.tensor(values, device=device)[:, None]
    check(linear_gelu, {"x": x, "weight": torch.ones(1, 1, device=device)}, approximate=approximate)


@pytest.mark.parametrize("op", [linear, linear_gelu, mlp], ids=lambda op: op.__name__)
def test_fp16_accumulation(device, op):
    # The interpreter rounds once per block, not per 16 of K as tensor cores do: this shows the sums, not their error.
    if op is mlp:
        for activation in ("gelu", "relu2"):
            check_mlp(make_mlp(device, torch.float16, C=72, H=100), accumulate="fp16", activation=activation)
    else:
        check(op, make(device, torch.float16, K=72), accumulate="fp16")


@pytest.mark.parametrize("accumulate", ["fp32", "fp16"])
@pytest.mark.parametrize("K", [1, 15, 16, 17, 31, 33, 48, 64, 80])
def test_sums_of_any_length(device, K, accumulate):
    # Whole blocks of K or not, whole chunks of two blocks or not; the weight gradient's sums are over 19 rows.
    check(linear, make(device, torch.float16, shape=(19,), K=K, N=20), accumulate=accumulate)


def test_fp16_sums_are_rounded_once_per_chunk_and_added_in_fp32(device, monkeypatch):
    # 2049 is no fp16 number: a chunk of 2048 + 1 loses its 1, but the sum of chunks keeps every 2048.
    x = torch.zeros(1, 96, device=device, dtype=torch.float16)
    x[0, ::32] = 2048  # one in each chunk of 2 x 16
    weight = torch.ones(1, 96, device=device, dtype=torch.float16)
    residual = torch.zeros(1, 1, device=device)
    in_tiles(monkeypatch, 16, 16, 16)
    assert linear(x, weight, residual=residual, accumulate="fp16").item() == 3 * 2048
    x[0, 1::32] = 1
    assert linear(x, weight, residual=residual, accumulate="fp16").item() == 3 * 2048
    assert linear(x, weight, residual=residual).item() == 3 * 2049


# ---------------------------------------------------------------- shapes and strides


@pytest.mark.parametrize("shape", [(), (1,), (17,), (2, 3, 4)], ids=str)
def test_any_rank(device, shape):
    check(linear, make(device, shape=shape))
    check_mlp(make_mlp(device, shape=shape))


@pytest.mark.parametrize("N", [1, 2, 31, 33, 64])
def test_any_number_of_columns(device, N):
    for op in (linear, linear_gelu, linear_relu2):
        check(op, make(device, N=N))


@pytest.mark.parametrize("name", ["triton", "cublas"])
@pytest.mark.parametrize("shape, K, N", [((0,), 40, 50), ((2, 0), 40, 50), ((3,), 0, 50), ((3,), 40, 0)], ids=str)
def test_empty(device, shape, K, N, name, monkeypatch):
    run_by(monkeypatch, name)
    inputs = make(device, shape=shape, K=K, N=N)
    check(linear, {**inputs, "residual": torch.randn(*shape, N, device=device)})
    check(linear_gelu, inputs)
    check(linear_relu2, inputs)
    if K and N:
        check_mlp(make_mlp(device, shape=shape))
        check_mlp(make_mlp(device, shape=shape), activation="relu2")


def test_more_rows_than_a_program_of_each_kernel_takes(device, monkeypatch):
    # bug 3: a partial-sum buffer of floor instead of ceil
    def choose(kind, M, N, K, dtype, device, fp16=False, **_):
        return chosen(kind, launch.default_tiles(kind, M, N, K, dtype, fp16, runtime.sm_count(device)))

    monkeypatch.setattr(launch, "choose", choose)
    for op in (linear, linear_gelu):
        check(op, make(device, torch.float16, shape=(1030,), K=16, N=24))


@pytest.mark.parametrize("layout", ["transposed", "slice", "every_other", "expanded"])
@pytest.mark.parametrize("name", ["triton", "cublas"])
def test_any_strides_of_the_weight(device, layout, name, monkeypatch):
    run_by(monkeypatch, name)
    inputs = make(device, K=40, N=40)
    wide = torch.randn(40, 90, device=device) / 6
    weight = {
        "transposed": inputs["weight"].t(),
        "slice": wide[:, 5:45],
        "every_other": wide[:, :80:2],
        "expanded": wide[:1, :40].expand(40, 40),
    }
    check(linear, {**inputs, "weight": weight[layout]})
    check(linear_gelu, {**inputs, "weight": weight[layout]})


@pytest.mark.parametrize("name", ["triton", "cublas"])
def test_any_strides_of_x_bias_and_residual(device, name, monkeypatch):
    run_by(monkeypatch, name)
    inputs = {**make(device, shape=(7, 4)), "residual": torch.randn(4, 50, 7, device=device).permute(2, 0, 1)}
    inputs["bias"] = torch.randn(50, 3, device=device)[:, 1]
    wide = torch.randn(4, 7, 90, device=device)
    for x in (wide[..., 3:43].transpose(0, 1), wide[:, :, :80:2].transpose(0, 1), wide[:1, :1, :40].expand(7, 4, 40)):
        check(linear, {**inputs, "x": x})


@pytest.mark.parametrize("op", [linear, linear_gelu], ids=lambda op: op.__name__)
def test_any_strides_of_the_upstream_gradient(device, op):
    # bug 5: dy from .sum() has stride 0
    ones, permuted = (
        torch.ones(1, device=device).expand(3, 7, 50),
        torch.randn(50, 7, 3, device=device).permute(2, 1, 0),
    )
    for upstream in (ones, permuted):
        parity.check(op, getattr(reference, op.__name__), make(device), upstream=(upstream,))


def test_a_transposed_views_gradient_has_its_bases_layout(device):
    # Conv1D's weight (in, out), read as a view
    base = nn.Parameter(torch.randn(40, 50, device=device))
    linear(make(device)["x"], base.t()).square().sum().backward()
    assert base.grad is not None and base.grad.is_contiguous() and base.grad.shape == (40, 50)


@pytest.mark.xdist_group("large")
def test_offsets_past_2_to_the_31(device, needs_memory):
    # bug 1: row strides whose product with the row passes int32; memory that is never touched otherwise
    rows, stride = 3, 2**30 + 8
    needs_memory(2 * rows * stride)
    buffer = torch.empty(rows * stride, dtype=torch.float16, device=device)
    x = buffer.as_strided((rows, 16), (stride, 1))
    x.copy_(torch.randn(rows, 16, device=device))
    weight = torch.randn(24, 16, device=device, dtype=torch.float16)
    assert torch.equal(linear(x, weight), linear(x.clone(), weight))
    assert torch.equal(linear(weight, x), linear(weight, x.clone()))


def test_nothing_is_written_outside_the_result(device):
    # bug 2: unmasked stores; guard bands of 77 on both sides of each result
    x, dz = torch.randn(19, 21, device=device), torch.randn(19, 23, device=device)
    buffers = {size: torch.full((size + 200,), 77.0, device=device) for size in (19 * 23, 23 * 21, 23)}
    y, dw, db = (buffers[size][100:-100] for size in (19 * 23, 23 * 21, 23))
    weight = torch.randn(23, 21, device=device)
    launch._launch(chosen("none", tiles(16, 32, 16)), x, weight.t(), y.view(19, 23), "none")
    launch.weight_grad(dz, x, dw.view(23, 21), db, False)
    for buffer, inside in zip(buffers.values(), (y, dw, db)):
        assert (buffer[:100] == 77).all() and (buffer[-100:] == 77).all() and (inside != 77).all()
    torch.testing.assert_close(dw.view(23, 21), dz.t() @ x, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- dtypes


def test_an_fp32_weights_gradient_never_goes_through_16_bits(device):
    inputs = make(device, shape=(64,))
    x, weight = inputs["x"].bfloat16(), inputs["weight"].requires_grad_()
    dy = torch.randn(64, 50, device=device).bfloat16()
    linear(x, weight, inputs["bias"]).backward(dy)
    exact = dy.double().t() @ x.double()
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_computes_in_its_dtype_from_the_working_copy(device, dtype):
    inputs = make_mlp(device)
    weights = {key: nn.Parameter(value) for key, value in inputs.items() if key != "x"}
    with torch.autocast(device.type, dtype), working_copy.copies_kept():
        out = mlp(inputs["x"], **weights)
        assert working_copy.existing(weights["w_fc"]).dtype == dtype
    out.sum().backward()
    assert out.dtype == dtype
    assert torch.equal(out, mlp(inputs["x"].to(dtype), **weights))
    assert {p.grad.dtype for p in weights.values()} == {torch.float32}
    assert weights["b_fc"] not in working_copy._copies, "the kernel reads a bias in its own dtype"


def test_parity_under_autocast(device):
    def autocast(op, x, **kwargs):
        with torch.autocast(device.type, torch.bfloat16, enabled=x.dtype == torch.float32):
            return op(x, **kwargs)

    parity.check(partial(autocast, mlp), partial(autocast, reference.mlp), make_mlp(device))


# ---------------------------------------------------------------- dropout


@pytest.mark.parametrize("name", ["triton", "cublas"])
def test_dropout_comes_before_the_residual_and_is_repeated_in_backward(device, name, monkeypatch):
    run_by(monkeypatch, name)
    p, x, weight = 0.4, torch.ones(60, 16, device=device), torch.zeros(70, 16, device=device).requires_grad_()
    bias, residual = torch.ones(70, device=device).requires_grad_(), torch.full((60, 70), 2.0, device=device)
    y = linear(x, weight, bias, residual=residual.requires_grad_(), dropout_p=p)
    kept = y > 2
    assert y.unique().tolist() == pytest.approx([2, 2 + 1 / (1 - p)])
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=0.03)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(bias.grad, kept.sum(0) / (1 - p))
    torch.testing.assert_close(weight.grad, (kept.sum(0) / (1 - p))[:, None].expand(70, 16))
    assert torch.equal(residual.grad, torch.ones_like(residual))


def test_dropout_follows_torchs_generator(device):
    # bug 19: a constant seed
    inputs = make(device)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append([linear(**inputs, dropout_p=0.5) for _ in range(2)])
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[0][1]) and not torch.equal(draws[0][0], draws[2][0])
    assert not linear(**inputs, dropout_p=1.0).any()
    torch.testing.assert_close(linear(**inputs, dropout_p=0.0), reference.linear(**inputs), rtol=1e-5, atol=1e-5)


def test_activation_checkpointing_repeats_the_mask(device):
    inputs = make_mlp(device)

    def checkpointed(**kwargs):
        op = partial(mlp, dropout_p=0.3)
        return torch.utils.checkpoint.checkpoint(op, use_reentrant=False, **kwargs)

    torch.manual_seed(5)
    plain = gradients(mlp, inputs, dropout_p=0.3)
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(checkpointed, inputs)))


# ---------------------------------------------------------------- backward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeat_runs_are_bit_equal_and_change_no_input(device, dtype):
    # bugs 13 and 18
    inputs = make_mlp(device, dtype, shape=(40,))
    before = {key: value.clone() for key, value in inputs.items()}
    first, second = gradients(mlp, inputs), gradients(mlp, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert all(torch.equal(before[key], value) for key, value in inputs.items())


@pytest.mark.parametrize("wanted", ["x", "w_fc", "b_fc", "w_proj", "b_proj"])
def test_only_wanted_gradients_are_formed(device, wanted, monkeypatch):
    inputs = make_mlp(device)
    names = ["out", *inputs]
    everything = dict(zip(names, gradients(mlp, inputs)))
    formed = []
    for op in ("_bwd_input", "_bwd_input_gelu", "_bwd_weight"):
        original = getattr(module, op)
        monkeypatch.setattr(module, op, lambda *a, f=original, op=op: (formed.append(op), f(*a))[1])
    leaf = inputs[wanted].clone().requires_grad_()
    out = mlp(**{**inputs, wanted: leaf})
    upstream = torch.linspace(-1, 2, out.numel(), device=device).view(out.shape)
    out.backward(upstream)
    torch.testing.assert_close(leaf.grad, everything[wanted], rtol=1e-6, atol=1e-6)
    gelu = "_bwd_input_gelu"
    products = {"x": [gelu, "_bwd_input"], "w_fc": [gelu, "_bwd_weight"], "b_fc": [gelu]}
    assert formed == {**products, "w_proj": ["_bwd_weight"], "b_proj": []}[wanted]
    assert all(value.grad is None for key, value in inputs.items() if key != wanted)


@pytest.mark.parametrize("engine", ["triton", "cublas"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_biass_gradient_is_the_sum_of_what_the_gelu_passes_on(device, dtype, engine, monkeypatch):
    """Behind cuBLAS it comes from the sweep that forms dz, so that no other pass reads dz."""
    run_by(monkeypatch, engine)
    sweeps, original = [], launch.pointwise
    monkeypatch.setattr(launch, "pointwise", lambda *a: (sweeps.append(a[-1].dtype), original(*a))[1])
    check(mlp, make_mlp(device, dtype))
    assert sweeps == ([dtype] if engine == "cublas" else [])


def test_no_gradient_wanted_saves_no_pre_activation(device, monkeypatch):
    saved = []
    original = launch.matmul_gelu
    monkeypatch.setattr(launch, "matmul_gelu", lambda *a: (saved.append(a[-1]), original(*a))[1])
    inputs = make_mlp(device)
    assert mlp(**inputs).grad_fn is None
    assert saved == [False]


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_few_tokens_without_gradients_are_plain_pytorchs(device, dtype, approximate, monkeypatch):
    """Whose operations cost the host less, as sampling feels: bit by bit what the operator gives."""
    run_by(monkeypatch, "cublas")
    inputs = make(device, dtype)
    inputs["weight"].requires_grad_()
    expected = linear_gelu(**inputs, approximate=approximate).detach()
    monkeypatch.setattr(launch, "matmul_gelu", lambda *_: pytest.fail("not so few"))
    with torch.no_grad():
        assert torch.equal(linear_gelu(**inputs, approximate=approximate), expected)


@pytest.mark.parametrize("op", [linear_gelu, linear_relu2], ids=lambda op: op.__name__)
def test_an_activation_used_twice_sums_both_gradients(device, op):
    inputs = make(device)

    def twice(op, **kwargs):
        a = op(**kwargs)
        return a * a.sin()

    parity.check(partial(twice, op), partial(twice, getattr(reference, op.__name__)), inputs)


@pytest.mark.parametrize("name", ["triton", "cublas"])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_in_place_are_those_that_autograd_adds(device, name, splits, transposed, monkeypatch):
    in_tiles(monkeypatch, 32, 32, 16, splits)
    run_by(monkeypatch, name)
    inputs = make_mlp(device, torch.bfloat16, shape=(40,))
    x = inputs.pop("x")

    def accumulated(context) -> tuple[list[Tensor], int]:
        params = {
            key: nn.Parameter(value.float().t().contiguous().t() if transposed and value.dim() == 2 else value.float())
            for key, value in inputs.items()
        }
        addresses = set()
        for micro_batch in (x, x.sin()):
            with context():
                mlp(micro_batch, **params).float().square().sum().backward()
            addresses |= {p.grad.data_ptr() for p in params.values() if p.dim() == 2}
        return [p.grad for p in params.values()], len(addresses)

    plain, _ = accumulated(torch.enable_grad)
    added, buffers = accumulated(gradients_in_place)
    assert buffers == 2, "the gradients of two matrices stay where they are"
    for a, b in zip(plain, added):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("splits", [1, 3])
def test_a_gradient_is_added_once_where_the_first_config_had_no_room(device, splits, monkeypatch):
    """The retry repeats the whole operator, so nothing may have been added before a launch that can fail."""
    in_tiles(monkeypatch, 16, 16, 16, splits)
    dz, x, refused = torch.randn(40, 16, device=device), torch.randn(40, 32, device=device), []
    run = runtime.Launch.__call__

    def first_has_no_room(self, *args, **more):
        if not refused:
            raise runtime.NoRoom(self.choice, RuntimeError())
        run(self, *args, **more)

    def summed() -> Tensor:
        grad = torch.ones(16, 32, device=device)
        db = module._bwd_weight_add(grad, dz, x, torch.float32, False)
        return torch.cat([grad.view(-1), db])

    expected = summed()
    monkeypatch.setattr(tuning, "refuse", lambda error: refused.append(error.choice))
    monkeypatch.setattr(runtime.Launch, "__call__", first_has_no_room)
    assert torch.equal(summed(), expected) and len(refused) == 1


def test_gradients_in_place_reach_leaf_parameters_of_fp32_without_hooks_only(device, monkeypatch):
    added, original = [], module._bwd_weight_add
    monkeypatch.setattr(module, "_bwd_weight_add", lambda *a: (added.append(a[0]), original(*a))[1])

    def additions(weight) -> int:
        added.clear()
        with gradients_in_place():
            for _ in range(2):
                linear(x.to(weight.dtype), weight).sum().backward()
        assert all(grad is weight.grad for grad in added)
        return len(added)

    x, seen = make(device)["x"], []
    watched, watched_after = (nn.Parameter(torch.randn(50, 40, device=device)) for _ in range(2))
    watched.register_hook(lambda grad: seen.append(grad))
    watched_after.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad))
    assert additions(nn.Parameter(torch.randn(50, 40, device=device))) == 1
    assert additions(nn.Parameter(torch.randn(50, 40, device=device, dtype=torch.bfloat16))) == 0
    assert additions(torch.randn(50, 40, device=device).requires_grad_()) == 0
    assert additions(watched) == additions(watched_after) == 0
    assert len(seen) == 4 and all(grad is not None for grad in seen)
    assert not working_copy._in_place


# ---------------------------------------------------------------- torch.library, torch.compile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(device, dtype):
    m = make_mlp(device, dtype, shape=(2, 3), C=16, H=20, out=18)
    m = {key: value.requires_grad_() for key, value in m.items()}
    residual = torch.randn(2, 3, 18, device=device, requires_grad=True)
    seed = torch.ones(1, dtype=torch.int64, device=device)
    torch.library.opcheck(
        module._linear_gelu_fwd.registered, (m["x"], m["w_fc"], None, m["b_fc"], "relu2", False, True, False)
    )
    forward = (m["x"], m["w_fc"], None, m["b_fc"], "gelu", False)
    torch.library.opcheck(module._linear_gelu_fwd.registered, (*forward, True, False))
    a, z = (t.detach() for t in module._linear_gelu_fwd(*forward, True, False))
    w_proj, end = m["w_proj"].detach(), (m["w_proj"], None, m["b_proj"])
    pre = z.clone().requires_grad_()
    torch.library.opcheck(
        module._linear_fwd.registered, (a, *end, residual, seed, pre, m["b_fc"], 0.5, "gelu", False, False)
    )
    torch.library.opcheck(module._linear_fwd.registered, (m["x"], m["w_fc"], *[None] * 6, 0.0, None, False, False))
    dz = torch.randn(2, 3, 18, device=device).to(dtype)
    torch.library.opcheck(module._bwd_input.registered, (dz, w_proj, False))
    for bias_dtype in (None, torch.float32):
        torch.library.opcheck(
            module._bwd_weight.registered, (dz, a, w_proj.float().t().contiguous().t(), bias_dtype, False)
        )
        torch.library.opcheck(
            module._bwd_weight_add.registered, (torch.zeros(18, 20, device=device), dz, a, bias_dtype, False)
        )
        torch.library.opcheck(module._bwd_input_gelu.registered, (dz, w_proj, z, "gelu", False, bias_dtype))
        torch.library.opcheck(module._pointwise_bwd.registered, (a, z, None, 0.0, "gelu_erf", dtype, bias_dtype))
        torch.library.opcheck(module._pointwise_bwd.registered, (dz, None, seed, 0.5, None, dtype, bias_dtype))


@pytest.mark.parametrize(
    "op", [linear, linear_gelu, linear_relu2, mlp, RELU2], ids=["none", "gelu", "relu2", "mlp", "mlp relu2"]
)
def test_compiled_equals_eager(device, op):
    inputs = make_mlp(device) if op in (mlp, RELU2) else make(device)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(gradients(op, inputs), gradients(compiled, inputs)))
    with torch.no_grad():
        assert torch.equal(compiled(**inputs), op(**inputs))


def test_compiled_under_autocast_with_dropout_and_in_place_asked_for(device):
    weight, x = nn.Parameter(torch.randn(50, 40, device=device)), make(device)["x"]

    def step():
        with torch.autocast(device.type, torch.bfloat16):
            return linear(x, weight, residual=residual, dropout_p=0.5)

    residual = torch.zeros(3, 7, 50, device=device)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with gradients_in_place():
        first, second = compiled(), compiled()
    assert not torch.equal(first, second), "each call draws its own mask"
    first.sum().backward()
    before = weight.grad.clone()
    second.sum().backward()
    x16, upstream = x.bfloat16().reshape(-1, 40).float(), (second != 0).float().reshape(-1, 50) * 2
    torch.testing.assert_close(weight.grad - before, upstream.t() @ x16, rtol=1e-4, atol=1e-4)


def test_batch_sizes_share_one_compiled_graph(device):
    # bug 27: recompiles per batch size
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mlp, fullgraph=True, backend=counter)
    for rows in (3, 5, 9, 12):
        inputs = make_mlp(device, shape=(rows,))
        assert all(torch.equal(a, b) for a, b in zip(gradients(compiled, inputs), gradients(mlp, inputs)))
    assert counter.frame_count <= 2  # the second one takes any size


# ---------------------------------------------------------------- refusals, and other devices


def test_plain_pytorch_for_cpu_tensors_outside_the_interpreter(monkeypatch):
    monkeypatch.setattr(runtime, "INTERPRET", False)
    cpu = torch.device("cpu")
    for op, inputs in ((linear, make(cpu, torch.float64)), (linear_gelu, make(cpu)), (mlp, make_mlp(cpu))):
        got, want = gradients(op, inputs), gradients(getattr(reference, op.__name__), inputs)
        assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert linear(**make(cpu, torch.float16), accumulate="fp16").dtype == torch.float16
    with pytest.raises(ValueError, match="approximate is 'erf'"):
        linear_gelu(**make(cpu), approximate="erf")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"x": torch.zeros(5, 31)},
            r"x is \(5, 31\) and weight \(67, 16\): they have to be \(..., in\) and \(out, in\)",
        ),
        ({"x": torch.zeros(())}, r"x is \(\) and weight"),
        ({"weight": torch.zeros(16)}, r"weight \(16,\)"),
        ({"bias": torch.zeros(66)}, r"bias is \(66,\): the result of \(5, 67\) needs \(67,\)"),
        ({"residual": torch.zeros(67)}, r"residual is \(67,\): the result of \(5, 67\) needs \(5, 67\)"),
        ({"dropout_p": 1.5}, r"dropout_p is 1.5: it must lie in \[0, 1\]"),
        ({"accumulate": "bf16"}, "accumulate is 'bf16': use 'fp32' or 'fp16'"),
        (
            {"accumulate": "fp16"},
            "accumulate is 'fp16', but the operands are torch.float32: use float16 ones, or 'fp32'",
        ),
        ({"weight": torch.zeros(67, 16, dtype=torch.float64)}, "weight is torch.float64: use float32"),
        ({"weight": torch.zeros(67, 16, device="meta")}, "weight is on meta: move it to"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_fit(device, change, message):
    arguments = {
        key: value.to(device) if isinstance(value, Tensor) and value.device.type == "cpu" else value
        for key, value in {"x": torch.zeros(5, 16), "weight": torch.zeros(67, 16), **change}.items()
    }
    with pytest.raises(ValueError, match=message):
        linear(**arguments)


def test_an_unknown_activation_is_refused(device):
    with pytest.raises(ValueError, match="activation is 'relu': use 'gelu' or 'relu2'"):
        mlp(**make_mlp(device), activation="relu")


def test_mlps_second_matrix_has_to_fit_the_first(device):
    inputs = make_mlp(device)
    with pytest.raises(ValueError, match=r"the activation's output is \(3, 7, 50\) and w_proj \(33, 49\)"):
        mlp(**{**inputs, "w_proj": inputs["w_proj"][:, 1:]})
    with pytest.raises(ValueError, match=r"b_fc is \(49,\)"):
        mlp(**{**inputs, "b_fc": inputs["b_fc"][1:]})
