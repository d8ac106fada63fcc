"""Schedule, optimizer and shape settings: each finding, and what must stay silent."""

from __future__ import annotations

import numpy as np
import pytest

from fastgpt.doctor.checks.settings import counted_share
from fastgpt.doctor.diagnosis import diagnose
from fastgpt.doctor.evidence import Evidence
from fastgpt.doctor.figures import compute
from tests.doctor.runs import config, curve, examine, log, names, note, only, real, real_report


def test_the_sound_config_is_clean():
    assert examine() == []


def test_the_real_runs_have_no_other_finding_on_their_schedule():
    for size in ("40m", "124m"):
        found = {f.check for f in real_report(size).findings if f.id == "schedule"}
        assert found == {"token_budget_comment", "beta2_for_batch"}


@pytest.mark.parametrize(
    "text, check, severity, advice",
    [
        ("warmup_iters = 6000", "warmup_too_long", "critical", "warmup_iters = 300"),
        ("warmup_iters = 4000", "warmup_too_long", "warning", "warmup_iters = 300"),
        ("min_lr = 1e-3", "min_lr_above_lr", "critical", "min_lr = 6e-05"),
        ("lr_decay_iters = 3000", "decay_ends_early", "warning", "lr_decay_iters = 6000"),
        ("lr_decay_iters = 600000", "decay_cut_off", "warning", "lr_decay_iters = 6000"),
        (
            "gradient_accumulation_steps = 6\nworld_size = 4",
            "accumulation_not_divisible",
            "critical",
            "gradient_accumulation_steps = 8",
        ),
        (
            "gradient_accumulation_steps = 63\n# torchrun --nproc_per_node=8 train.py",
            "accumulation_not_divisible",
            "critical",
            "gradient_accumulation_steps = 64",
        ),
        ("beta2 = 0.99", "beta2_for_batch", "info", "beta2 = 0.95"),
        ("beta2 = 0.95\nbatch_size = 4\ngradient_accumulation_steps = 1", "beta2_for_batch", "info", "beta2 = 0.99"),
        ("vocab_size = 50257", "vocabulary_not_padded", "warning", "vocab_size = 50304"),
        ("n_head = 7", "heads_do_not_divide", "critical", "n_head = 6"),
        ("n_head = 16", "head_dimension", "warning", "n_head = 12    # head dimension 64"),
        ("n_head = 96", "head_dimension", "warning", "n_head = 12    # head dimension 64"),
    ],
)
def test_each_finding_with_its_lines(text, check, severity, advice):
    finding = only(examine(text), check)
    assert (finding.id, finding.severity) == ("schedule", severity)
    assert finding.advice.split("\n")[0] == advice
    assert finding.evidence and all(place.file == "config.py" for place, _ in finding.evidence)


@pytest.mark.parametrize(
    "text",
    [
        "warmup_iters = 0",
        "warmup_iters = 1000",
        "min_lr = 6e-4",  # a constant rate after warmup
        "min_lr = 0.0",
        "min_lr = 1e-3\ndecay_lr = False",
        "lr_decay_iters = 6500",
        "lr_decay_iters = 5600",
        "lr_decay_iters = 1000\ndecay_lr = False",
        "gradient_accumulation_steps = 64\nworld_size = 4",
        "# torchrun --nproc_per_node=8 train.py",
        "beta2 = 0.95",
        "beta2 = 0.999\nbatch_size = 4\ngradient_accumulation_steps = 1",
        "beta2 = 0.99\nbatch_size = 64\nblock_size = 256\ngradient_accumulation_steps = 1",  # nanoGPT's shakespeare_char
        "vocab_size = 65",
        "vocab_size = 50304",
        "vocab_size = 256",
        "n_embd = 384",  # head dimension 32
        "n_head = 6",  # 128
        "weight_decay = 0.1",
    ],
)
def test_counter_examples_stay_silent(text):
    assert not [f for f in examine(text) if f.id == "schedule"]


def test_defaults_count_where_nothing_is_set():
    """nanoGPT's lr_decay_iters is 600,000 unless set, its min_lr 6e-5."""
    bare = "block_size = 1024\nmax_iters = 6000\nwarmup_iters = 100\nlearning_rate = 3e-5\n"

    found = {f.check: f for f in examine(config(base=bare))}
    assert "(the default)" in found["min_lr_above_lr"].title and "(the default)" in found["decay_cut_off"].title


def test_weight_decay_on_norms_is_seen_in_nanogpts_own_count():
    wrong = note("no_decay", "num non-decayed parameter tensors: 0, with 0 parameters")
    right = note("no_decay", "num non-decayed parameter tensors: 25, with 19,200 parameters")
    assert only(examine("weight_decay = 0.1", log=log(curve(50), notes=(wrong,))), "weight_decay_on_norms").cost > 0
    assert "weight_decay_on_norms" not in names(examine("weight_decay = 0.1", log=log(curve(50), notes=(right,))))
    assert "weight_decay_on_norms" not in names(examine("weight_decay = 0.0", log=log(curve(50), notes=(wrong,))))


def test_a_context_beyond_the_data():
    finding = only(examine("block_size = 4096", corpus=3000), "block_size_beyond_data")
    assert finding.severity == "critical" and finding.advice == "block_size = 128"
    assert "block_size_beyond_data" not in names(examine("block_size = 4096", corpus=10**9))
    assert "block_size_beyond_data" not in names(examine("block_size = 4096"))


@pytest.mark.parametrize("line", ["batch_size = -8", "n_layer = 0", "learning_rate = 1e400", "dropout = True"])
def test_a_value_that_no_run_can_have_counts_as_unknown_and_is_listed(line):

    name = line.split(" = ")[0]
    facts = config(line)
    report = diagnose(Evidence(facts))
    assert report.figures.config.get(name) is None
    assert any(name in text for _, text in report.unread)


def test_a_setting_that_could_not_be_read_is_not_judged():
    assert "warmup_too_long" not in names(examine("warmup_iters = len(open('x').read())"))
    assert "min_lr_above_lr" not in names(examine("min_lr = compute()"))


def test_time_lost_to_evaluation_measured_and_counted():
    ms = np.full(600, 1000.0)
    ms[::5] = 31_000  # every 50 steps
    finding = only(examine(log=log(curve(600), ms=ms, val=curve(120, noise=0.01), eval_every=50)), "evaluation_time")
    assert finding.confidence == "certain" and finding.cost == pytest.approx(30 / 80, abs=0.01)
    counted = only(examine("eval_interval = 20\neval_iters = 200"), "evaluation_time")
    assert counted.confidence == "likely" and "minutes per day" in counted.title
    assert "evaluation_time" not in names(examine())
    assert "evaluation_time" not in names(real_report("40m").findings)


def test_the_count_from_the_config_agrees_with_the_real_measurement():
    """2 x 200 batches of 16 every 500 steps: 0.83% by FLOPs, 0.78% measured."""
    counted = counted_share(compute(Evidence(real("40m").config), None), None)
    assert counted == pytest.approx(real_report("40m").figures.evaluation_share, rel=0.1)
