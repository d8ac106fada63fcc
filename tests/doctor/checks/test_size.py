"""Size, and tokens per parameter."""

from __future__ import annotations

import pytest

from fastgpt import anatomy
from fastgpt.anatomy import GPT2_40M, GPT2_124M, Shape
from fastgpt.config import ModelConfig
from fastgpt.doctor.checks.size import single_change
from fastgpt.performance import memory
from tests.doctor.runs import config, examine, log, names, note, only, real_report

# --- 1. size -----------------------------------------------------------------------------------------------------------


def test_the_real_run_is_40m_and_not_the_125m_it_claims():
    finding = only(real_report("40m").findings, "param_count_mismatch")
    assert (finding.id, finding.severity, finding.confidence) == ("param_count_mismatch", "critical", "certain")
    assert "40.56M" in finding.title and "125M" in finding.title
    assert finding.advice.startswith("n_embd = 768 ") and "123.59M" in finding.advice
    assert real_report("40m").findings[0] is finding, "the costliest comes first"


def test_its_evidence_is_the_comment_the_run_name_and_the_log():
    seen = {
        f"{place.file}:{place.line}": text
        for place, text in only(real_report("40m").findings, "param_count_mismatch").evidence
    }
    assert "~125M parameters" in seen["train_fineweb_40m.py:16"]
    assert "125M-single-parquet-4070" in seen["train_fineweb_40m.py:9"]
    assert "n_embd = 384" in seen["train_fineweb_40m.py:19"]
    assert "the log agrees" in seen["nanogpt-40m-fineweb.log:3"] and "300.1 MFLOP" in seen["nanogpt-40m-fineweb.log:3"]


def test_it_says_what_the_change_does_to_memory_and_time():
    text = only(real_report("40m").findings, "param_count_mismatch").explanation
    assert "0.65 to 1.98 GB" in text and "2.85 times the FLOPs per token" in text and "9.35 s" in text
    need = memory.memory(ModelConfig(n_embd=768, dropout=0.1), micro_batch=16, kernels="nanogpt-compile").total
    assert f"to {need / 1e9:.1f} GB at micro-batch 16" in text


def test_the_second_run_keeps_what_it_promises():
    assert "param_count_mismatch" not in names(real_report("124m").findings)


@pytest.mark.parametrize(
    "line",
    [
        "# about 124M parameters",
        "# GPT-2 small, 117M params as published",
        "# 163M parameters with an untied head",
        "# 85M parameters without embeddings",
        "wandb_run_name = 'gpt2-124M'",
        "wandb_run_name = 'fineweb-10B'",
        "wandb_run_name = 'fineweb10B-run2'",
        "out_dir = 'out-owt-9B'",
        "wandb_run_name = 'run-2.5B-tokens'",
        "# trained on 10B tokens",
        "# model of 12 layers",
        "wandb_run_name = '125Mega'",
    ],
)
def test_true_claims_and_claims_of_something_else_stay_silent(line):
    assert "param_count_mismatch" not in names(examine(line))


@pytest.mark.parametrize(
    "line, claimed",
    [
        ("# a 350M model", "350M"),
        ("# ~1.5B params", "1.5B"),
        ("wandb_run_name = 'gpt2-355M-fineweb'", "355M"),
        ("n_embd = 384  # 124M parameters", "124M"),
        ("out_dir = 'out/350M'", "350M"),
    ],
)
def test_false_claims_are_found_wherever_they_are(line, claimed):
    assert claimed in only(examine(line), "param_count_mismatch").title


def test_the_log_of_another_model_is_believed_over_the_config():
    counted = note("parameters", "number of parameters: 40.56M", 40_560_000)
    report = examine(log=log(log().steps.loss, notes=(counted,)))
    assert "param_count_mismatch" not in names(report)


@pytest.mark.parametrize(
    "shape, wanted, name, value",
    [
        (GPT2_40M, 125e6, "n_embd", 768),
        (GPT2_124M, 353e6, "n_embd", 1344),
        (Shape(6, 12, 768, 1024, 50304), 124e6, "n_layer", 12),
    ],
)
def test_single_change(shape, wanted, name, value):
    changed = single_change(shape, wanted)
    assert changed is not None and changed[0] == name and getattr(changed[1], name) == value
    assert abs(anatomy.n_params(changed[1], positions=False) / wanted - 1) < 0.08


def test_no_single_change_is_claimed_where_there_is_none():
    finding = only(examine("# 3000B parameters"), "param_count_mismatch")
    assert "no single change" in finding.advice


# --- 2. tokens per parameter -------------------------------------------------------------------------------------------


def test_187_tokens_per_parameter_at_step_14500():
    figures = real_report("40m", 14_500).figures
    assert figures.tokens_seen == 14_500 * 524_288
    assert figures.tokens_per_parameter == pytest.approx(187.4, abs=0.1)
    finding = only(real_report("40m", 14_500).findings, "many")
    assert finding.id == "tokens_per_parameter"
    assert (
        "187 per parameter, 9.4 times Chinchilla's 20" in finding.explanation and "7.60B tokens" in finding.explanation
    )


def test_the_whole_log_has_259():
    assert real_report("40m").figures.tokens_per_parameter == pytest.approx(258.5, abs=0.1)


def test_the_same_compute_at_other_sizes_beside_what_was_measured():
    text = only(real_report("40m").findings, "many").explanation
    assert "40.56M on 10.5B (   259 each)  3.385  3.356  <- this" in text
    assert "123.59M on 3.68B" in text and "3.272  3.217" in text
    assert "other data and another tokeniser" in text and "Besiroglu et al. 2024" in text
    assert "val 3.4243 at step 7,000 with this compute, against 3.5228 here, and 3.3366 at step 11,000" in text


def test_its_advice_is_the_better_size_at_this_compute():
    advice = only(real_report("40m").findings, "many").advice
    assert "n_embd = 768" in advice and "max_iters = 7019" in advice and "lr_decay_iters = 7019" in advice


def test_measured_losses_of_another_corpus_are_not_shown():
    finding = only(examine("n_embd = 384\nmax_iters = 20000\ndataset = 'openwebtext'"), "many")
    assert "Measured on FineWeb" not in finding.explanation


@pytest.mark.parametrize("steps", [2000, 4700, 12_000])
def test_a_usual_number_of_tokens_stays_silent(steps):
    assert "tokens_per_parameter" not in [f.id for f in examine(f"max_iters = {steps}\nlr_decay_iters = {steps}")]


def test_the_second_run_has_a_usual_number():
    assert "tokens_per_parameter" not in [f.id for f in real_report("124m").findings]


def test_a_run_planned_far_too_short_is_found():
    finding = only(examine("n_layer = 24\nn_head = 16\nn_embd = 1024\nmax_iters = 1000\nlr_decay_iters = 1000"), "few")
    assert "1.48 tokens per parameter" in finding.title
    assert "n_embd = 384" in finding.advice or "n_embd = 768" in finding.advice


def test_a_run_that_has_only_begun_is_judged_by_its_plan():
    assert "few" not in names(examine(log=log([10.8, 7.0, 6.5], every=100)))


def test_figures_from_the_config_alone_are_of_the_plan():
    finding = only(examine("n_embd = 384\nmax_iters = 14500\nlr_decay_iters = 14500"), "many")
    assert "187 per parameter" in finding.explanation and "Where the curve" not in finding.explanation


def test_a_size_without_evidence_is_not_judged():
    assert examine(None) == []
    assert "param_count_mismatch" not in names(examine(config("# 350M parameters", base="n_layer = unknown()\n")))
