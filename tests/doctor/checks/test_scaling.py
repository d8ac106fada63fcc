"""The fits at published points, and the measured runs beside their logs."""

from __future__ import annotations

import numpy as np
import pytest

from fastgpt.doctor.checks import scaling
from tests.doctor.runs import REAL, RTX4070, real, real_report


def test_the_fits_at_published_points():
    # Hoffmann et al. 2022: Chinchilla itself, 70B on 1.4T, by the fit of approach 3.
    assert scaling.HOFFMANN.loss(70e9, 1.4e12) == pytest.approx(1.937, abs=0.002)
    # Besiroglu et al. 2024: about 20 tokens per parameter at Chinchilla's compute, 5.76e23; approach 3 as published: about 70.
    for fit, low, high in ((scaling.BESIROGLU, 18, 28), (scaling.HOFFMANN, 60, 110)):
        size = min(np.geomspace(1e9, 1e12, 2000), key=lambda size: fit.loss(size, 5.76e23 / 6 / size))
        assert low < 5.76e23 / 6 / size / size < high


def test_tokens_for_a_loss_are_those_that_give_it():
    for fit in (scaling.HOFFMANN, scaling.BESIROGLU):
        assert fit.tokens_for(1e8, fit.loss(1e8, 3e9)) == pytest.approx(3e9)
        assert fit.tokens_for(1e8, fit.E) is None


@pytest.mark.parametrize("ran, size", [(scaling.SMALL, "40m"), (scaling.LARGE, "124m")])
def test_the_measured_runs_are_what_their_logs_say(ran, size):
    evidence, figures = real(size), real_report(size).figures
    logged = dict(zip(evidence.log.evals.step.tolist(), evidence.log.evals.val.tolist()))
    assert all(logged[step] == loss for step, loss in ran.val.items())
    assert max(ran.val) == figures.steps_seen
    assert (ran.shape, ran.parameters) == (figures.shape, figures.parameters)
    assert figures.steady_ms_per_iter == pytest.approx(ran.steady_ms, abs=0.1)
    assert (figures.val_minus_train.value, figures.val_minus_train.error) == pytest.approx(
        ran.val_minus_train, abs=1e-4
    )
    assert (figures.iter_minus_train.value, figures.iter_minus_train.error) == pytest.approx(
        ran.iter_minus_train, abs=1e-4
    )
    assert (REAL.parents[1] / ran.log).is_file() and ran.gpu == RTX4070.name
