"""Steps replayed as CUDA graphs are the steps run directly, bit for bit: on a GPU with graphs, on a CPU with their stand-in."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from fastgpt import ops
from fastgpt.checkpoints.rng import rng_state, set_rng_state
from fastgpt.common import UserError
from fastgpt.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, load_preset
from fastgpt.kernels import runtime
from fastgpt.kernels.fp8 import launch
from fastgpt.kernels.working_copy import existing, forget, working_copy
from fastgpt.model import GPT
from fastgpt.optim.build import build_optimizer
from fastgpt.training import graphs, loop, run
from fastgpt.training.graphs import CudaRecorder, Graphs
from fastgpt.training.step import LossScaler, Stepper
from tests.shards import write_shard
from tests.training.tape import TapeRecorder
from tests.training.test_step import Calls

USED = "CUDA graphs: the steps that follow are replayed"
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def linear(x, weight, bias=None):
    """nn.functional.linear on kept working copies, as the kernels read them; quick without a GPU."""
    dtype = runtime.compute_dtype(x)
    return F.linear(x, working_copy(weight, dtype), bias)


COPIES = replace(ops.EAGER, linear=linear)


@pytest.fixture(autouse=True)
def _without_interpreter(monkeypatch):
    """On a CPU AdamW is computed by PyTorch, which is quick, wherever a test does not want Triton's."""
    monkeypatch.setattr(runtime, "INTERPRET", False)


@pytest.fixture
def recorder(device, monkeypatch):
    return CudaRecorder(device) if device.type == "cuda" else TapeRecorder(monkeypatch)


GPT2 = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=64, bias=True)
MODERN = replace(load_preset("modern-demo").model, n_layer=2, n_embd=32, block_size=16, vocab_size=64)


def make(device, recorder=None, precision="bf16", dropout=0.0, table=COPIES, optimizer="adamw", shape=GPT2):
    torch.manual_seed(0)
    shape = replace(shape, dropout=dropout)
    model = GPT(shape, table).to(device)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3, optimizer=optimizer), "triton")
    scaler = LossScaler(device.type, enabled=precision == "fp16", init_scale=2.0**12, growth_interval=2)
    stepper = Stepper(model, model, optimizer, scaler, precision, 1.0, adds_in_place=table.name == "triton")
    if recorder is not None:
        stepper.graphs = Graphs(stepper, recorder)
    return stepper


def batches(device, step, grad_accum, rows=2, documents=False):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 64, (grad_accum, rows, 17), generator=generator).to(device)
    ids = (tokens[:, :, :-1] == 0).cumsum(-1, dtype=torch.int32)
    return [(t[:, :-1], t[:, 1:], i)[: 3 if documents else 2] for t, i in zip(tokens, ids)]


def state(stepper):
    tensors = [*stepper.model.parameters(), *stepper.optimizer.graph_tensors()]
    return [t.detach().clone() for t in tensors] + [torch.tensor(stepper.scaler.get_scale())]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def steps(stepper, device, numbers, grad_accum=2, **options):
    """Losses and norms of steps, with another learning rate each; graphs are captured when due."""
    trace = []
    for number in numbers:
        trace += stepper(batches(device, number, grad_accum, **options), grad_accum, 1e-3 * (number + 1))
        if stepper.graphs is not None and stepper.graphs.due:
            stepper.told = stepper.graphs.capture()
    return trace


def both(device, recorder, course, **options):
    """``course(stepper)`` directly and with graphs: what it returns and the final state have to agree in every bit.
    Returns the stepper with graphs."""
    ends = []
    for given in (None, recorder):
        stepper = make(device, given, **options)
        torch.manual_seed(5)
        trace = course(stepper)  # compared last: a replay must not change what an earlier step returned
        ends.append((trace, state(stepper)))
    assert same(ends[0][0], ends[1][0]), ends
    assert same(ends[0][1], ends[1][1])
    return stepper


# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize(
    ("precision", "grad_accum", "optimizer", "shape"),
    [
        ("fp32", 1, "adamw", GPT2),
        ("bf16", 2, "adamw", GPT2),
        ("fp16", 3, "adamw", GPT2),
        ("bf16", 1, "adamw", GPT2),
        ("fp16", 2, "muon", GPT2),
        ("bf16", 2, "muon", MODERN),
        ("fp16", 1, "muon", MODERN),
    ],
)
def test_replayed_steps_have_the_bits_of_steps_run_directly(device, recorder, precision, grad_accum, optimizer, shape):
    """The learning rate changes with every step; the loss scale (fp16) grows on the device."""

    def course(stepper):
        return steps(stepper, device, range(4), grad_accum)

    stepper = both(device, recorder, course, precision=precision, optimizer=optimizer, shape=shape)
    assert stepper.told.startswith(USED) and stepper.graphs.active


