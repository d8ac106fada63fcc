"""FusedAdamW as a torch.optim.Optimizer: a drop-in for torch.optim.AdamW."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from bench.parity import assert_parity
from fastgpt.kernels import runtime
from fastgpt.kernels.working_copy import copies_kept, existing, working_copy
from fastgpt.optim.adamw import FusedAdamW
from tests.kernels.test_fused_adamw import NoHostRead

SHAPES = [(), (5,), (7, 9), (3, 0), (1,)]


def parameters(device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]


def set_grads(params, seed):
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


def groups(params):
    return [{"params": params[:2], "lr": 0.05, "weight_decay": 0.5}, {"params": params[2:], "betas": (0.5, 0.9)}]


def train(optimizer, params, steps, first=0, max_grad_norm=None, scheduler=None):
    for i in range(first, first + steps):
        set_grads(params, i)
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(params, max_grad_norm)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def assert_same_as_torch(params, run):
    """``run(params)`` trains with torch.optim.AdamW; compare with what it makes of fp64 and of fp32 parameters."""
    wide, plain = parameters(params[0].device, torch.float64), parameters(params[0].device)
    run(wide)
    run(plain)
    for shape, p, p64, theirs in zip(SHAPES, params, wide, plain):
        assert_parity(f"parameter {shape}", p.detach(), p64, theirs.detach())


@pytest.fixture(params=["triton", "pytorch"])
def path(request, monkeypatch):
    if request.param == "pytorch":
        monkeypatch.setattr(runtime, "runs_in_triton", lambda x: False)


def test_defaults_and_arguments_are_those_of_torch(device):
    ours = inspect.signature(FusedAdamW.__init__).parameters
    for name, parameter in inspect.signature(torch.optim.AdamW.__init__).parameters.items():
        assert ours[name].default == parameter.default and ours[name].kind == parameter.kind, name
    params = parameters(device)
    assert FusedAdamW(params).state_dict() == torch.optim.AdamW(params).state_dict()


def test_groups_scheduler_and_clip_as_in_torch(device, path):
    def schedule(optimizer):
        return LambdaLR(optimizer, lambda step: 1 / (1 + step))

    params = parameters(device)
    optimizer = FusedAdamW(groups(params), max_grad_norm=0.7)
    train(optimizer, params, 4, scheduler=schedule(optimizer))

    def run(params):
        optimizer = torch.optim.AdamW(groups(params))
        train(optimizer, params, 4, max_grad_norm=0.7, scheduler=schedule(optimizer))

    assert_same_as_torch(params, run)


@pytest.mark.parametrize("direction", ["ours to ours", "ours to torch", "torch to ours"])
def test_state_dict_travels(device, direction):
    source, target = direction.split(" to ")
    make = {"ours": FusedAdamW, "torch": torch.optim.AdamW}
    params = parameters(device)
    first = make[source](groups(params))
    train(first, params, 2)
    moved = parameters(device, seed=1)
    second = make[target]([{"params": moved[:2]}, {"params": moved[2:]}])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with torch.no_grad():
        for p, q in zip(moved, params):
            p.copy_(q)
    train(second, moved, 2, first=2)
    assert_same_as_torch(moved, lambda params: train(torch.optim.AdamW(groups(params)), params, 4))
    if direction == "ours to ours":
        train(first, params, 2, first=2)
        assert all(torch.equal(p, q) for p, q in zip(params, moved))


def test_from_optimizer_takes_over(device):
    params = parameters(device)
    old = torch.optim.AdamW(groups(params))
    scheduler = LambdaLR(old, lambda step: 1 / (1 + step))
    train(old, params, 2, scheduler=scheduler)
    new = FusedAdamW.from_optimizer(old, max_grad_norm=100.0)
    assert new.max_grad_norm == 100.0
    train(new, params, 2, first=2, scheduler=scheduler)

    def run(params):
        optimizer = torch.optim.AdamW(groups(params))
        train(optimizer, params, 4, scheduler=LambdaLR(optimizer, lambda step: 1 / (1 + step)))

    assert_same_as_torch(params, run)
    with pytest.raises(TypeError, match="optimizer is a SGD"):
        FusedAdamW.from_optimizer(torch.optim.SGD(params, 0.1))


@pytest.mark.parametrize("name", ["amsgrad", "maximize"])
def test_amsgrad_and_maximize_are_refused(device, name):
    params = parameters(device)
    message = f"{name} is True: FusedAdamW implements AdamW without {name}"
    with pytest.raises(ValueError, match=message):
        FusedAdamW(params, **{name: True})
    with pytest.raises(ValueError, match=message):
        FusedAdamW([{"params": params, name: True}])
    theirs = torch.optim.AdamW(params, **{name: True})
    with pytest.raises(ValueError, match=message):
        FusedAdamW.from_optimizer(theirs)
    ours = FusedAdamW(params)
    with pytest.raises(ValueError, match=message):
        ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0][name] is False


def stepped(*shapes, device, names=None):
    """torch's AdamW after a step over such parameters."""
    params = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.AdamW(list(zip(names, params)) if names else params)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda state: state.update(exp_avg=torch.zeros(9, 4)),
            r"exp_avg of parameter 0 is \(9, 4\), and must be \(8, 4\)",
        ),
        (lambda state: state.update(exp_avg=torch.zeros(4, 4)), r"exp_avg of parameter 0 is \(4, 4\)"),  # fewer rows
        (lambda state: state.update(exp_avg_sq=torch.zeros(4)), r"exp_avg_sq of parameter 0 is \(4,\)"),  # broadcasts
        (lambda state: state.update(step=torch.zeros(2)), r"step of parameter 0 is \(2,\), and must be \(\)"),
        (
            lambda state: state.pop("exp_avg_sq"),
            "parameter 0 has no exp_avg_sq, but step, exp_avg: load the state of an",
        ),
    ],
    ids=["more rows", "fewer rows", "broadcast", "steps", "another optimizer"],
)
def test_a_state_that_does_not_fit_is_refused_before_anything_is_replaced(device, edit, message):
    theirs = stepped((8, 4), (3,), device=device)
    ours = FusedAdamW.from_optimizer(theirs)
    before = copy.deepcopy(ours.state_dict())
    edit(theirs.state[theirs.param_groups[0]["params"][0]])
    bad = theirs.state_dict()
    bad["param_groups"][0]["lr"] = 0.5
    with pytest.raises(ValueError, match=message):
        ours.load_state_dict(bad)
    with pytest.raises(ValueError, match=message.replace("parameter 0", "a parameter")):
        FusedAdamW.from_optimizer(theirs)
    after = ours.state_dict()
    assert all(torch.equal(after["state"][i][key], value) for i in (0, 1) for key, value in before["state"][i].items())
    assert after["param_groups"] == before["param_groups"]


