"""Resuming: another shape, another schedule, a "best" loss that is not the lowest; and a log that is not the config's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fastgpt.doctor.figures import learning_rate
from tests.doctor.runs import checkpoint, config, curve, examine, log, names, note, only, real_report


def test_a_checkpoint_of_another_shape_field_by_field():
    finding = only(
        examine("init_from = 'resume'", checkpoint=checkpoint(n_embd=384, bias=True)), "resume_shape_mismatch"
    )
    assert (finding.id, finding.severity, finding.cost) == ("resume_shape_mismatch", "critical", 1.0)
    assert "n_embd, bias" in finding.title
    assert (
        finding.evidence[0][1]
        == "n_embd: 384 in the checkpoint, 768 in the config; bias: True in the checkpoint, False in the config"
    )
    assert any(text == "n_embd = 768" for _, text in finding.evidence)
    assert "without a word" in finding.explanation
    assert finding.advice.startswith("init_from = 'scratch'") and "n_embd = 384" in finding.advice


def test_fastgpt_refuses_such_a_checkpoint_and_the_finding_says_so():
    finding = only(examine(checkpoint=checkpoint(kind="fastgpt", n_layer=6)), "resume_shape_mismatch")
    assert "fastgpt refuses" in finding.explanation


def test_the_same_shape_stays_silent():
    assert not [f for f in examine(checkpoint=checkpoint()) if f.id.startswith("resume")]


def test_a_vocabulary_that_the_config_does_not_set_comes_from_the_data():
    assert "resume_shape_mismatch" not in names(examine(checkpoint=checkpoint(vocab_size=65)))
    assert "resume_shape_mismatch" in names(examine("vocab_size = 50304", checkpoint=checkpoint(vocab_size=65)))


def test_nothing_left_to_train():
    assert only(examine(checkpoint=checkpoint(step=6000)), "nothing_left").severity == "info", "a finished run"
    finding = only(examine("init_from = 'resume'", checkpoint=checkpoint(step=6000)), "nothing_left")
    assert finding.severity == "critical" and "iter_num 6,000" in finding.evidence[0][1]
    assert finding.advice == "max_iters = 12000\nlr_decay_iters = 12000"


def test_a_schedule_that_has_already_finished():
    finding = only(examine("max_iters = 9000", checkpoint=checkpoint(step=6100)), "already_finished")
    assert "past lr_decay_iters 6,000" in finding.title and finding.advice == "lr_decay_iters = 9000"


def test_a_finished_checkpoint_by_itself_stays_silent():
    facts = config()
    assert not examine(facts, checkpoint=checkpoint(step=6000, config=facts))


def test_a_constant_rate_is_never_finished():
    assert "already_finished" not in names(
        examine("max_iters = 9000\ndecay_lr = False", checkpoint=checkpoint(step=6100))
    )


def test_a_schedule_that_restarts():
    old = config()
    finding = only(
        examine("max_iters = 40000\nlr_decay_iters = 40000", checkpoint=checkpoint(step=5500, config=old)), "restarts"
    )
    assert finding.id == "resume_schedule" and "jumps from" in finding.title
    assert "lr_decay_iters = 6000" in finding.advice


def test_the_checkpoints_own_schedule_stays_silent():
    findings = examine("eval_interval = 250", checkpoint=checkpoint(step=5500, config=config()))
    assert not [f for f in findings if f.id == "resume_schedule"]


def test_learning_rate_is_nanogpts():
    facts = config()  # warmup 500, 6e-4 to 6e-5 at 6000
    assert learning_rate(0, facts) == pytest.approx(6e-4 / 501)
    assert learning_rate(500, facts) == pytest.approx(6e-4)
    assert learning_rate(3250, facts) == pytest.approx((6e-4 + 6e-5) / 2)
    assert learning_rate(6000, facts) == learning_rate(9000, facts) == pytest.approx(6e-5)
    assert learning_rate(9000, config("decay_lr = False")) == 6e-4
    assert learning_rate(0, config("learning_rate = unknown()")) is None


# --- best_val_loss -----------------------------------------------------------------------------------------------------


def rising(last):
    return np.r_[np.linspace(5, 3.3, 12), last]


def test_best_val_loss_in_the_checkpoint_is_the_last():
    kept = dataclasses.replace(checkpoint(step=6000), best_val_loss=3.36)
    finding = only(
        examine("max_iters = 7000", log=log(curve(100), val=rising(3.36)), checkpoint=kept), "resume_best_val_loss"
    )
    assert "3.3600" in finding.title and "3.3000" in finding.title and finding.confidence == "certain"


def test_without_the_checkpoint_the_setting_tells():
    text = "always_save_checkpoint = True"
    assert "resume_best_val_loss" in names(examine(text, log=log(curve(100), val=rising(3.4))))


@pytest.mark.parametrize(
    "text, last",
    [
        ("always_save_checkpoint = True", 3.29),
        ("always_save_checkpoint = True", 3.31),
        ("always_save_checkpoint = False", 3.4),
    ],
)
def test_a_best_that_is_last_within_noise_or_kept_stays_silent(text, last):
    assert "resume_best_val_loss" not in names(examine(text, log=log(curve(100), val=rising(last))))


@pytest.mark.parametrize("size", ["40m", "124m"])
def test_the_real_runs_ended_at_their_best(size):
    assert "resume_best_val_loss" not in names(real_report(size).findings)


# --- a log that is not the config's ------------------------------------------------------------------------------------


def test_the_real_40m_log_has_another_log_interval():
    finding = only(real_report("40m").findings, "config_log_mismatch")
    assert finding.severity == "info" and "log_interval 100 in the config, 200 in the log" in finding.title


def test_the_124m_log_is_its_configs():
    assert "config_log_mismatch" not in names(real_report("124m").findings)


def test_a_log_of_another_model_is_noticed_by_its_mfu():
    mfu = np.full(50, 12.87)
    mfu[0] = -100
    findings = examine(log=log(curve(50), ms=3917.8, mfu=mfu))
    finding = only(findings, "config_log_mismatch")
    assert finding.severity == "warning" and "300 MFLOP per token, the config 855" in finding.title


def test_overrides_and_tokens_per_step_in_the_log():
    notes = (
        note("override", "Overriding: n_embd = 384", ("n_embd", 384)),
        note("tokens_per_step", "tokens per iteration will be: 491,520", 491_520),
    )
    finding = only(examine(log=log(curve(50), notes=notes)), "config_log_mismatch")
    assert "n_embd 384 in the log, 768 in the config" in finding.title and "491,520" in finding.title
