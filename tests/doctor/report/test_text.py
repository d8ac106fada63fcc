"""The report: ranking, JSON, terminal, and what was not checked."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from fastgpt.doctor import findings as findings_module
from fastgpt.doctor.diagnosis import diagnose
from fastgpt.doctor.evidence import Evidence, Place, Unread
from fastgpt.doctor.findings import rank
from fastgpt.doctor.reading.configs_fastgpt import in_fastgpts_names
from fastgpt.doctor.report.text import counts, is_code, print_report, to_json
from tests.doctor.runs import RTX4070, checkpoint, config, curve, log, note, real, real_report

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
FIGURES = {
    "parameters": 40_560_000,
    "tokens_per_step": 524_288,
    "tokens_seen": 7_602_176_000,
    "tokens_per_parameter": 187.43,
    "steady_ms_per_iter": 3909.6,
    "tokens_per_second": 134_100,
    "mfu_nominal": 0.690,
    "mfu_nanogpt": 0.129,
}


def test_checks_register_themselves_in_the_order_of_the_documentation(monkeypatch):
    names = [registered.__name__ for registered in findings_module.registered_checks()]
    assert len(names) == len(set(names)) == 35
    assert (names[0], names[-1]) == ("param_count_mismatch", "memory")
    assert names.index("block_size") < names.index("tokens_per_step") < names.index("not_a_number")

    monkeypatch.setattr(findings_module, "REGISTRY", [])
    last, first = (findings_module.check(section=n)(lambda *_: iter(())) for n in (2, 1))
    assert findings_module.registered_checks() == [first, last]


def text_of(report, gpu=RTX4070, width=120):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_report(report, gpu, console)
    return console.file.getvalue()


def test_json_of_the_real_run_as_far_as_step_14500():
    data = json.loads(json.dumps(to_json(real_report("40m", 14_500), RTX4070), allow_nan=False))
    assert {"findings", "figures", "units", "gpu", "precision", "not_checked", "unread"} == set(data)
    assert (data["gpu"], data["precision"]) == ("NVIDIA GeForce RTX 4070", "bf16")
    assert {name: data["figures"][name] for name in FIGURES} == pytest.approx(FIGURES, rel=1e-3)
    for finding in data["findings"]:
        assert {"id", "severity", "evidence", "explanation", "advice", "confidence"} <= set(finding)
        assert finding["evidence"] and all({"file", "line", "text"} == set(seen) for seen in finding["evidence"])
        assert finding["explanation"] and finding["advice"]


def test_every_number_says_what_it_is():
    data = to_json(real_report("40m"), RTX4070)
    assert set(data["units"]) | {n for n in data["figures"] if n.startswith(("val_minus", "iter_minus"))} == set(
        data["figures"]
    )


def test_all_ids_can_be_made_at_once():
    gate, oom = note("sm_gate", "Not enough SMs to use max_autotune_gemm mode"), note("nan", "iter 3000: loss nan")
    evidence = real("40m")
    broken = log(np.r_[curve(600), 9.0], notes=(gate, oom, note("no_cuda", "no NVIDIA driver")))
    report = diagnose(Evidence(evidence.config, broken, checkpoint(n_embd=768)), RTX4070)
    found = {f.id for f in report.findings} | {f.id for f in real_report("40m").findings}
    assert found >= IDS


def test_findings_are_ranked_by_severity_then_cost():
    findings = real_report("40m").findings
    order = ["critical", "warning", "info"]
    keys = [(order.index(f.severity), -f.cost) for f in findings]
    assert keys == sorted(keys) and [f.severity for f in rank(findings[::-1])] == [f.severity for f in findings]


def test_the_terminal_shows_figures_evidence_and_advice():
    text = text_of(real_report("40m"))
    for part in (
        "40.56M parameters",
        "69.0% of the GeForce RTX 4070",
        "the card's ceiling there is 18.7%",
        "train_fineweb_40m.py:19",
        "n_embd = 768",
        "[param_count_mismatch]",
        "40.56M on 10.5B",
        "1 critical, 3 warnings",
    ):
        assert part in text


@pytest.mark.parametrize("width", [60, 200])
def test_any_width_of_terminal_holds_the_whole_text(width):
    squeezed = "".join(text_of(real_report("40m"), width=width).split())
    for finding in real_report("40m").findings:
        assert "".join(finding.title.split()) in squeezed
        assert "".join(finding.advice.split("\n")[0].split()) in squeezed


def test_markup_in_a_users_file_is_text():
    report = diagnose(Evidence(config("# [bold]350M parameters[/bold] [link=x]")))
    assert "# [bold]350M parameters[/bold] [link=x]" in text_of(report, None)


def test_a_clean_run_says_so():
    report = diagnose(Evidence(config()), None, corpus_tokens=10**10)
    assert not report.findings and "nothing found" in text_of(report, None)


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


def test_what_could_not_be_read_is_listed():
    facts = config("x = open('y').read()")
    facts.unread.append(Unread(Place("config.py", 3), "import os", "imports are not executed"))
    text = text_of(diagnose(Evidence(facts)), None)
    assert "Could not be read" in text and "import os: imports are not executed" in text


def test_a_config_alone_a_log_alone_a_checkpoint_alone():
    assert diagnose(Evidence(config())).figures.tokens_per_parameter == pytest.approx(25.45, abs=0.01)
    alone = diagnose(Evidence(log=real("124m").log), RTX4070)
    assert alone.figures.mfu_nanogpt == pytest.approx(0.154, abs=0.001), "the log repeats its config"
    kept = checkpoint(config=config())
    assert diagnose(Evidence(checkpoint=kept)).figures.parameters == 123_587_328


def test_an_empty_log_is_no_reason_to_fall():
    report = diagnose(Evidence(config(), log()))
    assert report.findings == [] and report.figures.steps_seen is None


@pytest.mark.parametrize(
    "line, code",
    [
        ("n_embd = 768    # gives 123.59M", True),
        ("dropout = 0.0", True),
        ("with init_from = 'scratch'.", False),
        ("Nothing.", False),
    ],
)
def test_is_code(line, code):
    assert is_code(line) is code


def test_counts():
    assert counts(real_report("40m")) == "1 critical, 3 warnings, 5 notes"


def test_advice_for_fastgpt_is_in_its_own_names():
    advice = "max_iters = 100\nlr_decay_iters = 100\ngradient_accumulation_steps = 8\nmin_lr = 6e-05\nor so."
    assert in_fastgpts_names(advice) == "max_iters = 100\ngrad_accum = 8\nmin_lr_ratio = 0.1\nor so."
    assert in_fastgpts_names("dtype = 'bfloat16'\ndtype = 'float16'") == "precision = 'bf16'\nprecision = 'fp16'"
