"""The curve: each fault on a made curve, and silence on sound and on real ones."""

from __future__ import annotations

import numpy as np
import pytest

from fastgpt.doctor.checks.curve import scatter
from tests.doctor.runs import curve, examine, log, names, note, only, real_report


def faults(findings):
    return [f.check for f in findings if f.id == "curve"]


def made(loss=None, **more):
    return examine("vocab_size = 50304", log=log(curve(600) if loss is None else loss, **more))


@pytest.mark.parametrize("size, last", [("40m", None), ("124m", None), ("40m", 14_500), ("40m", 5_000)])
def test_the_real_curves_are_sound(size, last):
    assert faults(real_report(size, last).findings) == []


@pytest.mark.parametrize("seed", range(8))
def test_sound_curves_are_silent(seed):
    val = curve(40, seed=seed, noise=0.01)
    assert faults(made(curve(600, seed=seed, noise=0.15), train=val + 0.01, val=val)) == []


def test_nan():
    loss = curve(600)
    loss[300:] = np.nan
    finding = only(made(loss, notes=(note("nan", "iter 3000: loss nan", line=301),)), "nan")
    assert finding.severity == "critical" and finding.cost == pytest.approx(0.5, abs=0.01)
    assert "iter 3000: loss nan" in finding.evidence[0][1] and finding.evidence[1][0].line == 300


@pytest.mark.parametrize("start, says", [(25.0, "initial weights are too large"), (3.1, "already knows something")])
def test_a_start_far_from_ln_vocab(start, says):
    loss = curve(600, floor=2.5)
    loss[0] = start
    finding = only(made(loss), "start_far_from_uniform")
    assert "ln(50,304) = 10.83" in finding.title and says in finding.explanation


def test_a_start_that_is_no_start_stays_silent():
    late = curve(600)[100:]
    assert "start_far_from_uniform" not in names(made(late, first_step=1000))
    assert "start_far_from_uniform" not in names(examine("init_from = 'gpt2'", log=log(np.full(100, 3.1))))
    assert "start_far_from_uniform" not in names(made(late, notes=(note("resume", "Resuming training from out"),)))


def test_divergence():
    loss = curve(600)
    loss[400:] += np.linspace(0, 4, 200)
    finding = only(made(loss), "divergence")
    assert finding.severity == "critical" and 0.2 < finding.cost < 0.5
    assert "spikes" not in names(made(loss))


def test_spikes_that_come_back():
    loss = curve(600)
    loss[[200, 350, 500]] += 2.0
    finding = only(made(loss), "spikes")
    assert "3 loss spikes" in finding.title and {place.line for place, _ in finding.evidence} == {201, 351, 501}
    assert "divergence" not in names(made(loss))


def test_a_noisy_log_has_no_spikes():
    assert "spikes" not in names(made(curve(600, noise=0.4, floor=4.0)))


def test_a_plateau_is_called_one_only_by_a_test_that_can_tell():
    flat = np.r_[np.linspace(6, 3.5, 20), np.full(20, 3.5)] + 0.004 * np.random.default_rng(1).standard_normal(40)
    finding = only(made(train=flat + 0.01, val=flat), "plateau")
    assert "less than 0.02 even at two standard errors" in finding.explanation
    falling = flat - np.r_[np.zeros(20), 0.06 * np.arange(20) / 20]
    assert "plateau" not in names(made(val=falling))
    unclear = flat + 0.2 * np.random.default_rng(2).standard_normal(40)
    assert "plateau" not in names(made(val=unclear)), "too noisy to tell"
    assert "plateau" not in names(made(val=flat[-10:])), "too few evaluations"


def test_overfitting_is_a_rise_of_val_while_train_falls():
    train = np.linspace(4, 1.5, 30)
    val = np.r_[np.linspace(4, 2.5, 15), np.linspace(2.5, 3.2, 15)]
    finding = only(made(train=train, val=val), "overfitting")
    assert "step 7,0" in finding.title and finding.cost == pytest.approx(0.5, abs=0.05)
    assert "plateau" not in names(made(train=train, val=val))
    assert "overfitting" not in names(made(train=train, val=train + 0.1))
    assert "overfitting" not in names(made(train=val, val=val)), "both rise: divergence, not overfitting"


def test_throughput_drift():
    slower = np.linspace(9350, 11_000, 600)
    finding = only(made(ms=slower), "throughput_drift")
    assert "slower" in finding.title and "Thermal" in finding.advice
    assert "throughput_drift" not in names(made(ms=np.linspace(11_000, 9350, 600))), "faster"
    jitter = 9350 + 200 * np.random.default_rng(0).standard_normal(600)
    assert "throughput_drift" not in names(made(ms=jitter))


def test_slow_steps():
    ms = np.full(600, 9350.0)
    ms[50::20] = 16_000
    finding = only(made(ms=ms), "slow_steps")
    assert "28 of 599" in finding.title and "slow disk" in finding.explanation
    one = np.full(600, 9350.0)
    one[300] = 16_000
    assert "slow_steps" not in names(made(ms=one))


def test_evaluations_are_no_slow_steps():
    ms = np.full(600, 9350.0)
    ms[::50] = 29_000
    assert faults(made(ms=ms, val=curve(12, noise=0.01))) == []


def test_scatter_is_a_standard_deviation_that_outliers_do_not_move():
    values = np.random.default_rng(0).normal(5.0, 2.0, 100_000)
    assert scatter(values) == pytest.approx(2.0, rel=0.02)
    values[:1000] = 1e6
    assert scatter(values) == pytest.approx(2.0, rel=0.05)
