"""A GPU that is not here: its step as projected, its kernels as compiled, and the tables of both."""

from __future__ import annotations

import re

import pytest

from bench.compiler.audit import Audit
from bench.reports import elsewhere as tables
from bench.reports import mfu_tables
from bench.steps import elsewhere
from fastgpt.hardware import cards
from fastgpt.performance import memory
from tests.bench.mfu_run import AUDIT_ROW, result

__all__ = ["result"]  # a fixture


def test_the_projection_says_that_it_is_one_beside_its_error(result):
    found = result[0]["projection"]
    assert found["gpu"] == "NVIDIA GeForce RTX 4070" and found["model"] == "gpt2-124m"
    assert set(found["variants"]) == set(memory.KERNELS)
    for row, variant in zip(tables.projection_cells(found)[1:], found["variants"].values()):
        assert variant["tokens_per_second_low"] < variant["tokens_per_second"] < variant["tokens_per_second_high"]
        assert row[-1].startswith("projected") and "calibration error" in row[-1]
    notes = tables.projection_notes(found)
    assert "projection" in notes[0] and re.search(r"Calibration error \d+\.\d%", notes[1])
    sums = tables.projected_operation_cells(found)
    assert sums[0][0] == "operation" and sums[-1][0] == "sum" and any(row[0] == "attention backward" for row in sums)


def test_an_experimental_precision_is_projected_beside_bf16():
    found = elsewhere.projection("gpt2-40m", cards.card("rtx4070"), "fp8")
    assert [*found["variants"]] == [*memory.KERNELS, "triton fp8"]
    assert found["variants"]["triton fp8"]["precision"] == "fp8" and mfu_tables.projected_in(found) == ", bf16, fp8"
    assert tables.projection_notes(found)[-1] == (
        "MFU: bf16: nominal dense bf16 peak, 58.3 TFLOP/s; fp8: nominal dense fp8 peak, 116.6 TFLOP/s."
    )
    assert "triton fp8, ms" in tables.projected_operation_cells(found)[0]


@pytest.mark.parametrize(
    ("precision", "case"),
    [("fp32", "step gpt2-124m bf16"), ("fp8", "step gpt2-124m fp8"), ("fp16-fast", "step gpt2-124m fp16-fast")],
)
def test_the_audit_is_of_the_precision_that_is_asked_for(precision, case, monkeypatch):
    asked = []
    monkeypatch.setattr(
        elsewhere, "run", lambda card, *, only, shard: asked.append(only) or Audit(card, "3", [], [], {})
    )
    found = elsewhere.audit(cards.card("rtx3090"), precision)
    assert asked == [f"^{case}$"] and found["error"] == f"NVIDIA GeForce RTX 3090 cannot run {case}", (
        "nothing to compile"
    )


def test_a_card_without_the_arithmetic_is_said_and_not_a_crash():
    found = elsewhere.projection("gpt2-40m", cards.card("v100"))
    assert found["model"] == "gpt2-40m" and all("bf16" in v["error"] for v in found["variants"].values())
    assert tables.projection_cells(found)[1][-1] == found["variants"]["nanogpt-compile"]["error"]


def test_an_audit_that_cannot_compile_is_reported(monkeypatch):
    def no_compiler(*_, **__):
        raise RuntimeError("ptxas not found\nsecond line")

    monkeypatch.setattr(elsewhere, "run", no_compiler)
    found = elsewhere.audit(cards.card("rtx4070"))
    assert found["error"] == "ptxas not found" and found["arch"] == "sm_89"
    assert elsewhere.audit(cards.card("v100"))["error"].startswith("gpu is ")


def test_the_audit_asks_for_the_shipped_step_of_this_card(monkeypatch):
    asked = {}

    def run(card, *, only, shard):
        asked.update(card=card, only=only, shard=shard)
        return Audit(card, "3.7.1", [], [AUDIT_ROW], {})

    monkeypatch.setattr(elsewhere, "run", run)
    monkeypatch.setattr(Audit, "failures", property(lambda self: []))
    found = elsewhere.audit(cards.card("rtx4070"))
    assert asked["card"].name == "NVIDIA GeForce RTX 4070" and re.search(asked["only"], "step gpt2-124m bf16")
    assert tables.audit_cells(found)[1][:3] == ["attn: forward", "24", "128"]
    assert "no spills" in tables.audit_note(found)
