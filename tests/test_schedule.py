"""Learning-rate schedules: where they begin, turn and end."""

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgpt.config import OptimConfig
from fastgpt.schedule import learning_rate, micro_batches, micro_batches_until, window_limit

SHAPES = ("cosine", "wsd", "linear", "constant")


def rates(optim, max_iters):
    return [learning_rate(step, optim, max_iters) for step in range(max_iters)]


@pytest.mark.parametrize("schedule", SHAPES)
def test_warmup_rises_to_the_peak_and_step_0_already_learns(schedule):  # bug 13
    optim = OptimConfig(lr=1.0, warmup_iters=4, min_lr_ratio=0.1, schedule=schedule)
    assert rates(optim, 100)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear"])
def test_the_last_step_has_the_floor_and_it_stays_there(schedule):
    optim = OptimConfig(lr=1.0, warmup_iters=4, min_lr_ratio=0.1, schedule=schedule)
    assert learning_rate(99, optim, 100) == pytest.approx(0.1)
    assert learning_rate(500, optim, 100) == pytest.approx(0.1)


def test_halfway_points():
    make = lambda schedule: OptimConfig(lr=1.0, warmup_iters=0, min_lr_ratio=0.0, schedule=schedule)  # noqa: E731
    assert learning_rate(50, make("cosine"), 101) == pytest.approx(0.5)
    assert learning_rate(25, make("linear"), 101) == pytest.approx(0.75)
    assert learning_rate(79, make("wsd"), 101) == 1.0  # stable until the last fifth
    assert learning_rate(90, make("wsd"), 101) == pytest.approx(0.5)
    assert learning_rate(100, make("constant"), 101) == 1.0


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    schedule=st.sampled_from(SHAPES),
    warmup=st.integers(0, 50),
    max_iters=st.integers(1, 200),
    ratio=st.floats(0, 1),
    share=st.floats(0, 1),
)
def test_positive_at_first_never_negative_never_above_the_peak_and_continuous(
    schedule, warmup, max_iters, ratio, share
):
    optim = OptimConfig(lr=1.0, warmup_iters=warmup, min_lr_ratio=ratio, schedule=schedule, decay_share=share)
    values = rates(optim, max_iters)
    assert all(0 <= value <= 1 for value in values)
    assert values[0] > 0
    falling = values[min(warmup, max_iters) :]
    assert all(a >= b for a, b in itertools.pairwise(falling))
    # No step is larger than the steepest shape needs: a cosine's middle, pi/2 times a straight line.
    start = warmup if schedule != "wsd" else max(warmup, max_iters - 1 - round(share * max_iters))
    steepest = 1.6 / max(1, max_iters - 1 - start)
    assert all(a - b <= steepest + 1e-9 for a, b in itertools.pairwise(falling))


def test_a_warmup_as_long_as_the_run_never_decays():
    optim = OptimConfig(lr=1.0, warmup_iters=10, schedule="cosine")
    assert rates(optim, 10) == pytest.approx([(i + 1) / 11 for i in range(10)])


def test_micro_batches_and_windows_rise_to_the_whole_and_stay():
    optim = OptimConfig(batch_warmup_iters=6, window_warmup_iters=3)
    assert [micro_batches(step, optim, 4) for step in range(8)] == [1, 2, 2, 3, 3, 4, 4, 4]
    assert [window_limit(step, optim, 1024) for step in range(5)] == [256, 512, 768, None, None]
    for accum in (1, 4, 7):
        sums = [0, *itertools.accumulate(micro_batches(step, optim, accum) for step in range(9))]
        assert [micro_batches_until(step, optim, accum) for step in range(10)] == sums
    assert micro_batches_until(10**12, OptimConfig(batch_warmup_iters=10**12), 2) == 3 * 10**12 // 2
    assert micro_batches(0, OptimConfig(), 4) == 4 and window_limit(0, OptimConfig(), 1024) is None
