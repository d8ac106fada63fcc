"""MFU in true units, evaluations in the mean, other cards, and the SM gate."""

from __future__ import annotations

import numpy as np
import pytest

from fastgpt.anatomy import GPT2_124M
from fastgpt.doctor.diagnosis import diagnose
from fastgpt.doctor.evidence import Evidence
from fastgpt.doctor.figures import compute
from fastgpt.hardware import cards
from fastgpt.performance.flops import palm
from tests.doctor.runs import RTX4070, config, curve, examine, log, names, note, only, real, real_report

H100, A100 = cards.lookup("h100"), cards.lookup("a100")
TOKENS = 524_288


def printed(ms, gpus=1):
    """nanoGPT's mfu in percent for the sound config's model."""
    return 100 * palm(GPT2_124M) * TOKENS / gpus / (ms / 1e3) / 312e12


def steady_log(ms=9350.0, n=100, gpus=1, **more):
    mfu = np.full(n, printed(ms, gpus))
    mfu[0] = -100
    return log(curve(n), ms=ms, mfu=mfu, **more)


# --- 5. MFU ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, ms, tokens, unit, nominal, tflops",
    [("40m", 3909.8, 134_097, 0.129, 0.690, 40.2), ("124m", 9349.8, 56_075, 0.154, 0.822, 47.9)],
)
def test_the_real_runs_in_true_units(size, ms, tokens, unit, nominal, tflops):
    figures = real_report(size).figures
    assert figures.steady_ms_per_iter == pytest.approx(ms, abs=0.1)
    assert figures.tokens_per_second == pytest.approx(tokens, abs=1)
    assert figures.mfu_nanogpt == pytest.approx(unit, abs=0.0005)
    assert figures.mfu_nominal == pytest.approx(nominal, abs=0.001)
    assert figures.model_tflops == pytest.approx(tflops, abs=0.1)
    assert figures.ceiling_nanogpt == pytest.approx(0.187, abs=0.0005)
    finding = only(real_report(size).findings, "mfu_denominator")
    assert f"{nominal:.1%}" in finding.title and "18.7% is the ceiling" in finding.explanation


def test_it_says_what_could_still_be_gained():
    text = only(real_report("40m").findings, "mfu_denominator").explanation
    assert "1.45 times is left in bf16" in text and "116.6 TFLOP/s" in text and "1.71 to 1.87" in text
    assert "reaches 82%" in text, "the larger model on the same card"


def test_without_a_card_the_unit_is_named_all_the_same():
    finding = only(diagnose(real("40m")).findings, "card_unknown")
    assert finding.id == "mfu_denominator" and "40.2 TFLOP/s" in finding.explanation


def test_on_an_a100_nanogpts_figure_is_right():
    findings = examine(gpu=A100, log=steady_log(ms=2500.0))
    assert not [f for f in findings if f.id.startswith("mfu")]


def test_another_programs_mfu_is_left_alone():
    assert not [f for f in examine(gpu=RTX4070, log=steady_log(kind="nanochat")) if f.id.startswith("mfu")]


def test_mfu_over_100_is_a_faster_card():
    fast = steady_log(ms=900.0)
    assert printed(900.0) > 100
    finding = only(examine(log=fast), "other_card")
    assert (finding.id, finding.severity) == ("mfu_denominator", "info")
    assert "faster card" in finding.title and "H100" in finding.explanation and "RTX 4070" not in finding.explanation
    named = only(examine(gpu=RTX4070, log=fast), "other_card")
    assert named.severity == "warning" and "more than a NVIDIA GeForce RTX 4070 can do" in named.explanation


def test_a_figure_below_100_that_the_named_card_cannot_reach():
    findings = examine(gpu=RTX4070, log=steady_log(ms=4000.0))  # 36% of an A100: 112 TFLOP/s
    assert "other_card" in names(findings) and "mfu_denominator" not in names(findings)
    evidence = Evidence(config(), steady_log(ms=4000.0))
    assert compute(evidence, RTX4070).mfu_nominal is None


def test_the_right_card_makes_it_an_ordinary_figure():
    findings = examine(gpu=H100, log=steady_log(ms=1600.0))
    assert "other_card" not in names(findings) and "mfu_denominator" in names(findings)


def test_several_gpus_are_read_off_the_mfu():
    figures = compute(Evidence(config(), steady_log(ms=1200.0, gpus=8)), None)
    assert figures.gpus == 8 and figures.mfu_nanogpt == pytest.approx(printed(1200.0, 8) / 100)
    assert figures.tokens_per_second == pytest.approx(TOKENS / 1.2)


# --- evaluations in the mean -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, slow, usual, minutes, share", [("40m", 19.2, 3.9, 11.2, 0.0078), ("124m", 29.2, 9.3, 6.1, 0.0042)]
)
def test_iterations_with_evaluations_in_the_real_runs(size, slow, usual, minutes, share):
    figures = real_report(size).figures
    assert (figures.steady_ms_per_iter + figures.evaluation_ms) / 1e3 == pytest.approx(slow, abs=0.05)
    assert figures.steady_ms_per_iter / 1e3 == pytest.approx(usual, abs=0.05)
    assert figures.evaluation_minutes_per_day == pytest.approx(minutes, abs=0.1)
    assert figures.evaluation_share == pytest.approx(share, abs=1e-4)
    finding = only(real_report(size).findings, "mfu_includes_eval")
    assert f"{slow} s, the others {usual} s" in finding.explanation and "1 in 5" in finding.explanation
    assert f"{minutes:.0f} minutes per day" in finding.explanation


def test_a_log_whose_mean_does_not_sag_stays_silent():
    n = 1001
    ms = np.full(n, 9350.0)
    ms[::50] = 29_000  # evaluations, in one logged iteration of 50
    mfu = np.full(n, printed(9350.0))
    mfu[0] = -100
    quiet = log(curve(n), ms=ms, mfu=mfu, val=np.linspace(5, 3, 21))
    assert "mfu_includes_eval" not in names(examine(gpu=RTX4070, log=quiet))


def test_a_sag_that_its_digits_do_not_show_is_no_finding():
    ms, mfu = np.full(100, 15_950.0), np.full(100, 0.215)
    ms[::10], mfu[0], mfu[-1] = 40_000, np.nan, 0.205
    tiny = "n_layer = 1\nn_head = 1\nn_embd = 64\nbatch_size = 8\ngradient_accumulation_steps = 64"
    assert "mfu_includes_eval" not in names(
        examine(tiny, log=log(curve(100), ms=ms, mfu=mfu, val=curve(10), eval_every=100))
    )


def test_compilation_in_the_first_iteration_is_not_an_evaluation():
    ms = np.full(100, 100.0)
    ms[0] = 60_000
    assert compute(Evidence(config(), log(curve(100), ms=ms)), None).evaluation_ms is None


# --- 6. the SM gate ----------------------------------------------------------------------------------------------------

GATE = note("sm_gate", "W0101 torch/_inductor/utils.py: Not enough SMs to use max_autotune_gemm mode")


def test_the_sm_gate():
    finding = only(examine(gpu=RTX4070, log=steady_log(notes=(GATE,))), "sm_gate")
    assert finding.severity == "info" and "46" in finding.explanation and "68" in finding.explanation
    assert "No batch size, model size" in finding.explanation and "--kernels triton" in finding.advice
    assert "Change nothing in batch or model" in finding.advice
    assert finding.evidence[0][1] == GATE.text


def test_no_such_message_no_such_finding():
    assert "sm_gate" not in names(examine(gpu=RTX4070, log=steady_log()))
    assert "sm_gate" not in names(real_report("40m").findings)
