"""The cached low-precision copy of a parameter: when it is reused, when rebuilt, and that it leaves no trace in a module."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgpt.kernels import linear, runtime
from fastgpt.kernels import working_copy as module
from fastgpt.kernels.working_copy import captured_reads, copies_kept, existing, forget, mark_fresh, working_copy
from fastgpt.optim.adamw import FusedAdamW

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _kept(request):
    """As in our own loop, but where a test is about others'."""
    if "anybodys" in request.node.name:
        yield
        return
    with copies_kept():
        yield


@pytest.fixture
def param(device):
    return nn.Parameter(torch.randn(8, 6, device=device))


def test_value_gradient_and_dtype(param):
    out = working_copy(param, BF16)
    assert out.dtype == BF16 and torch.equal(out, param.to(BF16))
    upstream = torch.randn_like(out)
    out.backward(upstream)
    assert param.grad.dtype == torch.float32 and torch.equal(param.grad, upstream.float())


def test_the_parameter_itself_if_it_has_the_dtype(param):
    assert working_copy(param, torch.float32) is param
    assert existing(param) is None


def test_micro_batches_share_one_cast_and_accumulate(param):
    first = working_copy(param, BF16)
    second = working_copy(param, BF16)
    assert first.data_ptr() == second.data_ptr()
    assert first.grad_fn is not second.grad_fn  # two graphs, so that both can run backward
    first.sum().backward()
    second.sum().backward()
    assert torch.equal(param.grad, torch.full_like(param, 2.0))
    assert not existing(param).requires_grad


def test_without_grad_mode_no_graph(param):
    with torch.inference_mode():
        working_copy(param, BF16)
    with torch.no_grad():
        assert not working_copy(param, BF16).requires_grad
    x = torch.randn(2, 6, device=param.device).to(BF16).requires_grad_()
    (x @ working_copy(param, BF16).t()).sum().backward()  # saves the copy: no tensor of inference mode may be kept
    assert param.grad is not None
    param.requires_grad_(False)
    assert not working_copy(param, BF16).requires_grad


def writers():
    def torch_optimizer(p):
        p.grad = torch.ones_like(p)
        torch.optim.AdamW([p], lr=0.1).step()

    def in_place(p):
        with torch.no_grad():
            p.mul_(3)

    def load_state_dict(p):
        owner = nn.Module()
        owner.p = p
        owner.load_state_dict({"p": torch.randn_like(p)})

    def init(p):
        nn.init.normal_(p)

    def other_storage(p):
        p.data = torch.randn_like(p)

    return [torch_optimizer, in_place, load_state_dict, init, other_storage]


@pytest.mark.parametrize("write", writers(), ids=lambda f: f.__name__)
def test_rebuilt_after_any_other_writer(param, write):
    working_copy(param, BF16)
    write(param)
    assert existing(param) is None
    assert torch.equal(working_copy(param, BF16), param.to(BF16))


class ThroughData(torch.optim.SGD):
    """Writes no parameter in a way that its version counts, as apex's and bitsandbytes' kernels."""

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            p.data.add_(p.grad, alpha=-self.param_groups[0]["lr"])


class Averaged(FusedAdamW):
    """Ours, after which the weights are exchanged for their average."""

    def step(self):
        before = [p.detach().clone() for p in self.param_groups[0]["params"]]
        super().step()
        for p, average in zip(self.param_groups[0]["params"], before):
            p.data.lerp_(average, 0.5)


class Clamped(FusedAdamW):
    def step(self):
        super().step()
        for p in self.param_groups[0]["params"]:
            other = p.detach().clamp(-0.1, 0.1).contiguous()
            if p.device.type == "cpu":
                ctypes.memmove(p.data_ptr(), other.data_ptr(), other.nbytes)  # a kernel of somebody's own
            else:
                p.data.copy_(other)


OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9, foreach=True),
    "adam": torch.optim.Adam,
    "adamw foreach": partial(torch.optim.AdamW, foreach=True),
    "adamw fused": partial(torch.optim.AdamW, fused=True),
    "nadam": torch.optim.NAdam,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "through .data": ThroughData,
    "averaged": Averaged,
    "a kernel": Clamped,
    "ours": FusedAdamW,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_anybodys_loop_computes_with_the_weights_that_its_optimizer_left(device, optimizer):
    weight = nn.Parameter(torch.randn(16, 8, device=device))
    optimizer = OPTIMIZERS[optimizer]([weight], lr=0.1)
    x = torch.randn(4, 8, device=device)
    with copies_kept():  # a step of our own loop came before: its copy is there
        working_copy(weight, BF16)
        weight.grad = torch.ones_like(weight)
        FusedAdamW([weight]).step()
    for _ in range(2):
        with torch.autocast(device.type, BF16):
            y = linear(x, weight)
        assert torch.equal(y, F.linear(x.to(BF16), weight.to(BF16)))
        optimizer.zero_grad()
        y.square().sum().backward()
        before = weight.detach().clone()
        optimizer.step()
        assert not torch.equal(weight, before)