def test_a_state_of_parameters_in_another_order_or_number_is_refused(device):
    ours = FusedAdamW.from_optimizer(stepped((8, 4), (3,), device=device))
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 is \(3,\)"):
        ours.load_state_dict(stepped((3,), (8, 4), device=device).state_dict())
    with pytest.raises(ValueError, match="doesn't match the size"):
        ours.load_state_dict(stepped((8, 4), device=device).state_dict())
    named = FusedAdamW([("a", nn.Parameter(torch.ones(2))), ("b", nn.Parameter(torch.ones(2)))])
    with pytest.raises(ValueError, match="the state is of b where the optimizer has a"):
        named.load_state_dict(stepped((2,), (2,), device=device, names="ba").state_dict())


def test_moments_that_were_exchanged_by_hand_are_refused(device):
    params = parameters(device)
    optimizer = FusedAdamW(params)
    train(optimizer, params, 1)
    rows = params[1].shape[0]
    optimizer.state[params[1]]["exp_avg"] = torch.zeros_like(params[1])[: rows // 2]  # its strides are the parameter's
    set_grads(params, 1)
    with pytest.raises(ValueError, match="exp_avg of a parameter is"):
        optimizer.step()


def test_memory_that_suffices_for_one_moment_leaves_no_half_of_a_state(device, monkeypatch):
    params = parameters(device)
    optimizer, zeros_like, made = FusedAdamW(params), torch.zeros_like, []

    def no_room_for_the_second(*args, **options):
        made.append(args)
        if len(made) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return zeros_like(*args, **options)

    set_grads(params, 0)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch, "zeros_like", no_room_for_the_second)
        optimizer.step()
    train(optimizer, params, 1)
    assert all(len(optimizer.state[p]) == 3 for p in params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": float("inf")}, "lr is inf: give a number >= 0 that is finite"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\)"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
    ],
)
def test_bad_hyperparameters_are_refused(device, options, message):
    with pytest.raises(ValueError, match=message):
        FusedAdamW(parameters(device), **options)


