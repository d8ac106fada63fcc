"""Medians, spreads and errors of measured numbers: what benchmarks and the doctor say about noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np


def median_and_iqr(samples: Sequence[float]) -> tuple[float, float]:
    """The median, and the distance between the quartiles (0 for a single sample)."""
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else [0.0, 0.0, 0.0]
    return statistics.median(samples), quartiles[2] - quartiles[0]


def scatter(values: np.ndarray) -> float:
    """A standard deviation that outliers do not move: 1.4826 x the median absolute deviation (exact for a normal
    distribution)."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean of two or more independent values, and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def fit_line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope of the least-squares line, and its standard error."""
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    rest = y - y.mean() - slope * centred
    return slope, math.sqrt(float(rest @ rest) / max(1, len(y) - 2) / float(centred @ centred))
