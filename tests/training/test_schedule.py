"""Warmup and cosine, in optimizer steps."""

import pytest

from fastgpt.config import OptimConfig
from fastgpt.training.schedule import learning_rate

OPTIM = OptimConfig(lr=1.0, min_lr_ratio=0.1, warmup_iters=10)


def test_step_0_already_learns_and_warmup_is_linear():
    rates = [learning_rate(step, OPTIM, 100) for step in range(11)]
    assert rates == pytest.approx([(step + 1) / 11 for step in range(11)])


def test_decay_ends_at_the_floor_on_the_very_last_step_and_stays():
    assert learning_rate(99, OPTIM, 100) == pytest.approx(0.1)
    assert learning_rate(98, OPTIM, 100) > 0.1
    assert learning_rate(150, OPTIM, 100) == pytest.approx(0.1)


def test_decay_is_monotone_and_halfway_in_the_middle():
    rates = [learning_rate(step, OPTIM, 111) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(60, OPTIM, 111) == pytest.approx(0.55)


@pytest.mark.parametrize("max_iters", [1, 2, 5, 11, 12])
def test_runs_shorter_than_the_warmup(max_iters):
    assert all(0 < learning_rate(step, OPTIM, max_iters) <= 1 for step in range(max_iters))
