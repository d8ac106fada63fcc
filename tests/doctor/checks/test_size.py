"""Size, tokens per parameter, and what comments claim."""

from __future__ import annotations

import numpy as np
import pytest

from fastgpt import anatomy
from fastgpt.anatomy import GPT2_40M, GPT2_124M, Shape
from fastgpt.config import ModelConfig
from fastgpt.doctor.checks import scaling
from fastgpt.doctor.checks.comments import agrees
from fastgpt.doctor.checks.size import single_change
from fastgpt.performance import memory
from tests.doctor.runs import REAL, RTX4070, config, examine, log, names, note, only, real, real_report

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


def test_agrees_counts_in_every_usual_way():
    assert all(agrees(size * 1e6, GPT2_124M) for size in (117, 124, 124.4, 163, 85))
    assert not any(agrees(size * 1e6, GPT2_124M) for size in (40, 60, 200, 350))


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


# --- the fits ----------------------------------------------------------------------------------------------------------


def test_the_fits_at_published_points():
    # Hoffmann et al. 2022: Chinchilla itself, 70B on 1.4T, by the fit of approach 3.
    assert scaling.HOFFMANN.loss(70e9, 1.4e12) == pytest.approx(1.937, abs=0.002)
    # Besiroglu et al. 2024: about 20 tokens per parameter at Chinchilla's compute, 5.76e23; approach 3 as published: about 70.
    for fit, low, high in ((scaling.BESIROGLU, 18, 28), (scaling.HOFFMANN, 60, 110)):
        size = min(np.geomspace(1e9, 1e12, 2000), key=lambda size: fit.loss(size, 5.76e23 / 6 / size))
        assert low < 5.76e23 / 6 / size / size < high


def test_tokens_for_a_loss_are_those_that_give_it():
    for fit in (scaling.HOFFMANN, scaling.BESIROGLU):
        assert fit.tokens_for(1e8, fit.loss(1e8, 3e9)) == pytest.approx(3e9)
        assert fit.tokens_for(1e8, fit.E) is None


@pytest.mark.parametrize("ran, size", [(scaling.SMALL, "40m"), (scaling.LARGE, "124m")])
def test_the_measured_runs_are_what_their_logs_say(ran, size):
    evidence, figures = real(size), real_report(size).figures
    logged = dict(zip(evidence.log.evals.step.tolist(), evidence.log.evals.val.tolist()))
    assert all(logged[step] == loss for step, loss in ran.val.items())
    assert max(ran.val) == figures.steps_seen
    assert (ran.shape, ran.parameters) == (figures.shape, figures.parameters)
    assert figures.steady_ms_per_iter == pytest.approx(ran.steady_ms, abs=0.1)
    assert (figures.val_minus_train.value, figures.val_minus_train.error) == pytest.approx(
        ran.val_minus_train, abs=1e-4
    )
    assert (figures.iter_minus_train.value, figures.iter_minus_train.error) == pytest.approx(
        ran.iter_minus_train, abs=1e-4
    )
    assert (REAL.parents[1] / ran.log).is_file() and ran.gpu == RTX4070.name


# --- comments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "gradient_accumulation_steps = 64     # Effective batch size: 16 * 32 = 512 sequences",
        "gradient_accumulation_steps = 64  # 8 * 64 = 512 sequences",
        "# batch: 8 x 64 x 1024 = 524,288 tokens",
        "# 8 batch size * 1024 block size * 8 gradaccum * 8 GPUs = 524,288",
        "# these make the total batch size be ~0.5M",
        "# 0.5M tokens per step",
        "batch_size = 8  # effective batch size 512",
        "eval_iters = 100  # 2 * 50 = 100",
    ],
)
def test_batch_comments_that_are_right_in_the_product_stay_silent(line):
    assert "tokens_per_step_comment" not in names(examine(line))


@pytest.mark.parametrize(
    "line",
    [
        "gradient_accumulation_steps = 32     # Effective batch size: 8 * 64 = 512 sequences",
        "batch_size = 4  # 8 * 64 = 512 sequences per batch",
        "# batch of 16 * 64 * 1024 = 1,048,576 tokens",
        "# 1M tokens per step",
        "batch_size = 8  # effective batch size 256",
    ],
)
def test_batch_comments_that_are_wrong_are_found(line):
    assert "tokens_per_step_comment" in names(examine(line))


def test_a_wrong_batch_comment_names_the_accumulation_that_was_meant():
    finding = only(examine("gradient_accumulation_steps = 32  # 8 * 64 = 512 sequences"), "tokens_per_step_comment")
    assert finding.advice.startswith("gradient_accumulation_steps = 64") and finding.id == "schedule"
    assert "262,144 tokens" in finding.title


@pytest.mark.parametrize("size", ["40m", "124m"])
def test_the_real_batch_comments_are_right(size):
    assert "tokens_per_step_comment" not in names(real_report(size).findings)


def test_the_real_token_budget_comments_are_wrong():
    finding = only(real_report("40m").findings, "token_budget_comment")
    assert "~3B tokens" in finding.title and "10.5B" in finding.title and finding.evidence[0][0].line == 22
    assert finding.advice.startswith("max_iters = 5722")
    assert "6.29B" in only(real_report("124m").findings, "token_budget_comment").title


@pytest.mark.parametrize(
    "line",
    [
        "max_iters = 6000  # ~3B tokens seen",
        "max_iters = 6000  # 3.1B tokens",
        "max_iters = 6000  # enough",
        "# openwebtext has 9B tokens",
        "# this makes total number of tokens be 3B",
        "# 524288 tokens per step, total",
    ],
)
def test_true_budgets_and_other_numbers_of_tokens_stay_silent(line):
    assert "token_budget_comment" not in names(examine(line))


def test_a_size_without_evidence_is_not_judged():
    assert examine(None) == []
    assert "param_count_mismatch" not in names(examine(config("# 350M parameters", base="n_layer = unknown()\n")))
