"""Whatever a config or a log holds, the doctor says what it can and never falls."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgpt.doctor.diagnosis import diagnose
from fastgpt.doctor.evidence import ConfigFacts, Evidence, Place, Setting
from fastgpt.doctor.reading.values import DEFAULTS, store
from fastgpt.doctor.report.page import render
from fastgpt.doctor.report.text import to_json
from tests.doctor.runs import RTX4070, checkpoint, config, curve, log, note, real, real_report

VALUES = st.one_of(
    st.integers(-3, 5),
    st.sampled_from(
        [64, 384, 768, 1024, 50257, 10**9, 10**30, 0.0, 0.1, 0.5, 0.99, 1.0, 2.5, -1.0, float("nan"), float("inf")]
    ),
    st.booleans(),
    st.sampled_from(["", "fp16", "float16", "fp8", "cuda", "resume", "fineweb", "124M", "a\0b", "[bold]"]),
    st.none(),
)
COMMENTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        [
            "~125M parameters",
            "0M params",
            "8 * 8 = 0 sequences",
            "0B tokens seen",
            "9" * 400 + "M params",
            "--nproc_per_node=0",
        ]
    ),
)
CONFIGS = st.dictionaries(
    st.sampled_from([*sorted(DEFAULTS), "world_size", "precision", "kernels"]), st.tuples(VALUES, COMMENTS), max_size=12
)
LOSSES = st.lists(st.one_of(st.floats(0, 20), st.just(float("nan")), st.just(float("inf"))), max_size=60)
QUICK = settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def facts(values, kind="nanogpt", defaults=DEFAULTS):
    read = ConfigFacts(kind, defaults=defaults)
    for name, (value, comment) in values.items():
        store(read, name, Setting(value, Place("config.py", 1), f"{name} = {value!r}  # {comment}", comment))
    return read


def whole(evidence, gpu=RTX4070):
    report = diagnose(evidence, gpu)
    json.dumps(to_json(report, gpu))
    render(report, evidence, gpu)
    return report


@QUICK
@given(values=CONFIGS, kind=st.sampled_from(["nanogpt", "fastgpt"]), bare=st.booleans())
def test_any_values_in_a_config(values, kind, bare):
    whole(Evidence(facts(values, kind, {} if bare else DEFAULTS)))


@QUICK
@given(
    loss=LOSSES,
    val=LOSSES,
    ms=st.sampled_from([0.0, 1e-9, 9350.0, float("nan"), float("inf")]),
    mfu=st.sampled_from([float("nan"), -100.0, 0.0, 12.9, 150.0, float("inf")]),
    every=st.sampled_from([0, 1, 100]),
    values=CONFIGS,
    kind=st.sampled_from(["nanogpt", "nanochat", "fastgpt", "unknown"]),
)
def test_any_numbers_in_a_log(loss, val, ms, mfu, every, values, kind):
    train = val[::-1]
    whole(Evidence(facts(values), log(loss, every=every, ms=ms, mfu=mfu, train=train, val=val, kind=kind)))


@QUICK
@given(
    shape=st.dictionaries(st.sampled_from(["n_layer", "n_embd", "block_size", "bias"]), VALUES),
    step=st.one_of(st.none(), st.integers(-1, 10**9)),
    values=CONFIGS,
)
def test_any_shape_in_a_checkpoint(shape, step, values):
    shape = {name: setting.value for name, setting in facts({k: (v, "") for k, v in shape.items()}).settings.items()}
    whole(Evidence(facts(values), checkpoint=checkpoint(step, facts(values), **shape)))
    whole(Evidence(checkpoint=checkpoint(step, **shape)), None)


@pytest.mark.parametrize(
    "kind",
    ["parameters", "tokens_per_step", "precision", "vocab", "sm_gate", "oom", "nan", "resume", "device", "no_decay"],
)
def test_a_note_without_a_value(kind):
    whole(Evidence(config(), log(np.full(30, 3.0), notes=(note(kind, "text"),))))


IDS = {
    "param_count_mismatch",
    "tokens_per_parameter",
    "val_below_train",
    "dropout_on_large_corpus",
    "mfu_denominator",
    "mfu_includes_eval",
    "sm_gate",
    "resume_shape_mismatch",
    "schedule",
    "curve",
    "environment",
}


def test_all_ids_can_be_made_at_once():
    gate, oom = note("sm_gate", "Not enough SMs to use max_autotune_gemm mode"), note("nan", "iter 3000: loss nan")
    evidence = real("40m")
    broken = log(np.r_[curve(600), 9.0], notes=(gate, oom, note("no_cuda", "no NVIDIA driver")))
    report = diagnose(Evidence(evidence.config, broken, checkpoint(n_embd=768)), RTX4070)
    found = {f.id for f in report.findings} | {f.id for f in real_report("40m").findings}
    assert found >= IDS


def test_a_config_alone_a_log_alone_a_checkpoint_alone():
    assert diagnose(Evidence(config())).figures.tokens_per_parameter == pytest.approx(25.45, abs=0.01)
    alone = diagnose(Evidence(log=real("124m").log), RTX4070)
    assert alone.figures.mfu_nanogpt == pytest.approx(0.154, abs=0.001), "the log repeats its config"
    kept = checkpoint(config=config())
    assert diagnose(Evidence(checkpoint=kept)).figures.parameters == 123_587_328


def test_an_empty_log_is_no_reason_to_fall():
    report = diagnose(Evidence(config(), log()))
    assert report.findings == [] and report.figures.steps_seen is None


def test_what_is_missing_is_named_with_the_file_that_would_tell():
    nothing = diagnose(Evidence()).not_checked
    assert (
        any("config" in s for s in nothing) and any("log" in s for s in nothing) and any("--gpu" in s for s in nothing)
    )
    only_log = diagnose(Evidence(log=log(curve(100), val=[5, 4, 3]))).not_checked
    assert any("give the config" in s for s in only_log)
    resuming = diagnose(Evidence(config("init_from = 'resume'"))).not_checked
    assert any("ckpt.pt" in s for s in resuming)
    assert diagnose(real("40m"), RTX4070, corpus_tokens=10**11).not_checked == []