def test_tensors_that_it_cannot_update_are_refused(device):
    with pytest.raises(ValueError, match="complex64"):
        FusedAdamW([nn.Parameter(torch.zeros(2, dtype=torch.complex64, device=device))])
    gaps = nn.Parameter(torch.zeros(4, 4, device=device)[:, :2])
    gaps.grad = torch.ones_like(gaps)
    with pytest.raises(ValueError, match="dense"):
        FusedAdamW([gaps]).step()
    sparse = nn.Parameter(torch.zeros(4, 4, device=device))
    sparse.grad = torch.eye(4, device=device).to_sparse()
    with pytest.raises(RuntimeError, match="dense gradients"):
        FusedAdamW([sparse]).step()


def test_closure_and_parameters_without_gradients(device):
    params = parameters(device)
    optimizer = FusedAdamW(params)
    assert optimizer.grad_norm is None
    assert optimizer.step() is None and optimizer.grad_norm == 0
    before = copy.deepcopy(params)

    def closure():
        optimizer.zero_grad()
        loss = params[2].square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert torch.equal(loss, before[2].square().sum())
    assert [torch.equal(p, q) for p, q in zip(params, before)] == [True, True, False, True, True]
    assert list(optimizer.state) == [params[2]]
    first_norm = optimizer.grad_norm
    kept = first_norm.clone()
    optimizer.step(closure)
    assert torch.equal(first_norm, kept) and not torch.equal(optimizer.grad_norm, kept)  # a new tensor each step


def test_strides_of_parameters_and_gradients(device, path):
    """Transposed parameters, transposed gradients, and one expanded from a scalar, as .sum().backward() makes it."""

    def strided(dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(3, 6, 4, generator=generator).to(device, dtype)
        params = [nn.Parameter(base[0].t()), nn.Parameter(base[1].clone()), nn.Parameter(base[2].clone())]
        params[0].grad = torch.randn(4, 6, generator=generator).to(device, dtype)
        params[1].grad = torch.randn(4, 6, generator=generator).to(device, dtype).t()
        params[2].grad = torch.full((), 0.3, dtype=dtype, device=device).expand(6, 4)
        return params

    params, wide, theirs = strided(), strided(torch.float64), strided()
    assert not params[0].is_contiguous() and not params[1].grad.is_contiguous()
    FusedAdamW(params).step()
    torch.optim.AdamW(wide).step()
    torch.optim.AdamW(theirs).step()
    for i in range(3):
        assert_parity(f"parameter {i}", params[i].detach(), wide[i], theirs[i].detach())


def test_added_group_and_learning_rate_as_float_or_tensor(device):
    params = parameters(device)
    lr = torch.tensor(0.05, device=device)
    optimizer = FusedAdamW(params[:3], lr=lr)
    train(optimizer, params, 1)
    optimizer.add_param_group({"params": params[3:], "lr": 0.01})
    train(optimizer, params, 1, first=1)
    lr.fill_(0.02)
    optimizer.param_groups[1]["lr"] = 0.5
    train(optimizer, params, 1, first=2)

    def run(params):
        optimizer = torch.optim.AdamW(params[:3], lr=0.05)
        train(optimizer, params, 1)
        optimizer.add_param_group({"params": params[3:], "lr": 0.01})
        train(optimizer, params, 1, first=1)
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 0.02, 0.5
        train(optimizer, params, 1, first=2)

    assert_same_as_torch(params, run)


def test_fp64_parameters_are_updated_in_fp64(device):
    params, theirs = parameters(device, torch.float64), parameters(device, torch.float64)
    train(FusedAdamW(params), params, 3)
    train(torch.optim.AdamW(theirs), theirs, 3)
    for p, q in zip(params, theirs):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)