def test_with_the_triton_kernels_documents_and_dropout(device, recorder, monkeypatch):
    """A replay draws the masks that the step run directly would have drawn."""
    monkeypatch.setattr(runtime, "INTERPRET", device.type == "cpu")

    def course(stepper):
        return steps(stepper, device, range(2), documents=True, rows=1)

    assert both(device, recorder, course, table=ops.get("triton"), dropout=0.2).graphs.active


@pytest.mark.usefixtures("needs_fp8")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of a capture's NaN in the interpreter
def test_weights_in_fp8_are_made_once_per_step(device, recorder, monkeypatch):
    """By the graph of its first micro-batch, for the later ones."""
    monkeypatch.setattr(runtime, "INTERPRET", device.type == "cpu")
    made, quantise = [], launch.quantise_weight
    monkeypatch.setattr(launch, "quantise_weight", lambda weight: (made.append(1), quantise(weight))[1])
    table = ops.get("triton", "fp8")
    if device.type == "cpu":  # only what is tested here is interpreted
        eager = ("attention", "qkv_attention", "linear_cross_entropy", "embedding")
        table = replace(table, **{name: getattr(ops.EAGER, name) for name in eager})

    def course(stepper):
        return steps(stepper, device, range(1), 3)

    stepper = both(
        device, recorder, lambda s: [*course(s), *steps(s, device, range(1, 3), 3)], table=table, precision="fp8"
    )
    assert stepper.graphs.active
    made.clear()
    course(stepper)
    linears = 4
    assert len(made) == (linears if device.type == "cpu" else 0), "Python does not run in a replay on a GPU"


def test_plain_dropout_masks_go_on_where_training_left_them(device, recorder):
    assert both(device, recorder, lambda s: steps(s, device, range(4)), dropout=0.5).graphs.active


def test_an_overflow_skips_the_step_halves_the_scale_and_is_counted(device, recorder):
    def course(stepper):
        trace = steps(stepper, device, range(3))
        stepper.scaler._scale.fill_(2.0**120)
        overflown = steps(stepper, device, range(3, 4))
        stepper.scaler._scale.fill_(2.0**12)
        return [*trace, overflown[0], *steps(stepper, device, range(4, 6))]

    stepper = both(device, recorder, course, precision="fp16")
    assert stepper.skipped_steps() == 1 and stepper.graphs.active


def test_a_replayed_step_reads_nothing_back(device, recorder):
    stepper = make(device, recorder, precision="fp16")
    steps(stepper, device, range(1))
    with Calls() as calls:
        for number in (1, 2):
            stepper(batches(device, number, 2), 2, 1e-3 * number)
    assert calls.reads == [] and stepper.graphs.active


def test_the_model_is_up_to_date_between_steps(device, recorder):
    """Evaluation runs directly, on working copies that the captured update wrote. Weights have new versions: whatever else was
    made from them is out of date."""

    def course(stepper):
        losses, versions = [], set()
        for number in range(4):
            steps(stepper, device, [number])
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                losses.append(stepper.model.eval()(*batches(device, 9, 1, rows=3)[0])[1])
            stepper.model.train()
            weight = stepper.model.transformer.h[0].mlp.c_fc.weight
            assert weight.grad is None and torch.equal(existing(weight), weight.bfloat16())
            versions.add(weight._version)
        assert len(versions) == 4
        return losses

    assert both(device, recorder, course, table=replace(COPIES, mlp=mlp)).graphs.active


def mlp(x, w_fc, b_fc, w_proj, b_proj):
    return linear(F.gelu(linear(x, w_fc, b_fc), approximate="tanh"), w_proj, b_proj)


# ---------------------------------------------------------------- what changes on the way


def test_another_geometry_is_captured_anew(device, recorder, monkeypatch):
    """With the AdamW kernels: the tables of addresses that the first graph uses serve the second, too."""
    monkeypatch.setattr(runtime, "INTERPRET", device.type == "cpu")

    def course(stepper):
        first = steps(stepper, device, range(2), grad_accum=1, rows=4)
        return [*first, *steps(stepper, device, range(2, 4), grad_accum=2, rows=2)]

    assert both(device, recorder, course).graphs.active
    if isinstance(recorder, TapeRecorder):
        assert recorder.captures == 2 + 3  # of one micro-batch, and of two


