"""What is decided before a run is built: the micro-batch that fits, CUDA graphs. Loss spikes: told from noise, silent until
there is something to compare with."""

import math
import random
from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastgpt.checkpoints import rng
from fastgpt.common import UserError
from fastgpt.config import OptimConfig, load_preset
from fastgpt.performance import fitting
from fastgpt.training import run
from fastgpt.training.distributed import World
from fastgpt.training.run import SPIKE_WINDOW, choose_geometry, use_graphs, zscore

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
GB = 10**9


@pytest.fixture
def config():
    return load_preset("gpt2-124m", "cuda")


def asked(config, **data):
    return replace(config, data=replace(config.data, **data))


@pytest.mark.parametrize(("free", "largest"), [(11 * GB, 16), (8 * GB, 16), (5 * GB, 8)])
def test_an_automatic_batch_takes_the_most_that_fits_at_the_same_tokens(config, monkeypatch, free, largest):
    monkeypatch.setattr(fitting, "free_bytes", lambda kind: free)
    chosen = choose_geometry(asked(config, auto_batch=True), CUDA, World())
    assert chosen.tokens_per_step == config.tokens_per_step == 524288
    assert 1 <= chosen.data.batch_size <= largest
    more = asked(config, batch_size=2 * chosen.data.batch_size, grad_accum=chosen.data.grad_accum // 2)
    smaller = choose_geometry(asked(more, auto_batch=True), CUDA, World())
    assert smaller.data == replace(chosen.data, auto_batch=True)  # whatever one starts from


def test_a_micro_batch_that_cannot_fit_is_refused_with_what_would(config, monkeypatch):
    monkeypatch.setattr(fitting, "free_bytes", lambda kind: 6 * GB)
    large = asked(config, batch_size=64, grad_accum=8)
    with pytest.raises(UserError, match=r"batch_size is 64.*--batch-size \d+ --grad-accum \d+ fits"):
        choose_geometry(large, CUDA, World())
    unchecked = replace(large, train=replace(large.train, doctor=False))
    assert choose_geometry(unchecked, CUDA, World()) == unchecked
    with pytest.raises(
        UserError, match=r"batch_size is 64: it needs about \d\d.* GB \(triton, fp32\) of the 6.0 GB free: --batch"
    ):
        choose_geometry(large, CPU, World())
    with pytest.raises(UserError, match=r"micro_batch is 1 and does not fit: .* 5.7 GB usable"):
        choose_geometry(replace(large, model=replace(large.model, n_layer=48)), CPU, World())


def test_what_fits_is_left_alone(config, monkeypatch):
    monkeypatch.setattr(fitting, "free_bytes", lambda kind: 12 * GB)
    assert choose_geometry(config, CUDA, World()) == config


# ---- --cuda-graphs


def test_on_is_refused_where_it_cannot_be():
    for arguments, reason in (
        ((CPU, "triton", False, 1), "device is 'cpu': use --device cuda"),
        ((CUDA, "eager", False, 1), "kernels is 'eager': use --kernels triton"),
        ((CUDA, "triton", True, 1), "compile is on: leave out --compile"),
        ((CUDA, "triton", False, 2), "the run has 2 ranks: use one"),
    ):
        with pytest.raises(UserError, match=f"^cuda_graphs is 'on' but {reason}, or --cuda-graphs off$"):
            use_graphs("on", *arguments)
        assert not use_graphs("auto", *arguments) and not use_graphs("off", *arguments)
    for warmup in ({"batch_warmup_iters": 3}, {"window_warmup_iters": 3}):
        with pytest.raises(
            UserError, match="_iters changes steps, which a graph repeats: leave it out, or --cuda-graphs"
        ):
            use_graphs("on", CUDA, "triton", False, 1, OptimConfig(**warmup))
    assert use_graphs("on", CUDA, "triton", False, 1)


def test_auto_waits_for_a_measurement(monkeypatch):
    assert not use_graphs("auto", CUDA, "triton", False, 1)
    monkeypatch.setattr(run, "AUTOMATIC", True)
    assert use_graphs("auto", CUDA, "triton", False, 1) and not use_graphs("auto", CPU, "triton", False, 1)


# ---- loss spikes


def noise(n, seed=0):
    draw = random.Random(seed)
    return [draw.gauss(3.0, 0.1) for _ in range(n)]


def window(losses=()):
    return deque(losses, maxlen=SPIKE_WINDOW)


def test_silent_until_the_window_is_full_then_measures_in_standard_deviations():
    last = window()
    assert [zscore(last, loss) for loss in noise(SPIKE_WINDOW)] == [None] * SPIKE_WINDOW
    mean = math.fsum(last) / SPIKE_WINDOW
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in last) / SPIKE_WINDOW)
    assert zscore(last, mean + 7 * deviation) == (mean + 7 * deviation - mean) / deviation


