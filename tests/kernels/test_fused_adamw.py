"""The AdamW kernels: parity with torch.optim.AdamW, clip, skip, rounding, and memory that must not be touched."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from bench.parity import assert_parity
from fastgpt.kernels import fused_adamw, runtime
from fastgpt.kernels.fused_adamw import Step, adamw_

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [(), (1,), (0, 3), (7,), (31, 33), (33001,), (3, 5, 2)]  # (33001,) is more than one chunk anywhere
LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.999), 1e-8, 0.1


def hyper_table(device, max_grad_norm=float("inf"), lr=LR, decay=DECAY, groups=1):
    return torch.tensor([[lr, *BETAS, EPS, decay, max_grad_norm]] * groups, dtype=torch.float64, device=device)


def make_step(params, grads, max_grad_norm=float("inf"), lr=LR, decay=DECAY, **options):
    """A Step on fresh state; ``options`` replace its fields."""
    device = params[0].device
    fields = {
        "params": params,
        "grads": grads,
        "exp_avgs": [torch.zeros_like(p, dtype=FP32) for p in params],
        "exp_avg_sqs": [torch.zeros_like(p, dtype=FP32) for p in params],
        "steps": [torch.zeros((), device=device) for _ in params],
        "copies": [],
        "copy_of": [],
        "group_of": [0] * len(params),
        "hyper": hyper_table(device, max_grad_norm, lr, decay),
        "grad_scale": None,
        "found_inf": None,
        "grad_norm": torch.full((), -1.0, device=device),
        "skipped": torch.zeros((), dtype=torch.int64, device=device),
        "seed": 7,
    }
    return Step(**(fields | options))


def tensors(device, dtype=FP32, shapes=SHAPES):
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def torch_adamw(params, grads_per_step, dtype, max_grad_norm=None, round_to=None):
    """torch.optim.AdamW in ``dtype``: (params, exp_avgs, exp_avg_sqs, norm of the last step). ``round_to``: parameters are
    rounded to it after every step, as parameters of that dtype with fp32 state would be."""
    params = [torch.nn.Parameter(p.detach().to(dtype, copy=True)) for p in params]
    optimizer = torch.optim.AdamW(params, LR, BETAS, EPS, DECAY)
    for grads in grads_per_step:
        for p, g in zip(params, grads):
            p.grad = g.to(dtype, copy=True)
        norm = torch.nn.utils.get_total_norm([p.grad for p in params])
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, max_grad_norm)
        optimizer.step()
        if round_to is not None:
            for p in params:
                p.data.copy_(p.data.to(round_to))
    states = [optimizer.state[p] for p in params]
    return [p.detach() for p in params], [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], norm


@pytest.fixture(params=["triton", "pytorch"])
def path(request, monkeypatch):
    """Both ways the op computes: in Triton, and in plain PyTorch as on a CPU without the interpreter."""
    if request.param == "pytorch":
        monkeypatch.setattr(runtime, "runs_in_triton", lambda x: False)
    return request.param


@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 1e6], ids=lambda value: f"clip={value}")
@pytest.mark.parametrize(
    ("param_dtype", "grad_dtype"),
    [(FP32, FP32), (FP32, BF16), (FP32, FP16), (FP16, FP16)],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_three_steps_equal_torch_adamw(device, path, param_dtype, grad_dtype, max_grad_norm):
    params = tensors(device, param_dtype)
    grads_per_step = [tensors(device, grad_dtype) for _ in range(3)]
    round_to = None if param_dtype == FP32 else param_dtype
    want = torch_adamw(params, grads_per_step, torch.float64, max_grad_norm)
    theirs = torch_adamw(params, grads_per_step, FP32, max_grad_norm, round_to)
    step = make_step(params, grads_per_step[0], max_grad_norm or float("inf"))
    for grads in grads_per_step:
        adamw_(*step._replace(grads=grads))
    for i, shape in enumerate(SHAPES):
        assert_parity(f"param {shape}", params[i], want[0][i], theirs[0][i].to(param_dtype))
        assert_parity(f"exp_avg {shape}", step.exp_avgs[i], want[1][i], theirs[1][i])
        assert_parity(f"exp_avg_sq {shape}", step.exp_avg_sqs[i], want[2][i], theirs[2][i])
        assert step.steps[i] == 3
    assert_parity("norm", step.grad_norm, want[3], theirs[3])


@settings(max_examples=12, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=5),
    grad_dtype=st.sampled_from([FP32, BF16]),
    seed=st.integers(0, 99),
)
def test_any_list_of_shapes(device, shapes, grad_dtype, seed):
    torch.manual_seed(seed)
    params, grads = tensors(device, shapes=shapes), tensors(device, grad_dtype, shapes)
    want, theirs = (torch_adamw(params, [grads], dtype, 1.0) for dtype in (torch.float64, FP32))
    adamw_(*make_step(params, grads, 1.0))
    for i, shape in enumerate(shapes):
        assert_parity(f"param {shape} of {shapes}", params[i], want[0][i], theirs[0][i])


def test_each_group_has_its_hyperparameters(device, path):
    params, grads = tensors(device, shapes=[(5,)] * 3), tensors(device, shapes=[(5,)] * 3)
    apart = copy.deepcopy(params)
    hyper = torch.cat((hyper_table(device), hyper_table(device, lr=0.5, decay=0.0)))
    adamw_(*make_step(params, grads, group_of=[0, 1, 0], hyper=hyper))
    adamw_(*make_step([apart[0], apart[2]], [grads[0], grads[2]]))
    adamw_(*make_step([apart[1]], [grads[1]], lr=0.5, decay=0.0))
    assert all(torch.equal(p, q) for p, q in zip(params, apart))


# ---------------------------------------------------------------- what is touched


@pytest.mark.parametrize("offset", [16, 17], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_nothing_outside_the_tensors_is_read_or_written(device, dtype, offset):  # bugs 2 and 6
    sizes = [1, 2, 3, 127, 1025, 33001]
    guarded, bare = [], []
    values = [torch.randn(5, size, device=device).to(dtype) for size in sizes]
    for row, row_dtype in enumerate((dtype, dtype, FP32, FP32, BF16)):  # p, g, m, v and the working copy
        buffers = []
        for value in values:
            buffer = torch.full((value.shape[1] + 48,), float("nan"), dtype=row_dtype, device=device)
            buffer[offset:][: value.shape[1]] = value[row].abs() if row == 3 else value[row]
            buffers.append(buffer)
        guarded.append(buffers)
        bare.append([value[row].abs().to(row_dtype) if row == 3 else value[row].to(row_dtype) for value in values])
    inside = [[b[offset:][:size] for b, size in zip(buffers, sizes)] for buffers in guarded]
    for p, g, m, v, working in (inside, bare):
        of = list(range(len(sizes))) if dtype == FP32 else []
        step = make_step(p, g, exp_avgs=m, exp_avg_sqs=v, copies=working if of else [], copy_of=of)
        adamw_(*step)
        assert step.skipped == 0  # a NaN from outside would have reached the norm
    for buffers, views, plain in zip(guarded, inside, bare):
        for buffer, view, value in zip(buffers, views, plain):
            assert torch.equal(view, value)
            assert buffer[:offset].isnan().all() and buffer[offset + len(view) :].isnan().all()


def test_gradients_are_left_alone(device, path):
    params, grads = tensors(device), tensors(device)
    before = copy.deepcopy(grads)
    adamw_(*make_step(params, grads, 0.1, grad_scale=torch.full((), 8.0, device=device)))
    assert all(torch.equal(g, b) for g, b in zip(grads, before))


def test_working_copies_are_the_rounded_parameters(device, path):
    params, grads = tensors(device), tensors(device)
    copies = [torch.empty_like(params[i], dtype=dtype) for i, dtype in ((0, BF16), (3, FP16), (5, BF16), (6, FP16))]
    adamw_(*make_step(params, grads, copies=copies, copy_of=[0, 3, 5, 6]))
    for i, working in zip((0, 3, 5, 6), copies):
        assert torch.equal(working, params[i].to(working.dtype))


def test_versions_are_raised(device):
    """Triton's writes are invisible to autograd: the op has to raise the version of all it writes."""
    params, working = tensors(device, shapes=[(4,), (5,)]), [torch.zeros(4, dtype=BF16, device=device)]
    step = make_step(params, tensors(device, shapes=[(4,), (5,)]), copies=working, copy_of=[0])
    written = [*params, *step.exp_avgs, *step.exp_avg_sqs, *step.steps, *working, step.grad_norm, step.skipped]
    before = [t._version for t in written]
    adamw_(*step)
    assert all(t._version > version for t, version in zip(written, before))
    assert all(g._version == 0 for g in step.grads)