def test_a_micro_batch_of_another_shape_within_a_step(device, recorder):
    def course(stepper):
        trace = steps(stepper, device, range(2), grad_accum=3)
        mixed = [*batches(device, 7, 1), *batches(device, 8, 1, rows=1), *batches(device, 9, 1)]
        trace += stepper(mixed, 3, 1e-3)
        return [*trace, *steps(stepper, device, range(2, 4), grad_accum=3)]

    assert both(device, recorder, course).graphs.active


def test_going_back_to_a_checkpoint(device, recorder):
    """load_state_dict replaces the moments that the graphs know, and raises the weights' versions."""

    def course(stepper):
        trace = steps(stepper, device, range(2))
        parts = (stepper.model, stepper.optimizer, stepper.scaler)
        saved = [copy.deepcopy(part.state_dict()) for part in parts]
        trace += steps(stepper, device, range(2, 4))
        for part, values in zip(parts, saved):
            part.load_state_dict(values)
        return [*trace, *steps(stepper, device, range(4, 7))]

    assert both(device, recorder, course, precision="fp16").graphs.active


@pytest.mark.parametrize("copies", ["written past", "forgotten"])
def test_a_weight_that_somebody_else_writes(device, recorder, copies):
    def course(stepper):
        trace = steps(stepper, device, range(3))
        weight = stepper.model.transformer.h[0].attn.c_attn.weight
        with torch.no_grad():
            weight.data.mul_(1.5) if copies == "forgotten" else weight.mul_(1.5)
        forget(weight)
        return [*trace, *steps(stepper, device, range(3, 6))]

    assert both(device, recorder, course).graphs.active


def test_a_step_abandoned_between_two_micro_batches_leaves_no_trace(device, recorder):
    def course(stepper):
        trace = steps(stepper, device, range(2))
        rng = rng_state()

        def cut_off():
            yield batches(device, 2, 2)[0]
            raise InterruptedError

        with pytest.raises(InterruptedError):
            stepper(cut_off(), 2, 1e-3)
        stepper.optimizer.zero_grad(set_to_none=True)  # what Run.rewind does
        set_rng_state(rng)
        return [*trace, *steps(stepper, device, range(2, 4))]

    assert both(device, recorder, course, dropout=0.5).graphs.active


def test_hooks_run_so_graphs_do_not(device, recorder):
    seen = []

    def course(stepper):
        trace = steps(stepper, device, range(2))
        bias = stepper.model.transformer.h[0].attn.c_attn.bias
        handle = bias.register_hook(lambda grad: seen.append(1))
        trace += steps(stepper, device, range(2, 4))
        assert stepper.graphs is None or not (stepper.graphs.active or stepper.graphs.due)
        handle.remove()
        return [*trace, *steps(stepper, device, range(4, 6))]

    assert both(device, recorder, course).graphs.active
    assert len(seen) == 2 * 4


