"""The random generators that a run draws from repeat after their state is put back."""

from __future__ import annotations

import torch

from fastgpt.checkpoints import checkpoint, rng, saver


def test_every_random_generator_repeats(tmp_path, device):
    def draw():
        return [torch.rand(3).tolist(), torch.rand(3, device=device).tolist()]

    path = saver.save(tmp_path, 1, {"rng": rng.rng_state()})
    first = draw()
    assert draw() != first
    rng.set_rng_state(checkpoint.load(path)["rng"])
    assert draw() == first