# ---------------------------------------------------------------- scale, clip, skip


@pytest.mark.adversarial
def test_grad_scale_divides(device, path):
    params, grads = tensors(device), tensors(device)
    scaled = copy.deepcopy(params)
    plain = make_step(params, grads, 0.5)
    adamw_(*plain)
    step = make_step(scaled, [g * 1024 for g in grads], 0.5, grad_scale=torch.full((), 1024.0, device=device))
    adamw_(*step)
    assert torch.equal(step.grad_norm, plain.grad_norm)
    assert all(torch.equal(p, q) for p, q in zip(params, scaled))


@pytest.mark.parametrize("reason", ["inf", "nan", "found_inf"])
def test_a_step_without_finite_gradients_changes_nothing_and_is_counted(device, path, reason):
    params, grads = tensors(device), tensors(device)
    working = [params[3].to(BF16)]
    step = make_step(params, grads, 1.0, copies=working, copy_of=[3])
    adamw_(*step)
    state = (step.params, step.exp_avgs, step.exp_avg_sqs, step.steps, step.copies)
    before = copy.deepcopy(state)
    if reason == "found_inf":
        bad = step._replace(found_inf=torch.ones((), device=device))
    else:
        bad = step._replace(grads=[g.clone() for g in grads])
        bad.grads[5].view(-1)[-1] = float(reason)
    adamw_(*bad)
    assert step.skipped == 1
    for now, then in zip(state, before):
        assert all(torch.equal(a, b) for a, b in zip(now, then))
    adamw_(*step._replace(found_inf=torch.zeros((), device=device)))
    assert step.skipped == 1 and step.steps[0] == 2
    assert not torch.equal(step.params[3], before[0][3])


