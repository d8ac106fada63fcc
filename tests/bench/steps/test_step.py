"""Timed training steps in a process of their own."""

from __future__ import annotations

import json
import math

import pytest

from bench.steps import step
from fastgpt.common import UserError


def test_steps_on_a_cpu_print_their_figures(capsys, monkeypatch):
    shape = ["--batch-size", "1,2", "--grad-accum", "1", "--steps", "2"]
    assert step.main(["--device", "cpu", "--preset", "demo", "--variants", "eager", *shape]) == 0
    found = json.loads(capsys.readouterr().out)["steps"]
    assert [(one["variant"], one["batch_size"], one["grad_accum"]) for one in found] == [
        ("eager", 1, 2),
        ("eager", 2, 1),
    ]
    for one in found:
        assert one["tokens_per_second"] > 0 and one["runs"] == 2 and one["mfu"] is None
        assert one["first_loss"] == pytest.approx(math.log(256), abs=0.2)
        assert one["formula"].startswith("palm: 6N + 12LCT")
    assert found[0]["first_loss"] == pytest.approx(found[1]["first_loss"], abs=1e-4), "the same tokens"


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--variants", "egaer"], "variants is 'egaer' .did you mean 'eager'"),
        (["--batch-size", "8,x"], "batch_size is '8,x': it must be a number, or some that divide the largest"),
        (["--batch-size", "3,8"], "batch_size is '3,8'"),
        (["--grad-accum", "0"], "grad_accum is 0"),
    ],
)
def test_bad_input_is_one_sentence(flags, sentence):
    with pytest.raises(UserError, match=sentence):
        step.main(["--device", "cpu", "--preset", "demo", *flags])
