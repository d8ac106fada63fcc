"""python -m bench.mfu --precision fp16-fast and fp8: where they are measured, as what, and what the report says of it."""

import json
from dataclasses import replace

import pytest
import torch

from bench import mfu, mfu_tables, step_profile, timing
from bench.step_profile import Setup
from fastgpt import hardware
from fastgpt.anatomy import Shape
from fastgpt.config import EXPERIMENTAL, ModelConfig
from fastgpt.operations import GAPS, operations
from fastgpt.ops import usable_precision
from tests.mfu_run import CEILINGS, INTERPRETED, TINY, quick_run

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "card", "used"),
    [
        ("fp16-fast", "rtx4070", "fp16-fast"),
        ("fp16-fast", "h100", "bf16"),
        ("auto", "h100", "bf16"),
        ("fp16", "a100", "fp16"),
    ],
)
def test_a_card_that_gains_nothing_is_measured_in_what_training_would_use_and_it_is_said(
    precision, card, used, monkeypatch
):
    cuda = torch.device("cuda")
    monkeypatch.setattr(hardware, "present", lambda device=None: hardware.lookup(card))
    found, notes = mfu.in_force(precision, cuda)
    refused = usable_precision(precision, cuda, "triton")[1]
    experimental = f"precision {used} is experimental: no GPU has confirmed it yet" if used in EXPERIMENTAL else None
    assert (found, notes) == (used, [note for note in (refused, experimental) if note])


@pytest.fixture(scope="module", params=["fp16-fast", "fp8"])
def experimental(request, tmp_path_factory):
    """(precision, the whole command with nothing but it, as a CPU runs it, and its report)."""
    if request.config.getoption("--device") == "cuda":
        pytest.skip("with --device cuda this process does not interpret kernels")
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        flags = quick_run(patch, folder)
        code = mfu.main([*flags, "--no-projection", "--precision", request.param])
    assert code == 0, "nothing was to be timed, and the interpreter got through"
    found = json.loads((folder / "out" / "mfu.json").read_text())
    return request.param, found, (folder / "out" / "report.html").read_text()


def test_an_experimental_precision_is_interpreted_and_the_report_says_what_is_left_out_and_why(experimental, capsys):
    precision, found, page = experimental
    notes = [
        f"precision {precision} is experimental: no GPU has confirmed it yet",
        f"eager and compile are left out: they do not have {precision}",
        f"nothing is timed: our kernels need a GPU for that; what they do is shown interpreted, with {INTERPRETED}",
    ]
    assert found["notes"] == notes and found["backends"] == {}
    assert found["setup"] == found["interpreted"]["setup"] and found["setup"]["precision"] == precision
    mfu_tables.show(found)
    terminal = capsys.readouterr().out
    for shown in (page, terminal):
        assert all(note in shown for note in notes) and f"{precision} (experimental)" in shown
        assert "No backend could be measured" not in shown and "matplotlib" not in shown and "Roofs" not in shown


def test_the_operations_of_an_experimental_step_are_those_that_the_projection_counts(experimental):
    precision, found, _ = experimental
    expected = {op.group for op in operations(Shape(**found["setup"]["shape"]), "triton", 2, precision=precision)}
    rows = {row["name"]: row for row in found["interpreted"]["rows"]}
    assert rows.keys() - {GAPS, "data"} == expected
    assert found["interpreted"]["profile"]["accounted"] >= 0.97
    assert rows["mlp up dW"]["arithmetic"] == ("bf16" if precision == "fp8" else "fp16_fp16acc")


@pytest.fixture
def two_turns(monkeypatch):
    """Timing that takes no time, so long that one step is profiled."""
    fixed = timing.Timing.of([3000.0, 3000.0, 3000.0])
    monkeypatch.setattr(step_profile.timing, "interleave", lambda runners, *_, **__: dict.fromkeys(runners, fixed))


@pytest.mark.skipif("config.getoption('--device') == 'cuda'", reason="this process does not interpret kernels then")
def test_an_experimental_step_is_timed_against_the_peak_of_its_arithmetic(two_turns, monkeypatch, tmp_path):
    """The interpreter in the place of a GPU."""
    monkeypatch.setattr(
        hardware, "peak_flops", lambda device, precision: hardware.lookup("4070").peak_flops(arithmetic)
    )
    arithmetic, rates = "fp16_fp16acc", {"fp16": 0.05, "fp16_fp16acc": 0.1}
    setup = Setup(TINY, ModelConfig(1, 2, 32, 32, 160), 2, 1, "fp16-fast")
    ceilings = replace(CEILINGS, matmul_tflops=rates)
    found = step_profile.measure(["triton"], setup, CPU, ceilings, steps=3, traces=tmp_path)["triton"]
    note = "fp16-fast: part of the step is computed in fp16, so nothing could reach 100% of the fp16_fp16acc peak"
    assert mfu_tables.mfu_notes({"setup": setup.to_json(), "backends": {"triton": found}})[-1] == note
    nominal, measured, _ = found["mfu"]
    assert nominal["denominator_tflops"] == pytest.approx(116.6, abs=0.05) and measured["denominator_tflops"] == 0.1
    assert nominal["denominator"].startswith("nominal dense fp16_fp16acc peak of ")
    assert found["skipped_steps"] == 0 and found["profile"]["accounted"] >= 0.97
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["head dW"]["roof_ms"] == pytest.approx(1e3 * 2 * 64 * 32 * 160 / 0.1e12)


@pytest.mark.skipif("config.getoption('--device') == 'cuda'", reason="this process does not interpret kernels then")
def test_without_eager_a_wrong_first_loss_is_found_too(two_turns, monkeypatch, tmp_path):
    monkeypatch.setattr(step_profile, "plain_loss", lambda *_: 4.0)
    monkeypatch.setattr(step_profile, "_start", lambda *_: (Stub(), {"first_loss": 5.0}))
    setup = Setup(TINY, ModelConfig(1, 2, 32, 32, 160), 2, 1, "fp8")
    found = step_profile.measure(["triton"], setup, CPU, CEILINGS, steps=3, traces=tmp_path)
    assert found == {"triton": {"error": "no speed: its first loss is 5.0000, eager's 4.0000"}}


class Stub:
    """A runner that is never run."""


@pytest.mark.parametrize("precision", ["fp16-fast", "fp8"])
def test_the_loss_to_compare_with_is_the_mean_over_the_step_in_plain_16_bits(precision, tmp_path):
    setup = Setup(TINY, ModelConfig(1, 2, 32, 32, 160), 2, 3, precision)
    with step_profile.random_tokens(setup) as tokens:
        found = step_profile.plain_loss(setup, CPU, tokens)
        plain = replace(setup, precision={"fp16-fast": "fp16", "fp8": "bf16"}[precision])
        assert found == pytest.approx(step_profile.Runner("eager", plain, CPU, tokens)(), abs=2e-3)


def test_updates_that_were_skipped_while_they_were_timed_are_said():
    found = {"backends": {"triton": {"ms": 1.0, "skipped_steps": 2}, "eager": {"ms": 1.0, "skipped_steps": 0}}}
    assert mfu_tables.failures(found) == [
        "triton: 2 updates skipped while it was timed, for a gradient that is not finite: such a step does less"
    ]