def test_a_skipped_first_step_leaves_no_nan(device, path):
    params = tensors(device)
    step = make_step(params, tensors(device), found_inf=torch.ones((), device=device))
    adamw_(*step)
    adamw_(*step._replace(found_inf=None))
    assert all(p.isfinite().all() for p in params) and step.steps[0] == 1


# ---------------------------------------------------------------- bf16 parameters


def test_stochastic_rounding_is_unbiased_between_the_two_neighbours(device, path):
    n = 40_000
    params, grads = [torch.ones(n, dtype=BF16, device=device)], [torch.ones(n, dtype=BF16, device=device)]
    adamw_(*make_step(params, grads, lr=1e-3, decay=0.0))  # 1 - 0.001; bf16 has 1 and 1 - 2^-8
    low = 1 - 2**-8
    assert set(params[0].float().unique().tolist()) == {low, 1.0}
    share, expected = (params[0] == low).float().mean().item(), 1e-3 * 2**8
    assert abs(share - expected) < 5 * (expected * (1 - expected) / n) ** 0.5


def test_rounding_differs_by_step_tensor_and_seed_and_repeats(device):  # bug 19
    n = 4096

    def outcome(seed=7, steps_taken=0.0, tensor=0):
        params = [torch.ones(n, dtype=BF16, device=device) for _ in range(2)]
        grads = [torch.ones(n, dtype=BF16, device=device) for _ in range(2)]
        step = make_step(params, grads, lr=2e-3, decay=0.0, seed=seed)
        for i, m in enumerate(step.steps):  # moments of a constant gradient of 1, so that every step is the same update
            m.fill_(steps_taken)
            step.exp_avgs[i].fill_(1 - 0.9**steps_taken)
            step.exp_avg_sqs[i].fill_(1 - 0.999**steps_taken)
        adamw_(*step)
        return params[tensor] == 1

    first = outcome()
    assert torch.equal(first, outcome())
    for other in (outcome(seed=8), outcome(seed=7 + 2**33), outcome(steps_taken=1.0), outcome(tensor=1)):
        assert 0.4 < (first == other).float().mean() < 0.6
    # No repeats within a tensor either: the four numbers of a Philox call, and neighbouring calls.
    for shift in (1, 2, 3, 4, 1024, 2048):
        assert 0.4 < (first == first.roll(shift)).float().mean() < 0.6


def test_tiny_updates_move_bf16_weights(device, path):  # bug 22
    params, grads = [torch.ones(4096, dtype=BF16, device=device)], [torch.ones(4096, dtype=BF16, device=device)]
    step = make_step(params, grads, lr=1e-5, decay=0.0)
    for _ in range(20):
        adamw_(*step)
    assert abs(params[0].float().mean().item() - (1 - 20e-5)) < 1e-4


def test_infinite_nan_and_unmoved_bf16_weights_stay(device, path):
    values = torch.tensor([float("inf"), -float("inf"), 3e38, 0.1, -0.0, float("nan")], device=device).to(BF16)
    params, grads = [values.clone()], [torch.ones_like(values)]
    adamw_(*make_step(params, grads, lr=0.0, decay=0.0))
    assert torch.equal(params[0][:-1], values[:-1]) and params[0][-1].isnan()


