"""Layer norm against its fp64 reference, and one test for each bug that layer norm kernels have shipped with."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from bench import parity
from fastgpt.kernels import fused_layernorm, reference, runtime, tuning
from fastgpt.kernels.fused_layernorm import layer_norm

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def inputs(shape, device, *, x=FP32, residual=None, weight=FP32, bias=FP32):
    """Keyword arguments of layer_norm; each dtype says what the tensor is, None leaves it out."""
    C = shape[-1]
    made = {
        "x": torch.randn(shape, device=device).to(x),
        "weight": (1 + 0.1 * torch.randn(C, device=device)).to(weight),
    }
    if bias is not None:
        made["bias"] = torch.randn(C, device=device).to(bias)
    if residual is not None:
        made["residual"] = torch.randn(shape, device=device).to(residual)
    return made


def gradients(arguments, upstream=None, **options):
    """Outputs and gradients of layer_norm on fresh leaves, by name."""
    return parity.run(lambda **tensors: layer_norm(**tensors, **options), arguments, upstream)


def use_geometry(monkeypatch, **changes):
    """Launch with ``changes`` made to the config, so that a small input meets what large ones meet."""
    stock = fused_layernorm.config
    monkeypatch.setattr(fused_layernorm, "config", lambda *key: stock(*key) | changes)
    tuning.choose_again()


# --- parity ---------------------------------------------------------------------------------------------------------

DTYPES = [
    {"x": FP32},
    {"x": FP16, "weight": FP16, "bias": FP16},
    {"x": BF16, "weight": BF16, "bias": BF16},
    {"x": BF16},
    {"x": BF16, "bias": None},
    {"x": FP32, "residual": FP32},
    {"x": FP16, "residual": FP16, "bias": None},
    {"x": BF16, "residual": BF16},
    {"x": BF16, "residual": FP32},
    {"x": FP32, "residual": BF16, "weight": BF16, "bias": FP16},
]


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(f"{k}_{str(v)[6:]}" for k, v in d.items()))
@pytest.mark.parametrize("shape", [(33, 77), (70, 256)], ids=str)
def test_parity_for_dtypes(device, shape, dtypes):
    parity.check(layer_norm, reference.layer_norm, inputs(shape, device, **dtypes))


# bug 25: rank 1 to 4; bug 16: ragged numbers of rows
@pytest.mark.adversarial
@pytest.mark.parametrize(
    "shape",
    [(7,), (1,), (1, 1), (19, 1), (1, 768), (17, 2), (63, 48), (65, 48), (2, 5, 100), (2, 3, 5, 24), (3, 1, 1600)],
    ids=str,
)
@pytest.mark.parametrize("residual", [None, FP32])
def test_parity_for_shapes(device, shape, residual):
    parity.check(layer_norm, reference.layer_norm, inputs(shape, device, residual=residual))


@pytest.mark.parametrize("C", [4097, 16384])
def test_parity_for_wide_rows(device, C, monkeypatch):
    use_geometry(monkeypatch, rows=1)
    parity.check(layer_norm, reference.layer_norm, inputs((3, C), device, x=BF16, residual=FP32))


@pytest.mark.parametrize("residual", [None, FP32])
def test_parity_where_several_programs_share_a_row(device, residual, monkeypatch):
    monkeypatch.setattr(fused_layernorm, "MAX_BACKWARD_BLOCK", 32)  # 100 columns: three blocks and a ragged one
    parity.check(layer_norm, reference.layer_norm, inputs((37, 100), device, residual=residual))


# bug 4: a reduction along the wrong axis shows when a program holds several rows that differ
@pytest.mark.parametrize("rows", [1, 2, 4, 64])
def test_parity_for_several_unequal_rows_per_program(device, rows, monkeypatch):
    use_geometry(monkeypatch, rows=rows)
    arguments = inputs((13, 64), device, residual=FP32)
    arguments["x"] *= torch.logspace(-2, 2, 13, device=device)[:, None]
    arguments["residual"] += torch.arange(13, device=device)[:, None]
    parity.check(layer_norm, reference.layer_norm, arguments)


# bug 3: a partial-sum buffer with floor(rows / ...) programs loses the last row of 2049
@pytest.mark.parametrize("rows", [2047, 2049])
def test_weight_gradients_count_every_row(device, rows):
    arguments = inputs((rows, 16), device)
    parity.check(layer_norm, reference.layer_norm, arguments)
    results, _ = gradients(arguments, (torch.ones(rows, 16),))
    assert torch.equal(results["dbias"], torch.full((16,), float(rows), device=device))


def test_parity_where_the_mean_dwarfs_the_deviation(device):
    arguments = inputs((20, 200), device)
    arguments["x"] += 1000
    parity.check(layer_norm, reference.layer_norm, arguments)


@pytest.mark.adversarial
def test_rstd_is_as_good_as_rounded(device):
    """A GPU's rsqrt is 2^-22.4 off, which would be the error of a whole row of y."""
    x = torch.arange(1.0, 257.0, device=device)[:, None] * torch.tensor([1.0, -1.0] * 8, device=device)
    _, _, _, rstd = fused_layernorm.layer_norm_fwd(x, torch.ones(16, device=device), None, None, None, 0.0, 0.0, FP32)
    # In 2^-24: half of the 2 that the division of the squares' sum may be off, half a rounding in Newton's step, and a last.
    torch.testing.assert_close(rstd.double(), 1 / x[:, 0].double(), rtol=2.5 * 2**-24, atol=0)


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.1])
def test_eps(device, eps):
    arguments = inputs((9, 32), device)
    arguments["x"] *= 0.01
    parity.check(lambda **kw: layer_norm(**kw, eps=eps), lambda **kw: reference.layer_norm(**kw, eps=eps), arguments)