@pytest.mark.parametrize("optimizer", ["through .data", "ours", "sgd"])
def test_each_step_of_our_loop_trusts_what_it_cast_itself_or_what_our_optimizer_wrote(device, optimizer):
    weight = nn.Parameter(torch.randn(16, 8, device=device))
    optimizer, places = OPTIMIZERS[optimizer]([weight], lr=0.1), []
    for _ in range(3):
        module._scope = None  # each step opens one of its own
        with copies_kept():
            first, second = working_copy(weight, BF16), working_copy(weight, BF16)
            assert first.data_ptr() == second.data_ptr() and torch.equal(first, weight.to(BF16))
            places.append(existing(weight))
            weight.grad = torch.ones_like(weight)
            optimizer.step()
    once = all(place is places[0] for place in places)
    assert once == isinstance(optimizer, FusedAdamW), "FusedAdamW's copy is never cast again"


def test_anybodys_use_outside_of_a_step_keeps_nothing(param):
    assert working_copy(param, BF16).data_ptr() != working_copy(param, BF16).data_ptr()
    assert existing(param) is None
    with copies_kept():
        working_copy(param, BF16)
        with copies_kept():
            assert existing(param) is not None, "one that is open stays"
    assert existing(param) is None


def test_mark_fresh_and_forget(param):
    working_copy(param, BF16)
    with torch.no_grad():
        param.mul_(3)
    mark_fresh(param)
    assert existing(param) is not None  # the caller's word is taken
    forget(param)
    assert existing(param) is None
    assert torch.equal(working_copy(param, BF16), param.to(BF16))
    mark_fresh(nn.Parameter(torch.zeros(2)))  # nothing there: nothing to do


def test_another_dtype_replaces_the_copy(param):
    working_copy(param, BF16)
    assert torch.equal(working_copy(param, torch.float16), param.to(torch.float16))
    assert existing(param).dtype == torch.float16


def test_strides_are_kept(device):
    param = nn.Parameter(torch.randn(8, 6, device=device).t())
    assert working_copy(param, BF16).stride() == param.stride()


def test_no_trace_in_module_state_deepcopy_or_pickle(device):
    layer = nn.Linear(4, 3).to(device)
    working_copy(layer.weight, BF16)
    assert list(layer.state_dict()) == ["weight", "bias"]
    twin = copy.deepcopy(layer)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (twin, torch.load(buffer, weights_only=False)):
        assert existing(other.weight) is None
        assert working_copy(other.weight, BF16).data_ptr() != existing(layer.weight).data_ptr()


def test_dies_with_its_parameter(device):
    gc.collect()  # what other tests have left
    before = len(module._copies)
    param = nn.Parameter(torch.randn(4, device=device))
    working_copy(param, BF16)
    assert len(module._copies) == before + 1
    del param
    gc.collect()
    assert len(module._copies) == before


def test_plain_casts_where_caching_would_be_wrong(param, monkeypatch):
    doubled = param * 2  # not a leaf
    assert torch.equal(working_copy(doubled, BF16), doubled.to(BF16)) and existing(doubled) is None
    plain = torch.randn_like(param)
    assert torch.equal(working_copy(plain, BF16), plain.to(BF16)) and existing(plain) is None
    monkeypatch.setattr(module, "enabled", False)
    assert torch.equal(working_copy(param, BF16), param.to(BF16)) and existing(param) is None


class Cast(nn.Module):
    def __init__(self, param):
        super().__init__()
        self.weight = param

    def forward(self, x):
        return x @ working_copy(self.weight, BF16).t()


def test_functional_call(param):
    layer, x = Cast(param), torch.randn(2, 6, device=param.device).to(BF16)
    working_copy(param, BF16)
    other = torch.randn_like(param)
    out = torch.func.functional_call(layer, {"weight": other}, (x,))
    assert torch.equal(out, x @ other.to(BF16).t())
    gradient = torch.func.grad(lambda w: torch.func.functional_call(layer, {"weight": w}, (x,)).float().sum())(other)
    assert gradient.dtype == torch.float32 and gradient.shape == other.shape


def test_compiled_equals_eager(param):
    layer, x = Cast(param), torch.randn(2, 6, device=param.device).to(BF16)
    layer(x).sum().backward()
    eager, param.grad = param.grad, None
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert torch.equal(param.grad, eager)
    with torch.no_grad():
        param.mul_(2)
    assert torch.equal(compiled(x), layer(x))  # the compiled graph has not kept a copy


def test_backward_through_a_copy_that_a_step_has_overwritten_is_an_error(param):
    x = torch.randn(2, 6, device=param.device).to(BF16).requires_grad_()
    out = Cast(param)(x)
    param.grad = torch.ones_like(param)
    FusedAdamW([param]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_capture_casts_unless_its_owner_looks_after_the_copies(param, monkeypatch):
    copy = working_copy(param, BF16)
    monkeypatch.setattr(runtime, "capturing", lambda device: True)
    assert working_copy(param, BF16).data_ptr() != copy.data_ptr()
    with captured_reads() as captures:
        assert working_copy(param, BF16).data_ptr() == copy.data_ptr()
        assert [read.data_ptr() for read in captures.reads] == [copy.data_ptr()]
        with torch.no_grad():
            param.mul_(2)
        stale = working_copy(param, BF16)  # cast within the graph, and not kept: a capture has computed nothing
        assert torch.equal(stale, param.to(BF16)) and len(captures.reads) == 1 and existing(param) is None
    assert working_copy(param, BF16).data_ptr() != copy.data_ptr()
