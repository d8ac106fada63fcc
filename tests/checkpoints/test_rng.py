"""Every random generator that a run draws from repeats after its state is put back."""

from __future__ import annotations

import random

import numpy as np
import torch

from fastgpt.checkpoints import checkpoint, rng, saver


def test_every_random_generator_repeats(tmp_path, device):
    def draw():
        numbers = [torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.randn(1).tolist(), random.gauss(0, 1)]
        return numbers + ([torch.rand(3, device=device).tolist()] if device.type == "cuda" else [])

    random.gauss(0, 1), np.random.randn(1)  # both now hold back the second number of a pair
    path = saver.save(tmp_path, 1, {"rng": rng.rng_state()})
    first = draw()
    assert draw() != first
    rng.set_rng_state(checkpoint.load(path)["rng"])
    assert draw() == first
    rng.seed_all(7)
    first = draw()
    rng.seed_all(7)
    assert draw() == first