# ---------------------------------------------------------------- launches


class Counting:
    """Stands in for a kernel and counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


def test_three_launches_whatever_the_number_of_tensors_and_groups(device, monkeypatch):
    kernels = []
    for name in ("_sum_squares_kernel", "_prepare_kernel", "_adamw_kernel"):
        kernels.append(Counting(getattr(fused_adamw, name)))
        monkeypatch.setattr(fused_adamw, name, kernels[-1])
    shapes = [(i,) for i in range(1, 31)] + [(20_000,)]
    n = len(shapes)
    step = make_step(tensors(device, shapes=shapes), tensors(device, shapes=shapes))
    step = step._replace(group_of=[i % 2 for i in range(n)], hyper=hyper_table(device, groups=2))
    adamw_(*step)
    assert [kernel.launches for kernel in kernels] == [1, 1, 1]
    params = [p.to(BF16) if i % 2 else p for i, p in enumerate(step.params)]  # two dtypes: two of the chunked ones
    adamw_(*step._replace(params=params))
    assert [kernel.launches for kernel in kernels] == [3, 2, 3]


def test_only_moved_gradients_are_sent_again(device, monkeypatch):
    built, sent = [], []
    monkeypatch.setattr(fused_adamw, "_plans", OrderedDict())  # CUDA's allocator gives earlier tests' addresses again
    make, pin = fused_adamw.Plan.__init__, fused_adamw.pinned
    monkeypatch.setattr(fused_adamw.Plan, "__init__", lambda self, *args: built.append(1) or make(self, *args))
    params = tensors(device)
    step = make_step(params, tensors(device))
    adamw_(*step)
    monkeypatch.setattr(fused_adamw, "pinned", lambda *args: sent.append(1) or pin(*args))
    adamw_(*step)
    assert (len(built), len(sent)) == (1, 0)
    moved = step._replace(grads=[g * 2 for g in step.grads])
    adamw_(*moved)
    assert (len(built), len(sent)) == (1, 1)
    assert step.steps[0] == 3
    theirs, want = (
        torch.nn.utils.get_total_norm([g.to(dtype) for g in moved.grads]) for dtype in (FP32, torch.float64)
    )
    assert_parity("norm", moved.grad_norm, want, theirs)


def test_first_call_equals_second_call_bit_for_bit(device):  # bugs 18 and 23
    params, grads = tensors(device), tensors(device)
    twice = []
    for _ in range(2):
        step = make_step([p.clone() for p in params], [g.clone() for g in grads], 0.5)
        adamw_(*step)
        twice.append([*step.params, *step.exp_avgs, *step.exp_avg_sqs, step.grad_norm])
    assert all(torch.equal(a, b) for a, b in zip(*twice))


class NoHostRead(TorchDispatchMode):
    """Fails on what brings a value to the host, which on a GPU waits for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default), func
        return func(*args, **(kwargs or {}))


def test_no_value_is_brought_to_the_host(device):
    scalar = torch.ones((), device=device)
    for launch in (fused_adamw._launch, fused_adamw._reference):
        step = make_step(tensors(device), tensors(device), 0.5, grad_scale=scalar, found_inf=scalar - 1)
        launch(step)  # a new set of tensors has its table built on the host
        with NoHostRead():
            launch(step)
        assert step.skipped == 0


# ---------------------------------------------------------------- torch.library


def op_arguments(device):
    params = tensors(device, shapes=[(5,), (), (0, 3), (7, 9)])
    scalar = torch.ones((), device=device)
    step = make_step(params, tensors(device, shapes=[(5,), (), (0, 3), (7, 9)]), 1.0, copies=[params[0].to(BF16)])
    return step._replace(copy_of=[0], grad_scale=scalar, found_inf=scalar - 1)


def test_opcheck(device):
    torch.library.opcheck(adamw_, op_arguments(device))
    torch.library.opcheck(adamw_, op_arguments(device)._replace(grad_scale=None, found_inf=None))


def test_compiled_equals_eager(device):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*step):
        adamw_(*step)
        return step[0][0] + 1  # reads what the op has written

    step = op_arguments(device)
    eager = copy.deepcopy(step)
    result = compiled(*step)
    adamw_(*eager)
    assert torch.equal(result, eager.params[0] + 1)
    for got, want in zip((step.params, step.exp_avgs, step.copies), (eager.params, eager.exp_avgs, eager.copies)):
        assert all(torch.equal(a, b) for a, b in zip(got, want))