def test_noise_is_no_spike_and_a_jump_is():
    last = window(noise(SPIKE_WINDOW))
    assert max(zscore(last, loss) for loss in noise(500, seed=1)) < 5
    assert zscore(last, 4.5) > 8


def test_what_is_not_finite_never_joins_and_a_flat_window_says_nothing():
    last = window([1.0] * SPIKE_WINDOW)
    assert zscore(last, math.nan) is None and zscore(last, math.inf) is None
    assert list(last) == [1.0] * SPIKE_WINDOW
    assert zscore(last, 2.0) is None


# ---- a checkpoint's values


def saved():
    return {
        "run": "abc",
        "spikes": [3.5, 4],
        "interval_losses": [3.5, math.nan],
        "eval_due": False,
        "rng": rng.rng_state(),
        "scaler": {},
        "metrics": 1234,
        "loader": {"position": 3, "seed": 1, "windows": 9, "block_size": 8, "order": 2},
        "geometry": {"asked": [8, 1], "used": [4, 2]},
    }


def test_what_a_run_saves_is_taken_and_so_is_a_converted_checkpoint():
    run.check_saved(saved(), Path("run"))
    run.check_saved({}, Path("run"))


WRONG = {
    "run": [3],
    "spikes": [{}, ["a"], [math.nan]],
    "rng": [
        [],
        {},
        {"cpu": "x"},
        {"cpu": torch.zeros(4, dtype=torch.uint8)},
        {**rng.rng_state(), "cuda": torch.zeros(3)},
    ],
    "interval_losses": [{}, ["a"]],
    "eval_due": [1],
    "scaler": [1],
    "metrics": ["all", -1, 1.5],
    "loader": [
        5,
        {},
        *({**saved()["loader"], **one} for one in ({"position": "3"}, {"seed": -1}, {"position": 2**70})),
    ],
    "geometry": [
        [8, 1],
        *({"asked": [8, 1], **one} for one in ({}, {"used": [0, 8]}, {"used": [8]}, {"used": [4.0, 2]})),
    ],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_value_of_another_kind_is_refused_before_the_run_is_built(name, value):
    with pytest.raises(UserError, match=f"^checkpoint run has {name} .*which no run of fastgpt writes") as error:
        run.check_saved({**saved(), name: value}, Path("run"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("preset", "compiled", "why"),
    [
        ("demo", False, "a GPT-2 has no windows"),
        ("modern-demo", True, "compile is on, which would compile each window"),
    ],
)
def test_a_warmup_of_windows_is_refused_where_there_are_none_or_all_would_be_compiled(preset, compiled, why):
    config = load_preset(preset)
    optim, settings = (
        replace(config.optim, window_warmup_iters=5),
        replace(config.train, kernels="eager", compile=compiled),
    )
    with pytest.raises(UserError, match=f"^window_warmup_iters is 5 but {why}: leave it out$"):
        run.build(replace(config, optim=optim, train=settings), CPU)