@pytest.mark.parametrize("x, residual, out", [(BF16, None, FP32), (FP32, None, BF16), (BF16, FP32, FP16)])
def test_out_dtype(device, x, residual, out):
    parity.check(
        lambda **kw: layer_norm(**kw, out_dtype=out),
        lambda **kw: reference.layer_norm(**kw, out_dtype=None if kw["x"].dtype == torch.float64 else out),
        inputs((21, 40), device, x=x, residual=residual),
    )


def test_the_norm_reads_the_sum_as_rounded(device):
    arguments = inputs((30, 64), device, x=FP32, residual=BF16)
    y, total = layer_norm(**arguments)
    assert torch.equal(y, layer_norm(total, arguments["weight"], arguments["bias"], out_dtype=FP32))


def test_every_gradient_has_the_dtype_of_its_input(device):
    arguments = inputs((5, 24), device, x=BF16, residual=FP32, weight=FP16, bias=BF16)
    results, _ = gradients(arguments, out_dtype=FP16)
    assert {name: value.dtype for name, value in results.items()} == {
        "out0": FP16, "out1": FP32, "dx": BF16, "dresidual": FP32, "dweight": FP16, "dbias": BF16
    }  # fmt: skip


def test_autocast_changes_nothing(device):
    arguments = inputs((6, 32), device, residual=FP32)
    plain, upstream = gradients(arguments)
    with torch.autocast(device.type, BF16):
        cast, _ = gradients(arguments, upstream)
    for name, value in plain.items():
        assert cast[name].dtype == value.dtype and torch.equal(cast[name], value), name


# --- strides --------------------------------------------------------------------------------------------------------


def strided_views(device):
    base = torch.randn(6, 8, 96, device=device)
    return {
        "columns of a wider tensor": base[..., 16:80],
        "every other row": base[:, ::2, :64],
        "rows transposed": base[..., :64].transpose(0, 1),
        "columns transposed": torch.randn(64, 40, device=device).t(),
        "every other column": base[..., ::2],
        "rows expanded": torch.randn(1, 64, device=device).expand(10, 64),
        "columns expanded": torch.randn(10, 1, device=device).expand(10, 64),
        "unaligned": torch.randn(10 * 64 + 1, device=device)[1:].view(10, 64),
        "single column of a wider tensor": base[..., 3:4],
    }


