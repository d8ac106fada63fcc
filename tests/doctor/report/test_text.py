"""The report: ranking, JSON, terminal, and what was not checked."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from fastgpt.doctor.diagnosis import diagnose
from fastgpt.doctor.evidence import Evidence, Place, Unread
from fastgpt.doctor.findings import is_code
from fastgpt.doctor.report.text import counts, print_report, summary, to_json
from tests.doctor.runs import RTX4070, config, real_report

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


def text_of(report, gpu=RTX4070, width=120):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_report(report, gpu, console)
    return console.file.getvalue()


def test_json_of_the_real_run_as_far_as_step_14500():
    data = json.loads(json.dumps(to_json(real_report("40m", 14_500), RTX4070), allow_nan=False))
    keys = "findings figures sources assumed units gpu precision recipe not_checked unread"
    assert set(data) == set(keys.split())
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


def test_a_share_that_rounds_to_nothing_is_left_out():
    tiny = {"model_tflops": 0.03, "mfu_nominal": None, "mfu_nanogpt": 0.0001, "ceiling_nanogpt": None}
    shown = dict(summary(replace(real_report("40m", 14_500).figures, **tiny), None))
    assert "TFLOP/s" not in shown["speed"] and "MFU" not in shown


def test_what_could_not_be_read_is_listed():
    facts = config("x = open('y').read()")
    facts.unread.append(Unread(Place("config.py", 3), "import os", "imports are not executed"))
    text = text_of(diagnose(Evidence(facts)), None)
    assert "Could not be read" in text and "import os: imports are not executed" in text


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
