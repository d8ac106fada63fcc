"""val < train, and what dropout costs."""

from __future__ import annotations

import numpy as np
import pytest

from fastgpt.doctor.evidence import Evidence
from fastgpt.doctor.figures import compute
from tests.doctor.runs import config, curve, examine, log, names, only, real_report

rng = np.random.default_rng(7)


def evaluations(n=20, gap=-0.06, noise=0.01):
    train = 3.3 + 2.0 * np.exp(-np.arange(n) / 4)
    return {"train": train, "val": train + gap + noise * rng.standard_normal(n)}


# --- 3. val < train ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, gap, error", [("40m", -0.066, 0.0022), ("124m", -0.042, 0.0035)])
def test_the_gap_of_the_real_runs(size, gap, error):
    measured = real_report(size).figures.val_minus_train
    assert measured.value == pytest.approx(gap, abs=0.001) and measured.error == pytest.approx(error, abs=0.0005)
    assert measured.since == 3000
    finding = only(real_report(size).findings, "val_below_train")
    assert f"{measured.value:+.3f}" in finding.explanation and finding.confidence == "certain"


def test_dropout_is_never_named_as_the_cause():
    for size in ("40m", "124m"):
        finding = only(real_report(size).findings, "val_below_train")
        assert finding.explanation.startswith(
            "Dropout cannot show in this line: nanoGPT's estimate_loss() calls model.eval()"
        )
        assert "dropout" not in finding.advice


def test_each_real_run_is_held_against_the_other():
    assert (
        "-0.042 +- 0.004 at dropout 0: it persists" in only(real_report("40m").findings, "val_below_train").explanation
    )
    small = only(real_report("124m").findings, "val_below_train").explanation
    assert "And dropout is 0 here." in small and "-0.066 +- 0.002 at dropout 0.1" in small


@pytest.mark.parametrize("gap, noise", [(0.05, 0.01), (-0.005, 0.001), (-0.03, 0.2), (0.0, 0.01)])
def test_no_gap_a_gap_within_noise_and_the_usual_gap_stay_silent(gap, noise):
    assert "val_below_train" not in names(examine(log=log(curve(1000), **evaluations(gap=gap, noise=noise))))


def test_the_runs_of_this_project_are_no_witness_for_another_corpus():
    finding = only(examine(log=log(curve(1000), **evaluations())), "val_below_train")
    assert "FineWeb" not in finding.explanation


def test_a_log_of_another_program_is_judged_with_less_certainty():
    finding = only(examine(log=log(curve(1000), kind="unknown", **evaluations())), "val_below_train")
    assert finding.confidence == "likely" and "nanoGPT's" not in finding.explanation


def test_a_log_with_validation_only_says_nothing_of_a_gap():
    val = evaluations()["val"]
    findings = examine(log=log(curve(1000), val=val, kind="fastgpt"))
    assert "val_below_train" not in names(findings)


# --- what dropout costs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, gap, error", [("40m", 0.092, 0.0102), ("124m", -0.025, 0.022)])
def test_iteration_losses_against_train_evaluations_in_the_real_runs(size, gap, error):
    measured = real_report(size).figures.iter_minus_train
    assert measured.value == pytest.approx(gap, abs=0.002) and measured.error == pytest.approx(error, abs=0.0005)
    assert (measured.sigmas > 5) == (size == "40m")


@pytest.mark.parametrize("true", [0.0, 0.1])
def test_the_estimator_finds_a_known_difference_within_its_own_error(true):
    """On 60 made runs the error it states is the error it makes."""
    off = []
    for seed in range(60):
        noise = np.random.default_rng(seed)
        train = 3.3 + 2.0 * np.exp(-np.arange(24) / 4)
        steps = 200 * np.arange(58)
        loss = np.interp(steps, 500 * np.arange(24), train) + true + 0.12 * noise.standard_normal(58)
        evidence = Evidence(config(), log(loss, every=200, train=train, val=train))
        measured = compute(evidence, None).iter_minus_train
        off.append((measured.value - true) / measured.error)
    assert abs(np.mean(off)) < 0.4 and 0.75 < np.std(off) < 1.3


def test_the_gap_of_a_short_run_is_taken_from_its_second_half():
    evidence = Evidence(config(), log(curve(100), **evaluations(5)))
    assert compute(evidence, None).val_minus_train.since == 1000


# --- 4. dropout on a large corpus --------------------------------------------------------------------------------------


def test_dropout_in_the_real_run():
    finding = only(real_report("40m").findings, "dropout_on_large_corpus")
    assert finding.advice == "dropout = 0.0" and finding.severity == "warning"
    assert "+0.092 +- 0.010 nat" in finding.explanation and "-0.026 +- 0.022: nothing" in finding.explanation
    assert finding.evidence[0][0].line == 20
    assert "dropout_on_large_corpus" not in names(real_report("124m").findings)


def test_less_than_an_epoch_is_certain():
    finding = only(examine("dropout = 0.1", corpus=10**10), "dropout_on_large_corpus")
    assert finding.confidence == "certain" and "0.31 epochs" in finding.explanation
    assert "dropout_on_large_corpus" in names(examine("dropout = 0.1\ndataset = 'openwebtext'"))


@pytest.mark.parametrize(
    "text, corpus",
    [
        ("dropout = 0.0", 10**10),
        ("dropout = 0.1", 10**9),  # three epochs
        ("dropout = 0.2\ndataset = 'shakespeare_char'\nvocab_size = 65", None),
        (
            "dropout = 0.1\nmax_iters = 500\nlr_decay_iters = 500\nwarmup_iters = 20\ndataset = 'mine'",
            None,
        ),  # a small run
    ],
)
def test_dropout_that_may_help_stays_silent(text, corpus):
    assert "dropout_on_large_corpus" not in names(examine(text, corpus=corpus))


def test_dropout_stays_silent_where_validation_rises_above_train():
    findings = examine("dropout = 0.1\ndataset = 'mine'", log=log(curve(1000), **evaluations(gap=0.3)))
    assert "dropout_on_large_corpus" not in names(findings)