STRIDED = list(strided_views(torch.device("cpu")))


# Without the rows of one value: their deviation is 0, and all that is left of it rounding, times 1 / sqrt(eps).
@pytest.mark.parametrize("name", [name for name in STRIDED if name != "columns expanded"])
@pytest.mark.parametrize("residual", [False, True])
def test_parity_for_strided_inputs(device, name, residual):
    x = strided_views(device)[name]
    C = x.shape[-1]
    arguments = {
        "x": x,
        "weight": torch.randn(C, 3, device=device)[:, 1],
        "bias": torch.ones(1, device=device).expand(C),
    }
    if residual:
        arguments["residual"] = strided_views(device)[name]
    parity.check(layer_norm, reference.layer_norm, arguments)


def test_rows_a_constant_stride_apart_are_read_in_place(device):
    views = strided_views(device)
    for name in ("columns of a wider tensor", "rows expanded", "unaligned", "single column of a wider tensor"):
        assert fused_layernorm.as_rows(views[name]).data_ptr() == views[name].data_ptr(), name


# bug 5: an upstream gradient with stride 0, as .sum() makes it, and transposed ones
@pytest.mark.parametrize(
    "name", ["columns of a wider tensor", "columns transposed", "rows expanded", "columns expanded"]
)
def test_strided_upstream_gradients(device, name):
    upstream = strided_views(device)[name]
    arguments = inputs(upstream.shape, device, residual=FP32)
    parity.check(layer_norm, reference.layer_norm, arguments, upstream=(upstream, upstream))


def test_upstream_gradient_of_a_sum(device):
    arguments = inputs((10, 64), device, residual=FP32)
    parity.check(
        lambda **kw: sum(out.sum() for out in layer_norm(**kw)),
        lambda **kw: sum(out.sum() for out in reference.layer_norm(**kw)),
        arguments,
    )


# bug 1: 32-bit offsets wrap where row x stride passes 2**31
@pytest.mark.xdist_group("large")
def test_offsets_past_two_to_the_31(device, needs_memory):
    rows, C, stride = 3, 32, 2**30 + 64
    count = (rows - 1) * stride + C
    needs_memory(2 * count)
    # On a CPU only the pages that are touched exist; there the bug ends the process, for the address is far outside.
    buffer = torch.empty(count, dtype=FP16, device=device)
    x = buffer.as_strided((rows, C), (stride, 1))
    x.copy_(torch.randn(rows, C))
    arguments = inputs((rows, C), device, x=FP16) | {"x": x, "residual": x}
    parity.check(layer_norm, reference.layer_norm, arguments, upstream=(x, x))


# --- memory ---------------------------------------------------------------------------------------------------------


