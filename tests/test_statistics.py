"""Medians, spreads and errors."""

import numpy as np
import pytest

from fastgpt.statistics import fit_line, mean_and_error, median_and_iqr, scatter


@pytest.mark.parametrize(
    ("samples", "expected"), [([3.0], (3.0, 0.0)), ([1.0, 2.0], (1.5, 1.5)), ([4.0, 1.0, 2.0, 3.0], (2.5, 2.5))]
)
def test_median_and_distance_of_the_quartiles(samples, expected):
    assert median_and_iqr(samples) == expected


def test_scatter_is_a_standard_deviation_that_outliers_do_not_move():
    values = np.random.default_rng(0).normal(5.0, 2.0, 100_000)
    assert scatter(values) == pytest.approx(2.0, rel=0.02)
    values[:1000] = 1e6
    assert scatter(values) == pytest.approx(2.0, rel=0.05)


def test_the_error_of_a_mean():
    assert mean_and_error(np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx((2.5, 0.6455), rel=1e-3)


def test_fit_line_gives_slope_and_its_error():
    rng = np.random.default_rng(0)
    x = np.arange(30.0)
    fits = np.array([fit_line(x, 2 * x + rng.standard_normal(30)) for _ in range(300)])
    assert fits[:, 0].mean() == pytest.approx(2, abs=0.01)
    assert fits[:, 1].mean() == pytest.approx(fits[:, 0].std(), rel=0.15)