def test_tensors_that_change_with_every_step_end_it(device, recorder, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_CAPTURES", 2)
    stepper = make(device, recorder)
    for number in range(4):
        steps(stepper, device, [number])
        stepper.optimizer.load_state_dict(copy.deepcopy(stepper.optimizer.state_dict()))
    assert stepper.told == (
        "CUDA graphs are not used: the step's tensors were replaced 2 times; training goes on without"
    )
    assert not stepper.graphs.due


# ---------------------------------------------------------------- what fails


@pytest.mark.parametrize("which", [1, 2, 3], ids=["first micro-batch", "later one", "update"])
def test_a_capture_that_fails_costs_nothing(device, recorder, monkeypatch, which):
    """Out of memory, say. The run is the same as without, and it is not tried again."""
    record, calls = type(recorder).record, []

    def failing(self, work, pool):
        def fail(*_):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB. GPU 0 has ...")

        def broken():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(LossScaler, "update", fail)  # between the optimizer's step and the loss scale's
                work()
            fail()

        calls.append(work)
        return record(self, broken if len(calls) == which else work, pool)

    monkeypatch.setattr(type(recorder), "record", failing)
    stepper = both(device, recorder, lambda s: steps(s, device, range(3)), precision="fp16", dropout=0.5)
    assert stepper.told == "CUDA graphs are not used: CUDA out of memory; training goes on without"
    assert len(calls) == which and not stepper.graphs.active and not stepper.graphs.due


def test_an_operation_that_cannot_be_captured(device, recorder):
    def course(stepper):
        model = stepper.model

        def forward(x, y):
            loss = model(x, y)[1]
            return None, loss * (1.0 if loss.item() > 0 else 2.0)

        stepper.forward = forward
        return steps(stepper, device, range(3))

    stepper = both(device, recorder, course)
    assert stepper.told.startswith("CUDA graphs are not used: ") and stepper.told.endswith("training goes on without")


def test_a_replay_that_differs_is_noticed(device, recorder):
    """A number from Python is fixed in the graph."""
    stepper = make(device, recorder)
    model, calls = stepper.model, []

    def forward(x, y):
        calls.append(1)
        return None, model(x, y)[1] * len(calls)

    stepper.forward = forward
    steps(stepper, device, range(2))
    assert stepper.told.startswith(
        "CUDA graphs are not used: a replayed micro-step differs from the same one run directly"
    )
    assert not stepper.graphs.active and all(p.grad is None for p in model.parameters())


def test_a_learning_rate_on_the_host_is_not_captured(device, recorder):
    stepper = make(device, recorder)
    optimizer, elsewhere = stepper.optimizer, "meta" if device.type == "cpu" else "cpu"
    optimizer.param_groups[0]["lr"] = torch.tensor(1e-3, device=device)
    optimizer.sync_hyperparameters()
    optimizer.param_groups[0]["lr"] = torch.tensor(1e-3, device=elsewhere)
    with pytest.raises(RuntimeError, match=f"lr is a tensor on {elsewhere}: a graph would not see it change"):
        recorder.record(lambda: [optimizer.sync_hyperparameters()], recorder.pool())


# ---------------------------------------------------------------- --cuda-graphs


@pytest.fixture
def config(tmp_path):
    """A run of a few steps on this file's bytes."""
    text = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).to(torch.int32).numpy()
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "train.bin", text[:3000])
    write_shard(tmp_path / "data" / "val.bin", text[3000:4000])
    return Config(
        model=ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=256, dropout=0.1),
        data=DataConfig(data=str(tmp_path / "data"), tokenizer="bytes", batch_size=2, grad_accum=2),
        train=TrainConfig(
            precision="bf16", max_iters=6, eval_interval=3, eval_iters=1, checkpoint_interval=3, log_interval=1
        ),
    )


def test_on_without_a_gpu_is_said_before_anything_is_written(config, tmp_path):
    settings = replace(config.train, cuda_graphs="on", out=tmp_path / "run")
    with pytest.raises(UserError, match=r"^cuda_graphs is 'on' but device is 'cpu'"):
        loop.train(replace(config, train=settings), CPU, Console(quiet=True))
    assert not settings.out.exists()


@pytest.fixture
def graphed(config, recorder, monkeypatch):
    """The configuration of a run with graphs, by quick operations."""
    monkeypatch.setattr(run, "get_ops", lambda *_: COPIES)
    monkeypatch.setattr(graphs, "CudaRecorder", lambda device: recorder)
    monkeypatch.setattr(run, "use_graphs", lambda asked, *_: asked == "on")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return config


def test_an_evaluation_that_does_not_fit_beside_the_graphs_ends_them(graphed, device, tmp_path, monkeypatch, capsys):
    runs = []

    def evaluate(state, *_):
        if state.stepper.graphs.active:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB. GPU 0 has ...")
        runs.append(state.step)
        return 1.0

    monkeypatch.setattr(loop, "evaluate", evaluate)
    settings = replace(graphed.train, cuda_graphs="on", out=tmp_path / "run")
    end, code = loop.train(replace(graphed, train=settings), device)
    assert code == 0 and runs == [0, 3, 6] and not end.stepper.graphs.due
    out = capsys.readouterr().out
    assert out.count("CUDA graphs are not used: evaluation does not fit beside them; training goes on without") == 1
    assert out.count(USED) == 1


def test_the_loop_captures_says_so_and_trains_the_same(graphed, device, tmp_path, monkeypatch, capsys):
    """With an evaluation, a checkpoint and memory that runs out on the way."""
    real = Stepper.__call__

    def step(self, given, grad_accum, lr, *momentum):
        def limited():
            for x, y in given:
                if len(x) > 1 and int(self.optimizer.state[self.model.head].get("step", 0)) == 4:
                    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB. GPU 0 has ...")
                yield x, y

        return real(self, limited(), grad_accum, lr, *momentum)

    monkeypatch.setattr(Stepper, "__call__", step)
    ends = {}
    for asked in ("off", "on"):
        settings = replace(graphed.train, cuda_graphs=asked, out=tmp_path / asked)
        ends[asked], code = loop.train(replace(graphed, train=settings), device)
        assert code == 0
        assert capsys.readouterr().out.count(USED) == (2 if asked == "on" else 0)  # again at the smaller micro-batch
    assert ends["on"].stepper.graphs.active and ends["on"].best_val_loss == ends["off"].best_val_loss
    assert same(state(ends["off"].stepper), state(ends["on"].stepper))
