"""What holds for every registered operator.

Its fake says of its results (sizes, strides, dtypes) what it gives, whatever the strides of its inputs: code that torch.compile
made from a fake reads the real tensor by them. And it refuses tensors that do not fit together, as its kernels go by address.
"""

from __future__ import annotations

import pkgutil
from functools import partial
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastgpt import kernels
from fastgpt.kernels import embedding, layer_norm, linear, linear_cross_entropy, linear_gelu, mlp
from fastgpt.kernels.fp8 import launch
from fastgpt.kernels.fp8 import ops as fp8
from fastgpt.kernels.working_copy import copies_kept, gradients_in_place, working_copy
from fastgpt.optim.adamw import FusedAdamW
from tests.kernels.test_fused_linear import in_tiles

BF16 = torch.bfloat16


class Recorder(TorchDispatchMode):
    """The first call of each of our operators."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "fastgpt":
            self.calls.setdefault(op, args)
        return op(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def calls(device):
    """Of every operator, with gradients for everything and all options that other code has."""

    def leaf(*shape, dtype=torch.float32):
        return nn.Parameter(torch.randn(shape, device=device).to(dtype))

    def train(outputs):
        torch.autograd.backward([out.float().sum() for out in tree_leaves(outputs)])

    x, residual, ids = leaf(2, 16, 32, dtype=BF16), leaf(2, 16, 32), torch.arange(32, device=device).view(2, 16)
    w, v, b, c, wpe = leaf(64, 32), leaf(32, 64), leaf(64), leaf(32), leaf(16, 32)
    heads = [leaf(2, 16, 2, 16) for _ in range(3)]
    with Recorder() as recorder, gradients_in_place():
        for _ in range(2):  # then there are gradients to add to
            train(embedding(ids, w, wpe, dropout_p=0.1))
            train(linear_gelu(x, w, b))
            train(linear(x, w, b, residual=leaf(2, 16, 64), dropout_p=0.1))
            train(linear(x, w, b))
            c.sum().backward()
        with copies_kept():
            working_copy(w, BF16)
            FusedAdamW([w, c]).step()
        train(layer_norm(x, c, c, residual=residual, dropout_p=0.1))
        factors = {"scale": leaf(), "x0_scale": leaf(1)}
        train(kernels.rms_norm(x, c, residual=residual, x0=leaf(2, 16, 32), dropout_p=0.1, **factors))
        train(kernels.attention(*heads))
        train(kernels.qkv_attention(leaf(2, 16, 3 * 32, dtype=BF16), 2))
        cos, sin, position = torch.rand(20, 8, device=device), torch.rand(20, 8, device=device), ids[:, 0] * 0
        values = {"ve": leaf(2, 16, 32), "gate": leaf(2, 16, 2)}
        train(kernels.qk_norm_rope(leaf(2, 16, 3 * 32, dtype=BF16), 2, 2, cos, sin, position=position, **values))
        train(mlp(x, w, b, v, c, residual=residual))
        train(kernels.linear_relu2(x, w, b))
        for reduction in ("mean", "none"):
            train(linear_cross_entropy(x, w, ids, bias=b, reduction=reduction))
        if launch.refusal(device) is None:
            train(fp8.linear(x, w, b))
            train(fp8.mlp(x, w, b, v, c))
    return recorder.calls


def transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() > 1 else t


def every_other(t: Tensor) -> Tensor:
    """Its neighbours in memory are itself, for operators that take an input for contiguous as only they make it."""
    wide = t.new_empty(*t.shape, 2)
    wide.copy_(t[..., None].expand(wide.shape))
    return wide[..., 0]


def rows_apart(t: Tensor) -> Tensor:
    wide = t.new_empty(*t.shape[:-1], 2, t.shape[-1]) if t.dim() else t[None]
    wide.copy_(t[..., None, :].expand(wide.shape) if t.dim() else wide)
    return wide.select(-2, 0) if t.dim() else t


def expanded(t: Tensor) -> Tensor:
    """The gradient of a sum: every element is one in memory."""
    return t.flatten()[:1].expand(t.shape) if t.dim() and t.numel() else t


def turned(t: Tensor) -> Tensor:
    """Its first dimension is the last in memory."""
    return t.movedim(0, -1).contiguous().movedim(-1, 0) if t.dim() else t


def description(result: Tensor) -> tuple:
    strides = [stride for size, stride in zip(result.shape, result.stride()) if size > 1 and result.numel()]
    return tuple(result.shape), strides, result.dtype, result.device


LAYOUTS = (torch.clone, transposed, every_other, rows_apart, expanded, turned)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_fakes_are_true(calls, layout):
    returning = {op for op in calls if op._schema.returns}
    for op in returning:
        lay_out = partial(tree_map_only, Tensor, lambda t: layout(t.detach()) if t.is_floating_point() else t)
        written = [argument.alias_info is not None and layout is expanded for argument in op._schema.arguments]
        args = [arg if whole else lay_out(arg) for arg, whole in zip(calls[op], written)]
        with FakeTensorMode() as mode:
            told = tree_leaves(op(*tree_map_only(Tensor, mode.from_tensor, args)))
        given = tree_leaves(op(*args))
        assert [description(t) for t in told] == [description(t) for t in given], op


MATCHING = {
    "layer_norm_fwd": ("weight", "bias", "residual"),
    "layer_norm_bwd": ("dy", "s", "weight", "mean", "rstd"),
    "rms_norm_fwd": ("weight", "residual", "x0"),
    "rms_norm_bwd": ("dy", "s", "weight", "residual", "x0", "rstd"),
    "attention_fwd": ("k", "v"),
    "attention_bwd": ("grad_out", "k", "v", "out", "lse"),
    "qkv_attention_bwd": ("grad_out", "out", "lse"),
    "qk_norm_rope_fwd": ("cos_columns", "sin", "positions", "ve", "gate"),
    "qk_norm_rope_bwd": ("y", "rstd", "cos_columns", "sin", "positions", "ve", "gate"),
    "embedding_fwd": ("wte_columns", "wpe"),
    "embedding_bwd": ("ids",),
    "embedding_bwd_add": ("ids", "wte_grad_columns", "wpe_grad_columns"),
    "linear_fwd": ("x_columns", "copy_columns", "bias", "residual"),
    "linear_gelu_fwd": ("x_columns", "bias"),
    "linear_bwd_input": ("dz_columns", "weight_rows"),
    "linear_bwd_input_gelu": ("dz", "weight", "pre"),
    "linear_bwd_weight": ("dz", "x"),
    "linear_bwd_weight_add": ("grad", "dz", "x"),
    "pointwise_bwd": ("pre",),
    "linear_cross_entropy_fwd": ("x", "target"),
    "linear_cross_entropy_bwd": ("grad", "stats", "x_rows", "target"),
    "linear_cross_entropy_fwd_bwd": ("x", "target"),
    "linear_fp8_fwd": ("q", "stats_columns", "w_columns", "w_stats_columns", "bias"),
    "linear_fp8_mlp_fwd": ("q", "stats_columns", "fc_columns", "fc_stats_columns", "b_fc", "proj_columns", "b_proj"),
    "linear_fp8_bwd_input": ("q", "stats_columns", "wt_rows", "wt_stats_columns"),
    "linear_fp8_bwd_input_gelu": ("q", "stats_columns", "wt", "wt_stats_columns", "pre"),
    "adamw_": ("grads", "exp_avgs", "exp_avg_sqs", "copies"),
}
"""Arguments whose size follows from that of others: each of their dimensions, or the rows or columns alone."""


def halves(name: str, t: Tensor):
    """``t`` with one of its dimensions cut in half."""
    dims = {"rows": [0], "columns": [t.dim() - 1]}.get(name.rpartition("_")[2], range(t.dim()))
    return [t.detach().narrow(dim, 0, t.shape[dim] // 2).clone() for dim in dims if t.shape[dim] > 1]


@pytest.mark.parametrize("engine", ["triton", "cublas"])
@pytest.mark.parametrize("name", MATCHING)
def test_what_does_not_fit_together_is_refused(calls, name, engine, monkeypatch):
    if engine == "triton":
        in_tiles(monkeypatch, 16, 32, 16)
    op = getattr(torch.ops.fastgpt, name).default
    if op not in calls:
        pytest.skip("not on this device")
    names = [argument.name for argument in op._schema.arguments]
    for wanted in MATCHING[name]:
        at = names.index(wanted.removesuffix("_rows").removesuffix("_columns"))
        given = calls[op][at]
        shorter = [[half] for half in halves(wanted, given[0])] if isinstance(given, list) else halves(wanted, given)
        assert shorter, wanted
        for value in shorter:
            args = [value if i == at else arg for i, arg in enumerate(calls[op])]
            with pytest.raises((ValueError, RuntimeError)) as refused:
                op(*args)
            assert "Interpreter" not in type(refused.value).__name__, "no kernel may find it out"


def test_all_operators_are_here(calls, device):
    for module in pkgutil.iter_modules(kernels.__path__):
        import_module(f"fastgpt.kernels.{module.name}")
    named = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("fastgpt::")}
    known = {name for name in named if not name.startswith("fastgpt::test_")}  # those that other tests make
    missing = known - {op._schema.name for op in calls}
    assert missing == set() if launch.refusal(device) is None else all("fp8" in name for name in missing)