# bug 2: stores past the edges; bug 17: scratch that is read before it is written
@pytest.mark.parametrize("shape", [(1, 1), (33, 77), (5, 130)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_buffers_start_as_nan_and_nothing_around_them_is_written(device, shape, dropout_p, monkeypatch):
    monkeypatch.setattr(fused_layernorm, "MAX_BACKWARD_BLOCK", 64)
    arguments = inputs(shape, device, x=BF16, residual=FP32)
    stock, guard, buffers = torch.empty, 512, []

    def guarded_empty(size, *, dtype, device):
        size = torch.Size([size] if isinstance(size, int) else size)
        buffer = torch.full((size.numel() + 2 * guard,), torch.nan, dtype=dtype, device=device)
        buffers.append(buffer)
        return buffer[guard : guard + size.numel()].view(size)

    monkeypatch.setattr(torch, "empty", guarded_empty)
    results, _ = gradients(arguments, dropout_p=dropout_p)
    monkeypatch.setattr(torch, "empty", stock)
    assert len(buffers) >= 8
    for buffer in buffers:
        assert buffer[:guard].isnan().all() and buffer[-guard:].isnan().all()
    for name, value in results.items():
        assert value.isfinite().all(), name


# bug 13: backward that writes over the upstream gradient, or over what was saved
def test_nothing_passed_in_is_written_and_no_two_results_share_memory(device):
    arguments = inputs((9, 48), device, residual=FP32)
    upstream = (torch.randn(9, 48, device=device), torch.randn(9, 48, device=device))
    before = [tensor.clone() for tensor in (*arguments.values(), *upstream)]
    results, _ = gradients(arguments, upstream)
    for tensor, copy in zip((*arguments.values(), *upstream), before):
        assert torch.equal(tensor, copy)
    storages = [value.untyped_storage().data_ptr() for value in (*results.values(), *arguments.values(), *upstream)]
    assert len(set(storages)) == len(storages)


# bug 20: launches on the current device instead of the tensors'
def test_kernels_launch_on_the_device_of_their_tensors(device):
    choices = []
    arguments = inputs((4, 16), device)
    with tuning.heard(choices.append):
        gradients(arguments)
    assert [(choice.key.kernel, choice.device) for choice in choices] == [
        ("layer_norm.forward", arguments["x"].device),
        ("layer_norm.backward", arguments["x"].device),
    ]


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24)], ids=str)
def test_no_rows(device, shape):
    results, _ = gradients(inputs(shape, device, x=BF16, residual=FP32), dropout_p=0.1)
    assert results["out0"].shape == results["dx"].shape == shape
    assert torch.equal(results["dweight"], torch.zeros(24, device=device))
    assert torch.equal(results["dbias"], torch.zeros(24, device=device))


# bug 18: sums in an order that changes from run to run
def test_repeated_runs_are_bitwise_equal(device):
    arguments = inputs((300, 80), device, x=BF16, residual=FP32)
    first, upstream = gradients(arguments)
    second, _ = gradients(arguments, upstream)
    for name, value in first.items():
        assert torch.equal(second[name], value), name


# --- gradients ------------------------------------------------------------------------------------------------------


# bug 14: the sum's upstream gradient has to be added after the norm's own gradient is formed
@pytest.mark.parametrize("x, residual", [(FP32, FP32), (BF16, FP32)])
def test_upstream_gradient_of_the_sum_is_added_last(device, x, residual):
    arguments = inputs((12, 64), device, x=x, residual=residual)
    dy, dsum = torch.randn(12, 64, device=device), 100 * torch.randn(12, 64, device=device)
    both, _ = gradients(arguments, (dy, dsum))
    norm_only, _ = gradients(arguments, (dy, torch.zeros_like(dsum)))
    expected = norm_only["dresidual"].double() + dsum.double()
    parity.assert_parity("dresidual", both["dresidual"], expected, expected.to(residual))
    parity.assert_parity("dx", both["dx"], expected, expected.to(x))
    assert torch.equal(both["dweight"], norm_only["dweight"])


def test_only_one_of_the_two_outputs_is_used(device):
    arguments = inputs((12, 64), device, residual=FP32)
    dsum = torch.randn(12, 64, device=device)
    results, _ = parity.run(lambda **kw: layer_norm(**kw)[1], arguments, (dsum,))
    assert torch.equal(results["dx"], dsum) and torch.equal(results["dresidual"], dsum)
    parity.check(lambda **kw: layer_norm(**kw)[0], lambda **kw: reference.layer_norm(**kw)[0], arguments)


@pytest.mark.parametrize(
    "wanted", [("x",), ("weight",), ("bias",), ("residual",), ("x", "bias"), ("weight", "residual")]
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_some_inputs_need_no_gradient(device, wanted, dropout_p):
    arguments = inputs((10, 32), device, x=BF16, residual=FP32)
    upstream = (torch.randn(10, 32).to(BF16), torch.randn(10, 32))
    torch.manual_seed(0)
    everything, _ = gradients(arguments, upstream, dropout_p=dropout_p)
    leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in arguments.items()}
    torch.manual_seed(0)
    outputs = layer_norm(**leaves, dropout_p=dropout_p)
    used = [(out, grad.to(device)) for out, grad in zip(outputs, upstream) if out.requires_grad]
    torch.autograd.backward([out for out, _ in used], [grad for _, grad in used])
    for name, leaf in leaves.items():
        assert (leaf.grad is None) == (name not in wanted), name
        assert name not in wanted or torch.equal(leaf.grad, everything[f"d{name}"]), name


