"""Loss spikes: told from noise, silent until there is something to compare with."""

import math
import random

from fastgpt.training.run import SPIKE_WINDOW, SpikeDetector


def noise(n, seed=0):
    draw = random.Random(seed)
    return [draw.gauss(3.0, 0.1) for _ in range(n)]


def test_silent_until_the_window_is_full_then_measures_in_standard_deviations():
    detector = SpikeDetector()
    assert [detector.zscore(loss) for loss in noise(SPIKE_WINDOW)] == [None] * SPIKE_WINDOW
    mean = math.fsum(detector.state) / SPIKE_WINDOW
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in detector.state) / SPIKE_WINDOW)
    assert detector.zscore(mean + 7 * deviation) == (mean + 7 * deviation - mean) / deviation


def test_noise_is_no_spike_and_a_jump_is():
    detector = SpikeDetector(noise(SPIKE_WINDOW))
    assert max(detector.zscore(loss) for loss in noise(500, seed=1)) < 5
    assert detector.zscore(4.5) > 8


def test_what_is_not_finite_never_joins_and_a_flat_window_says_nothing():
    detector = SpikeDetector([1.0] * SPIKE_WINDOW)
    assert detector.zscore(math.nan) is None and detector.zscore(math.inf) is None
    assert detector.state == [1.0] * SPIKE_WINDOW
    assert detector.zscore(2.0) is None


def test_the_state_continues_a_detector():
    whole = SpikeDetector(noise(SPIKE_WINDOW + 50))
    again = SpikeDetector(SpikeDetector(noise(SPIKE_WINDOW + 50)).state)
    assert whole.zscore(3.4) == again.zscore(3.4)
