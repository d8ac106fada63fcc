"""The projection against the two real runs and the public figures, and what it says of itself."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from fastgpt import anatomy
from fastgpt.anatomy import GPT2_40M, GPT2_124M
from fastgpt.common import UserError
from fastgpt.config import load_preset
from fastgpt.hardware import cards
from fastgpt.performance import flops, projection
from fastgpt.performance.projection import ANCHORS, KNOWN, RUN_40M, RUN_124M, project
from fastgpt.performance.step_time import RANGES

ROOT = Path(__file__).parents[2]
RTX4070 = cards.lookup("rtx4070")
STEP = 524_288


def projected(shape=GPT2_124M, gpu=RTX4070, micro_batch=8, **options):
    return project(shape, gpu, **{"micro_batch": micro_batch, "tokens_per_step": STEP, **options})


# ---- the runs


@pytest.mark.parametrize("name", ["40M", "124M"])
def test_medians_are_those_of_the_logs(name):
    log = (ROOT / "docs/rtx4070-runs" / f"nanogpt-{name.lower()}-fineweb.log").read_text(encoding="utf-8")
    times = {int(step): float(ms) for step, ms in re.findall(r"^iter (\d+): .* time ([\d.]+)ms", log, re.MULTILINE)}
    median = statistics.median(ms for step, ms in times.items() if step % 500)  # every 500th also evaluates
    assert median == pytest.approx(projection.MEDIAN_MS[name], rel=5e-4)


@pytest.mark.parametrize("run, preset", [(RUN_40M, "gpt2-40m"), (RUN_124M, "gpt2-124m")], ids=["40M", "124M"])
def test_the_runs_have_the_shapes_and_batches_of_their_configs(run, preset):
    script = (ROOT / "docs/rtx4070-runs" / f"train_fineweb_{preset[5:]}.py").read_text(encoding="utf-8")
    config = {key: float(value) for key, value in re.findall(r"^(\w+) = ([\d.e-]+)", script, re.MULTILINE)}
    keys = ("n_layer", "n_head", "n_embd", "block_size")
    assert all(getattr(run.shape, key) == config[key] for key in keys)
    assert run.micro_batch == config["batch_size"] and run.dropout == config["dropout"]
    assert run.tokens_per_step == config["batch_size"] * config["gradient_accumulation_steps"] * config["block_size"]
    assert run.shape == anatomy.Shape.of(load_preset(preset).model)


# ---- calibration


def test_each_run_predicts_the_other_within_ten_percent():
    errors = projection.left_out_errors()
    assert max(abs(errors[run.name]) for run in (RUN_40M, RUN_124M)) == projection.calibration_error() <= 0.10


def test_the_documentation_states_every_error_as_it_is():
    text = (ROOT / "docs/projection.md").read_text(encoding="utf-8")
    for run in KNOWN:
        row = next(line for line in text.splitlines() if line.startswith(f"| {run.name} |") and line.count("|") == 8)
        error, (factor, inside) = projection.left_out_errors()[run.name], projection.interval_without(run)
        central = run.measured / (1 + error)
        rates = " | ".join(f"{rate:,.0f}" for rate in (central / factor, central, central * factor))
        assert row.endswith(f"| {rates} | {error:+.1%} | {'inside' if inside else '**outside**'} |"), row
    for card, others in (("rtx4070", "cases, a factor of"), ("h100", "cases,")):
        errors = projection.known_errors(cards.lookup(card)).values()
        assert f"({len(errors)} {others} {projection.jackknife(errors):.3f})" in text


def test_the_documented_figures_for_the_rtx_4070_are_what_the_code_says():
    text = (ROOT / "docs/projection.md").read_text(encoding="utf-8")
    for kernels, precision in [("eager", "bf16"), ("triton", "bf16"), ("triton", "fp16-fast"), ("triton", "fp8")]:
        p = projected(kernels=kernels, precision=precision)
        rates = " | ".join(
            f"{x:,.0f}" for x in (p.tokens_per_second_low, p.tokens_per_second, p.tokens_per_second_high)
        )
        assert f"| {kernels} | {precision} | {rates} |" in text, (kernels, precision, rates)


def test_the_documentation_has_what_each_constant_changes_beyond_what_known_cases_show():
    text = (ROOT / "docs/projection.md").read_text(encoding="utf-8")
    steps = [projected(precision=precision).sensitivities for precision in ("bf16", "fp16-fast")]
    for name in RANGES:
        ends = [end for step in steps for s in step if s.constant == name for end in (s.at_low, s.at_high)]
        assert f"| `{name}` | {' | '.join(f'{end:+.1%}' for end in ends)} |" in text or max(map(abs, ends)) < 0.003, (
            name
        )


def test_the_nanochat_anchor_has_the_flops_that_its_author_counts():
    (run,) = [run for run in ANCHORS if "nanochat" in run.name]
    assert flops.palm(run.shape) == pytest.approx(887e6, rel=1e-3)


def test_anchors_are_the_public_figures():
    assert {(run.gpu, run.low, run.high) for run in ANCHORS} == {
        ("h100", 466_440, 466_440),
        ("h200", 495_147, 495_147),
        ("a100", 208_962, 208_962),
        ("rtx4070", 55.7e3, 55.7e3),
        ("rtx4090", 108e3, 108e3),
        ("a100", 195e3, 195e3),
    }


@pytest.mark.parametrize("run", KNOWN, ids=lambda run: run.name)
def test_every_measured_case_lies_in_its_interval(run):
    """All eight, as docs/projection.md says, with nothing left out."""
    p = project(
        run.shape,
        cards.lookup(run.gpu),
        kernels=run.kernels,
        micro_batch=run.micro_batch,
        tokens_per_step=run.tokens_per_step,
        dropout=run.dropout,
        optimizer=run.optimizer,
    )
    assert p.tokens_per_second == pytest.approx(run.predicted())
    assert p.tokens_per_second_low <= run.measured * (1 + 1e-9) and run.measured <= p.tokens_per_second_high * (
        1 + 1e-9
    )


def test_the_interval_of_a_case_that_is_left_out_is_that_of_the_others_of_its_kind():
    errors = projection.left_out_errors()
    assert list(errors) == [run.name for run in KNOWN] and errors[RUN_124M.name] > 0, "with the clock of the 40M run"
    outside = {run.name for run in KNOWN if not projection.interval_without(run)[1]}
    assert outside == {RUN_124M.name, RUN_40M.name, "RTX 4090, rotary 124M"}
    (nanochat,) = (run for run in ANCHORS if run.gpu == "rtx4070")
    clock = replace(projection.CONSTANTS, clock=projection.FITTED_CLOCKS["40M"])
    assert projection.interval_without(RUN_124M)[0] == pytest.approx(1 + nanochat.error(clock)), "fitted on the 40M run"
    assert projection.interval_without(RUN_40M)[0] == pytest.approx(1 / (1 + errors[nanochat.name]))
    assert projection.interval_without(nanochat)[0] == pytest.approx(1 + errors[RUN_124M.name])
    (worst,) = (run for run in ANCHORS if run.gpu == "rtx4090")
    assert projection.interval_without(worst)[0] == pytest.approx(1 / (1 + errors["H200, 124M"]))
    assert projected(gpu=cards.lookup("h100"), kernels="compile").ms_per_step_high == pytest.approx(
        projected(gpu=cards.lookup("h100"), kernels="compile").ms_per_step / (1 + errors[worst.name])
    )


# ---- what a projection says


def test_only_what_the_runs_cover_is_calibrated():
    for options in ({}, {"shape": GPT2_40M, "micro_batch": 16}):
        assert projected(kernels="nanogpt-compile", **options).calibrated
    for options in (
        {"kernels": "triton"},
        {"kernels": "compile"},
        {"kernels": "eager"},
        {"precision": "fp16"},
        {"precision": "fp16-fast"},
        {"precision": "fp8"},
        {"gpu": cards.lookup("rtx4070ti")},
        {"gpu": cards.lookup("h100")},
        {"T": 512},
        {"shape": replace(GPT2_124M, n_embd=1536)},
    ):
        p = projected(**{"kernels": "nanogpt-compile", **options})
        assert not p.calibrated and "uncalibrated" in p.status, options


def test_every_status_says_projected_and_the_error():
    for gpu in map(cards.lookup, ("rtx4070", "rtx3090", "h100")):
        p = projected(gpu=gpu)
        assert (
            p.status.startswith("projected") and f"calibration error {projection.calibration_error():.1%}" in p.status
        )
    assert "21% off in a known case on other cards" in projected(gpu=cards.lookup("h100")).status


def test_intervals_widen_with_what_is_not_known():
    def width(**options):
        p = projected(**options)
        assert p.ms_per_step_low < p.ms_per_step < p.ms_per_step_high
        assert p.tokens_per_second_low < p.tokens_per_second < p.tokens_per_second_high
        return p.ms_per_step_high / p.ms_per_step_low

    calibrated, compiled, triton = (width(kernels=k) for k in ("nanogpt-compile", "compile", "triton"))
    assert calibrated == compiled, "the same list of operations"
    assert compiled < triton < width(precision="fp16-fast")
    assert width(kernels="nanogpt-compile", gpu=cards.lookup("rtx4090")) > compiled


def test_doubled_arithmetic_gains_less_than_the_measured_ratio():
    plain, fast = projected(precision="fp16"), projected(precision="fp16-fast")
    assert 1.2 < fast.tokens_per_second / plain.tokens_per_second < 1.79


def test_what_no_case_shows_of_a_constant_widens_the_interval():
    def effects(**options):
        return {s.constant: max(abs(s.at_low), abs(s.at_high)) for s in projected(**options).sensitivities}

    assert effects(kernels="nanogpt-compile") == dict.fromkeys(RANGES, 0.0), "which all cases are like"
    triton, fast = effects(), effects(precision="fp16-fast")
    assert triton["own_kernels"] > triton["memory_efficiency"] > 1e-3
    assert triton["double_rate"] == 0 and triton["clock_full_rate"] == 0
    assert max(fast["double_rate"], fast["l2_bytes_per_clock"]) > 0.01, (
        "what limits doubled arithmetic: its rate, or the L2"
    )


def test_the_logged_run_reads_as_the_facts_say():
    p = projected(kernels="nanogpt-compile")
    assert p.tokens_per_second == pytest.approx(56_070, rel=1e-3)
    assert (p.mfu, p.mfu_nanogpt) == pytest.approx((0.82, 0.154), abs=0.003)
    assert p.mfu_of == "nominal dense bf16 peak, 58.3 TFLOP/s"


@pytest.mark.parametrize("change", [{"memory_gbs": 1008}, {"boost_mhz": 3000}, {"sm_count": 92}, {"l2_mb": 96}])
def test_a_better_card_is_not_slower(change):
    assert projected(gpu=replace(RTX4070, **change)).ms_per_step < projected().ms_per_step


def test_fewer_tokens_a_step_cost_less_time_and_more_per_token():
    whole, half = projected(), projected(tokens_per_step=STEP // 2)
    assert whole.ms_per_step / 2 < half.ms_per_step < whole.ms_per_step


def test_json_is_plain_and_complete():
    found = json.loads(json.dumps(projected().to_json()))
    assert found["projected"] is True and found["calibrated"] is False
    assert found["tokens_per_step"] == STEP
    keys = {"tokens_per_second", "tokens_per_second_low", "tokens_per_second_high", "ms_per_step", "mfu", "mfu_nanogpt"}
    assert keys < set(found) and found["calibration_error"] == projection.calibration_error()
    assert set(found["operations"][0]) == {"name", "group", "ms", "flops", "bytes", "launches", "bound"}
    assert sum(op["ms"] for op in found["operations"]) == pytest.approx(found["ms_per_step"])
    assert {op["bound"] for op in found["operations"]} <= {"compute", "L2", "memory", "launch"}


@pytest.mark.parametrize("tokens", [0, 8191, 10_000])
def test_tokens_that_are_no_whole_number_of_micro_batches_are_refused(tokens):
    with pytest.raises(UserError, match=f"tokens_per_step is {tokens}: it must be a multiple .* 8192, such as 8192"):
        projected(tokens_per_step=tokens)