def test_bf16_parameters_keep_fp32_moments_through_load_state_dict(device, path):  # bug 22
    params = parameters(device, torch.bfloat16)
    optimizer = FusedAdamW(params)
    train(optimizer, params, 3)
    saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
    loaded = FusedAdamW(copy.deepcopy(params))
    loaded.load_state_dict(saved)
    for p, q in zip(params, loaded.param_groups[0]["params"]):
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert loaded.state[q][key].dtype == torch.float32
            assert torch.equal(loaded.state[q][key], optimizer.state[p][key])
    # Rounding goes by (seed, step, element), so a resumed run is the same run.
    if runtime.runs_in_triton(params[0]):
        train(optimizer, params, 1, first=3)
        train(loaded, loaded.param_groups[0]["params"], 1, first=3)
        assert all(torch.equal(p, q) for p, q in zip(params, loaded.param_groups[0]["params"]))


def test_pickle_and_deepcopy(device):
    params = parameters(device)
    optimizer = FusedAdamW(params, max_grad_norm=0.5)
    train(optimizer, params, 1)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.max_grad_norm == 0.5
        theirs = twin.param_groups[0]["params"]
        mine = copy.deepcopy(params)
        reference = FusedAdamW(mine, max_grad_norm=0.5)
        reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(twin, theirs, 1, first=1)
        train(reference, mine, 1, first=1)
        assert all(torch.equal(p, q) for p, q in zip(theirs, mine))


def test_grad_scaler(device, path):
    params, theirs = parameters(device), parameters(device)
    optimizer = FusedAdamW(params, max_grad_norm=0.5)
    reference = FusedAdamW(theirs, max_grad_norm=0.5)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)

    def loss(params, factor):
        return sum((p * (i + 1) * factor).sin().sum() for i, p in enumerate(params))

    for factor in (1.0, float("inf"), 2.0):
        optimizer.zero_grad()
        reference.zero_grad()
        scaler.scale(loss(params, factor)).backward()
        if factor == 2.0:
            scaler.unscale_(optimizer)  # step must then not unscale again
        scaler.step(optimizer)
        scaler.update()
        if factor != float("inf"):
            loss(theirs, factor).backward()
            reference.step()
            assert torch.equal(optimizer.grad_norm, reference.grad_norm)
    assert scaler.get_scale() == 512.0 and optimizer.skipped_steps == 1
    assert all(state["step"] == 2 for state in optimizer.state.values())
    assert all(torch.equal(p, q) for p, q in zip(params, theirs))


@copies_kept()
def test_working_copies_are_written_in_the_same_pass(device, path):
    params = parameters(device)
    optimizer = FusedAdamW(params)
    copies = [working_copy(params[1], torch.bfloat16), working_copy(params[2], torch.float16)]
    addresses = [c.data_ptr() for c in copies]
    del copies
    train(optimizer, params, 2)
    for p, address in zip(params[1:3], addresses):
        assert existing(p).data_ptr() == address and torch.equal(existing(p), p.to(existing(p).dtype))
    assert existing(params[0]) is None


@copies_kept()
def test_a_skipped_step_does_not_pass_off_a_stale_copy_as_fresh(device):
    params = parameters(device)
    optimizer = FusedAdamW(params)
    working_copy(params[1], torch.bfloat16)
    set_grads(params, 0)
    with torch.no_grad():
        params[1].mul_(2)
    params[0].grad.fill_(float("nan"))
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(working_copy(params[1], torch.bfloat16), params[1].to(torch.bfloat16))


def test_step_brings_no_value_to_the_host(device):
    params = parameters(device)
    optimizer = FusedAdamW(groups(params), max_grad_norm=1.0)
    train(optimizer, params, 1)
    set_grads(params, 1)
    optimizer.grad_scale = torch.ones((), device=device)
    optimizer.found_inf = torch.zeros((), device=device)
    optimizer.param_groups[0]["lr"] = 0.1
    with NoHostRead():
        optimizer.step()


def test_a_captured_step_follows_the_learning_rate(device):
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    params, theirs = parameters(device), parameters(device)
    optimizer, reference = FusedAdamW(params, max_grad_norm=1.0), FusedAdamW(theirs, max_grad_norm=1.0)
    static = [torch.zeros_like(p) for p in params]

    def fill(step):
        set_grads(theirs, step)
        for grad, p in zip(static, theirs):
            grad.copy_(p.grad)

    for p, grad in zip(params, static):
        p.grad = grad
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fill(0)
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    reference.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step, lr in enumerate((1e-3, 1e-1, 1e-2), start=1):
        fill(step)
        optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = lr
        optimizer.sync_hyperparameters()
        graph.replay()
        reference.step()
        assert all(torch.equal(p, q) for p, q in zip(params, theirs))
