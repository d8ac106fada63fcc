"""bench.audit: what it prints, what its exit code says, and bad input."""

from __future__ import annotations

import json

import pytest

from bench import audit
from bench.compiler.audit import judge
from fastgpt.common import UserError
from tests.bench.compiler.test_audit import RTX4070, row


def stub(monkeypatch, *rows, errors=None):
    asked = []

    def run(card, **options):
        asked.append((card, options))
        return audit.Audit(card, "3.7.1", ["step gpt2-124m bf16"], [judge(r, card) for r in rows], errors or {})

    monkeypatch.setattr(audit, "run", run)
    return asked


def test_a_clean_audit_prints_a_table_and_exits_with_0(monkeypatch, capsys):
    asked = stub(
        monkeypatch, row(), row(case="adamw fp32", kernel="_sum", key="b", tensor_core={}, tensor_dots=0, dots=0)
    )
    assert audit.main(["--sample", "0", "--jobs", "1"]) == 0
    printed = capsys.readouterr().out
    figures = next(line for line in printed.splitlines() if "8.35" in line)
    assert " ".join(figures.split()) == "1 attn: forward 24 768 8.35 (35%) 128 0 32,768 2 registers 95% 64"
    assert "bf16 D=64 w8 s3, 64 HMMA.16816.F32.BF16" in printed
    assert "46 SMs" in printed and "D=64 w8 s3" in printed and "attn: sum" in printed
    assert max(map(len, printed.splitlines())) <= 120
    assert "2 micro-batches of 8 x 1024" in printed and "gate: passed" in printed and "not measurements" in printed
    assert asked == [(RTX4070, {"only": None, "shard": (1, audit.SAMPLE), "jobs": 1})]


def test_a_failed_gate_exits_with_1_and_names_kernel_case_and_figure(monkeypatch, capsys):
    stub(monkeypatch, row(stack=16), errors={"attention bf16 D80": "forward does not compile for sm_89"})
    assert audit.main(["--all"]) == 1
    failures = capsys.readouterr().err.splitlines()
    assert failures == [
        "gate: attention bf16 D80: forward does not compile for sm_89",
        "gate: forward_kernel bf16 (step gpt2-124m bf16) D=64 w8 s3: spills 16 bytes a thread, 0 loads, 0 stores",
    ]


def test_json_has_schema_card_rows_and_failures(monkeypatch, capsys):
    asked = stub(monkeypatch, row())
    assert audit.main(["--json", "--gpu", "h100", "--all"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema_version"], found["arch"], found["sms"], found["triton"]) == (1, "sm_90", 132, "3.7.1")
    assert found["gpu"] == "NVIDIA H100 80GB HBM3" and found["failures"] == [] and found["errors"] == {}
    assert found["rows"][0]["waves"] == pytest.approx(768 / 264)
    assert asked[0][1]["shard"] == (1, 1)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--arch", "sm_61"], "arch is 'sm_61': it must be one of sm_80, sm_86, sm_89, sm_90, sm_120"),
        (["--gpu", "rtx4071"], "gpu is 'rtx4071', which is not in the table: nearest are NVIDIA GeForce RTX 407"),
        (["--gpu", "v100"], "gpu is 'v100' .sm_70.: kernels are compiled for sm_80"),
        (["--gpu", "h100", "--arch", "sm_89"], "gpu is 'h100', whose arch is sm_90, not 'sm_89'"),
        (["--only", "("], "only is '[(]', which is not a regular expression"),
        (["--shard", "3/2"], "shard is '3/2': it must be K/N with 1 <= K <= N"),
        (["--shard", "x"], "shard is 'x'"),
        (["--jobs", "0"], "jobs is 0: it must be at least 1"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        audit.main(arguments)
    assert "\n" not in str(error.value)


def test_the_sample_changes_from_day_to_day_and_is_fixed_by_a_seed():
    assert audit._shard(None, 3) == audit._shard(None, 3 + audit.SAMPLE) == (4, audit.SAMPLE)
    assert {audit._shard(None, day)[0] for day in range(audit.SAMPLE)} == set(range(1, audit.SAMPLE + 1))
    assert 1 <= audit._shard(None, None)[0] <= audit.SAMPLE
    assert audit._shard("2/5", 3) == (2, 5)