def test_no_graph_without_gradients(device):
    arguments = inputs((4, 16), device)
    assert not layer_norm(**arguments).requires_grad
    leaves = {name: tensor.requires_grad_() for name, tensor in arguments.items()}
    with torch.no_grad():
        assert not layer_norm(**leaves).requires_grad


# --- dropout --------------------------------------------------------------------------------------------------------


def keep_mask(shape, p, device):
    """What layer_norm keeps when torch's generator is where it is now."""
    ones, zeros = torch.ones(shape, device=device), torch.zeros(shape, device=device)
    _, total = layer_norm(ones, ones[..., -1, :], residual=zeros, dropout_p=p)
    return total != 0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_keep_rate(device, p):
    keep = keep_mask((256, 256), p, device).double()
    for rate, count in ((keep.mean(), 256 * 256), (keep.mean(0), 256), (keep.mean(1), 256)):
        assert ((rate - (1 - p)).abs() < 5 * (p * (1 - p) / count) ** 0.5).all()
    for across in (keep[1:] * keep[:-1], keep[:, 1:] * keep[:, :-1], keep[:, 4:] * keep[:, :-4]):
        assert abs(across.mean() - (1 - p) ** 2) < 0.02  # neighbours are independent


# bug 19: a seed that stays the same from layer to layer or step to step
def test_every_call_drops_others_and_a_seed_repeats_them(device):
    torch.manual_seed(3)
    first, second = keep_mask((8, 64), 0.5, device), keep_mask((8, 64), 0.5, device)
    torch.manual_seed(3)
    assert not torch.equal(first, second)
    assert torch.equal(keep_mask((8, 64), 0.5, device), first)


@pytest.mark.parametrize("residual, x", [(None, FP32), (None, BF16), (FP32, FP32), (FP32, BF16), (BF16, BF16)])
def test_dropout_parity_under_the_same_mask(device, residual, x, monkeypatch):
    monkeypatch.setattr(fused_layernorm, "MAX_BACKWARD_BLOCK", 64)
    p, shape = 0.3, (35, 100)
    torch.manual_seed(5)
    keep = keep_mask(shape, p, device)

    def op(**tensors):
        torch.manual_seed(5)
        return layer_norm(**tensors, dropout_p=p)

    def masked(*, x, **others):
        return reference.layer_norm(x * keep.to(x.dtype) / (1 - p), **others)

    upstream = tuple(torch.randn(shape, device=device) for _ in range(1 if residual is None else 2))
    parity.check(op, masked, inputs(shape, device, x=x, residual=residual), upstream=upstream)


def test_checkpointing_repeats_the_mask(device):
    x = torch.ones(16, 64, device=device, requires_grad=True)
    ones, zeros = torch.ones(64, device=device), torch.zeros(16, 64, device=device)
    total = checkpoint(lambda x: layer_norm(x, ones, residual=zeros, dropout_p=0.5)[1], x, use_reentrant=False)
    torch.rand(7, device=device)  # the generator has moved on when backward recomputes
    total.sum().backward()
    assert torch.equal(x.grad, total) and 0 < (total == 0).sum() < total.numel()


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_dropping_everything_and_nothing(device):
    arguments = inputs((6, 32), device, residual=FP32)
    everything, _ = gradients(arguments, dropout_p=1.0)
    assert torch.equal(everything["out1"], arguments["residual"]) and not everything["dx"].any()
    assert torch.equal(layer_norm(**arguments, dropout_p=0.0)[0], layer_norm(**arguments)[0])


