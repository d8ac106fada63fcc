"""Sizes, batches and token budgets that comments claim."""

from __future__ import annotations

import pytest

from fastgpt.anatomy import GPT2_124M
from fastgpt.doctor.checks.comments import agrees
from tests.doctor.runs import examine, names, only, real_report


def test_agrees_counts_in_every_usual_way():
    assert all(agrees(size * 1e6, GPT2_124M) for size in (117, 124, 124.4, 163, 85))
    assert not any(agrees(size * 1e6, GPT2_124M) for size in (40, 60, 200, 350))


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
