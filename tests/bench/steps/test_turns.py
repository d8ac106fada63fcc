"""Steps in turns: one on the device at a time, the first loss checked, and an interrupt that costs only what was running."""

from __future__ import annotations

import json
import os
import signal
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from bench.steps import profile, trace
from bench.steps.turns import NOT_REACHED, Runner, Setup, Turns, random_tokens
from bench.steps.variants import VARIANTS, StepVariant
from fastgpt.config import ModelConfig

CPU = torch.device("cpu")
SETUP = Setup("tiny", ModelConfig(1, 2, 32, 16, 64), 2, 1, "fp32")
NANOGPT = VARIANTS["nanogpt"]._replace(compile="none")


@pytest.fixture(scope="module")
def tokens():
    with random_tokens(SETUP) as path:
        yield path


def runner(tokens, variant, setup=SETUP):
    return Runner(variant, setup, CPU, tokens)


def held(runner):
    return sum(storage.nbytes() for storage in runner.storages())


@pytest.mark.parametrize(
    "variant", [VARIANTS["eager"], VARIANTS["triton"], NANOGPT], ids=["eager", "triton", "nanogpt"]
)
@pytest.mark.skipif("config.getoption('--device') == 'cuda'", reason="this process does not interpret kernels then")
def test_a_parked_step_goes_on_with_the_very_bits(tokens, variant):
    never_parked = runner(tokens, variant)
    expected = [never_parked() for _ in range(4)]
    turns = Turns(CPU)
    turns.parks = True
    turns.start("a", partial(runner, tokens, variant))
    turns.start("b", partial(runner, tokens, VARIANTS["eager"]))
    size = held(never_parked)
    assert size > 100_000 and [held(turns.runners[name]) for name in "ab"] == [0, 0]
    with turns.turn("a") as here:
        assert held(here) == size and held(turns.runners["b"]) == 0
        assert here() == expected[3], "after two steps to start, and one to begin the turn"
    turns.release("a")
    assert list(turns.runners) == ["b"] and held(turns.runners["b"]) == 0


def test_nanogpts_step_begins_with_our_loss_and_updates_alike(tokens):
    ours, theirs = runner(tokens, VARIANTS["eager"]), runner(tokens, NANOGPT)
    for _ in range(4):
        assert theirs() == pytest.approx(ours(), abs=2e-5)
    names = {name for name, _ in theirs.stepper.model.named_modules()}
    assert "transformer.h.0.attn.c_attn" in names and type(theirs.stepper.optimizer) is torch.optim.AdamW


def test_a_wrong_first_loss_gets_no_speed_and_the_others_take_turns(tokens):
    class Wrong(Runner):
        def __call__(self):
            return super().__call__() + 0.5

    turns = Turns(CPU)
    turns.start("compile", partial(runner, tokens, VARIANTS["eager"]))
    turns.start("good", partial(runner, tokens, VARIANTS["eager"]))
    turns.start("bad", partial(Wrong, VARIANTS["eager"], SETUP, CPU, tokens))
    turns.start("broken", partial(runner, tokens, StepVariant("no such kernels")))
    turns.check(tokens)
    turns.time(3)
    assert turns.results["good"]["runs"] == 3 and turns.results["good"]["skipped_steps"] == 0
    assert (
        turns.results["bad"]["error"].startswith("no speed: its first loss is 4.") and "ms" not in turns.results["bad"]
    )
    assert "compile's" in turns.results["bad"]["error"], "of a plain step that ran"
    assert "no such kernels" in turns.results["broken"]["error"] and list(turns.runners) == ["compile", "good"]


def test_memory_that_does_not_suffice_is_marked():
    def make():
        raise torch.OutOfMemoryError("CUDA out of memory")

    turns = Turns(CPU)
    turns.start("a", make)
    assert turns.results["a"] == {"error": "OutOfMemoryError: CUDA out of memory", "oom": True}


def test_an_interrupt_costs_what_was_running_and_what_is_ready_is_timed(tokens):
    def interrupted():
        os.kill(os.getpid(), signal.SIGINT)

    turns = Turns(CPU)
    turns.start("ready", partial(runner, tokens, VARIANTS["eager"]))
    turns.start("running", interrupted)
    turns.start("later", lambda: pytest.fail("started"))
    turns.time(40)
    assert turns.results["ready"]["runs"] == 10, "one turn of four"
    assert turns.results["running"] == turns.results["later"] == {"error": NOT_REACHED}


def test_an_interrupt_while_timing_ends_the_timing(tokens):
    turns, inside = Turns(CPU), []

    class Interrupting(Runner):
        def __call__(self):
            inside.append(1)
            if len(inside) == 10:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__call__()

    turns.start("a", partial(Interrupting, VARIANTS["eager"], SETUP, CPU, tokens))
    turns.time(40)
    assert turns.stopped and turns.results["a"]["runs"] == 10
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_trace_of_a_gpu_without_kernels_is_an_error_with_its_remedy(tokens, monkeypatch, tmp_path):
    """torch.profiler without CUPTI: host times would be named as operations."""
    here = runner(tokens, VARIANTS["eager"])
    here.device = torch.device("cuda")
    step = {"name": trace.STEP, "ph": "X", "cat": "user_annotation", "ts": 0, "dur": 100, "tid": 1, "pid": 1}
    path = tmp_path / "trace.json"
    monkeypatch.setattr(profile, "record", lambda *_: path.write_text(json.dumps({"traceEvents": [step]})))
    with pytest.raises(RuntimeError, match="CUPTI is missing or not permitted: install the nvidia-cuda-cupti"):
        profile.profiled(here, None, path, repeats=1)


def test_all_stay_on_the_device_where_they_fit_and_none_but_one_where_they_do_not(monkeypatch):
    """A card that is not here: how much each keeps, and what a step adds, is made up."""
    turns = Turns(CPU)
    turns.device, turns.parks = torch.device("cuda"), True
    parked = []
    monkeypatch.setattr(turns, "_park", lambda name: parked.append(name) if turns._crowded else None)
    monkeypatch.setattr(turns, "_fetch", lambda name: None)
    monkeypatch.setattr(turns, "_started", lambda make: (Idle(), {"kept_memory": 2e9, "peak_memory": 6e9}))
    for total, names, expected in ((12e9, "abcd", list("abcd")), (24e9, "abcd", [])):
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _, total=total: SimpleNamespace(total_memory=total)
        )
        for name in names:
            turns.start(name, lambda: None)
        parked.clear()
        turns.time(1)
        assert parked == expected, f"{total / 1e9:.0f} GB"


class Idle:
    """A runner whose steps do nothing."""

    stepper = SimpleNamespace(skipped_steps=lambda: 0)
    conditions = nullcontext

    def __call__(self):
        return 0.0

    def settle(self):
        pass