# --- registration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [None, FP32])
def test_opcheck(device, residual):
    made = inputs((2, 5, 16), device, x=BF16, residual=residual)
    leaves = {name: tensor.requires_grad_() for name, tensor in made.items()}
    seed = None if residual is None else runtime.draw_seed(device)
    p = 0.0 if seed is None else 0.25
    forward = (leaves["x"], leaves["weight"], leaves["bias"], leaves.get("residual"), seed, p, 1e-5, FP32)
    torch.library.opcheck(torch.ops.fastgpt.layer_norm_fwd, forward)
    with torch.no_grad():
        y, s, mean, rstd = torch.ops.fastgpt.layer_norm_fwd(*forward)
    s, dsum = (leaves["x"].detach(), None) if residual is None else (s, torch.randn_like(s))
    backward = (torch.randn_like(y), dsum, s, made["weight"].detach(), mean, rstd, seed, p, BF16)
    wanted = (residual is None, residual is not None, True, FP32)
    torch.library.opcheck(torch.ops.fastgpt.layer_norm_bwd, (*backward, *wanted))


@pytest.mark.parametrize("x, residual", [(FP32, None), (BF16, FP32), (FP32, FP32)])
def test_compiled_equals_eager(device, x, residual):
    arguments = inputs((3, 7, 32), device, x=x, residual=residual)
    eager, upstream = gradients(arguments)
    compiled, _ = parity.run(torch.compile(layer_norm, fullgraph=True, backend="aot_eager"), arguments, upstream)
    for name, value in eager.items():
        assert torch.equal(compiled[name], value), name


def test_compiled_dropout_drops_the_same_in_backward_and_others_in_the_next_call(device):
    torch._dynamo.reset()
    op = torch.compile(layer_norm, fullgraph=True, backend="aot_eager")
    x = torch.ones(8, 64, device=device, requires_grad=True)
    ones, zeros = torch.ones(64, device=device), torch.zeros(8, 64, device=device)
    first, second = (op(x, ones, residual=zeros, dropout_p=0.5)[1] for _ in range(2))
    assert not torch.equal(first, second)
    (grad,) = torch.autograd.grad(second.sum(), x)
    assert torch.equal(grad, second)


# bug 27: a compilation for every batch size
def test_batch_sizes_share_one_compilation(device):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    op = torch.compile(layer_norm, fullgraph=True, backend=counter)
    for rows in (3, 4, 8, 17, 64):
        arguments = inputs((rows, 32), device)
        assert torch.equal(op(**arguments), layer_norm(**arguments))
    assert counter.frame_count <= 2  # the first size, then any size


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.tensor(1.0)}, r"x is \(\): its last dimension must have 1 to 16384"),
        ({"x": torch.zeros(2, 16385)}, r"x is \(2, 16385\): its last dimension"),
        ({"x": torch.zeros(4, 8, dtype=torch.float64)}, "x is torch.float64: use float32, float16 or bfloat16"),
        ({"weight": torch.ones(7)}, r"weight is \(7,\): x of \(4, 8\) needs \(8,\)"),
        ({"bias": torch.ones(4, 8)}, r"bias is \(4, 8\): x of"),
        ({"bias": torch.ones(8, dtype=torch.int64)}, "bias is torch.int64"),
        ({"residual": torch.zeros(1, 8)}, r"residual is \(1, 8\): x of .* needs \(4, 8\)"),
        ({"residual": torch.zeros(4, 8, device="meta")}, "residual is on meta: move it to"),
        ({"dropout_p": 1.5}, r"dropout_p is 1.5: it must lie in \[0, 1\]"),
        ({"out_dtype": torch.float64}, "out_dtype is torch.float64"),
    ],
)
def test_bad_arguments_are_named(device, change, message):
    change = {
        name: value.to(device) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value
        for name, value in change.items()
    }
    with pytest.raises(ValueError, match=message):
        layer_norm(**{"x": torch.zeros(4, 8, device=device), "weight": torch.ones(8, device=device)} | change)


def test_where_triton_does_not_run_the_reference_computes(device, monkeypatch):
    monkeypatch.setattr(runtime, "runs_in_triton", lambda x: False)
    arguments = {name: tensor.double() for name, tensor in inputs((5, 12), device, residual=FP32).items()}
    for got, expected in zip(layer_norm(**arguments), reference.layer_norm(**arguments)):
        assert got.dtype == torch.float64 and torch.equal(got, expected)
