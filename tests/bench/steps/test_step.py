"""A timed training step in a process of its own."""

from __future__ import annotations

import json

import torch

from bench.steps import step


def test_a_step_on_a_cpu_prints_its_figures(capsys):
    shape = ["--batch-size", "2", "--grad-accum", "2", "--steps", "2", "--seconds", "0"]
    assert step.main(["--device", "cpu", "--preset", "demo", "--kernels", "eager", *shape]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens_per_second"] > 0 and found["steps"] == 2 and found["mfu"] is None
    assert abs(found["first_loss"] - torch.log(torch.tensor(256.0))) < 0.2
    assert found["formula"].startswith("palm: 6N + 12LCT")
