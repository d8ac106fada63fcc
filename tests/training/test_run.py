"""What is decided before a run is built: the micro-batch that fits."""

from dataclasses import replace

import pytest
import torch

from fastgpt.common import UserError
from fastgpt.config import load_preset
from fastgpt.training import run
from fastgpt.training.distributed import World
from fastgpt.training.run import choose_geometry

CUDA = torch.device("cuda")
GB = 10**9


@pytest.fixture
def config():
    return load_preset("gpt2-124m", "cuda")


def asked(config, **data):
    return replace(config, data=replace(config.data, **data))


@pytest.mark.parametrize(("free", "largest"), [(11 * GB, 16), (8 * GB, 16), (5 * GB, 8)])
def test_an_automatic_batch_takes_the_most_that_fits_at_the_same_tokens(config, monkeypatch, free, largest):
    monkeypatch.setattr(run, "free_bytes", lambda kind: free)
    chosen = choose_geometry(asked(config, auto_batch=True), CUDA, World())
    assert chosen.tokens_per_step == config.tokens_per_step == 524288
    assert 1 <= chosen.data.batch_size <= largest
    more = asked(config, batch_size=2 * chosen.data.batch_size, grad_accum=chosen.data.grad_accum // 2)
    smaller = choose_geometry(asked(more, auto_batch=True), CUDA, World())
    assert smaller.data == replace(chosen.data, auto_batch=True)  # whatever one starts from


def test_a_micro_batch_that_cannot_fit_is_refused_with_what_would(config, monkeypatch):
    monkeypatch.setattr(run, "free_bytes", lambda kind: 6 * GB)
    large = asked(config, batch_size=64, grad_accum=8)
    with pytest.raises(UserError, match=r"batch_size is 64.*--batch-size \d+ --grad-accum \d+ fits"):
        choose_geometry(large, CUDA, World())
    unchecked = replace(large, train=replace(large.train, doctor=False))
    assert choose_geometry(unchecked, CUDA, World()) == unchecked
    assert choose_geometry(large, torch.device("cpu"), World()) == large  # a CPU swaps


def test_what_fits_is_left_alone(config, monkeypatch):
    monkeypatch.setattr(run, "free_bytes", lambda kind: 12 * GB)
    assert choose_geometry(config, CUDA, World()) == config
