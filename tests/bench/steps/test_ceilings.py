"""Measured ceilings: kept per machine, measured again when the file is not theirs, and torch left as it was."""

from __future__ import annotations

import json

import pytest
import torch

from bench.steps import ceilings
from fastgpt.hardware.cards import ARITHMETICS


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fastgpt"


def test_ceilings_are_measured_once_per_machine(device, cache, monkeypatch):
    measured = ceilings.measured_ceilings(device)
    assert measured.copy_gbs > 0.1
    assert set(measured.matmul_tflops) == set(ARITHMETICS)
    assert measured.peak_flops("fp32") > 1e8
    (file,) = cache.iterdir()
    monkeypatch.setattr(ceilings, "_matmul_tflops", lambda arithmetic, device: 7.0)
    monkeypatch.setattr(ceilings, "_copy_gbs", lambda device: 8.0)
    assert ceilings.measured_ceilings(device) == measured
    for broken in ("{", "[]", "{}", json.dumps({**json.loads(file.read_text()), "copy_gbs": -1})):
        file.write_text(broken)
        assert ceilings.measured_ceilings(device).copy_gbs == 8.0
    assert ceilings.measured_ceilings(device, refresh=True).peak_flops("bf16") == 7e12
    if device.type == "cpu":
        assert measured.matmul_tflops["tf32"] is None and measured.peak_flops("tf32") is None
        assert measured.threads == torch.get_num_threads()


def test_measuring_leaves_torch_as_it_was(device):
    before = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_fp16_accumulation
    for arithmetic in ("tf32", "fp16_fp16acc"):
        with ceilings._matmul_mode(arithmetic):
            changed = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_fp16_accumulation
            assert changed == (("high", False) if arithmetic == "tf32" else ("highest", True))
    assert (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_fp16_accumulation) == before


def test_a_cache_that_cannot_be_written_is_said_and_survived(device, tmp_path, monkeypatch, capsys):
    (tmp_path / "fastgpt").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(ceilings, "_matmul_tflops", lambda arithmetic, device: None)
    monkeypatch.setattr(ceilings, "_copy_gbs", lambda device: 8.0)
    assert ceilings.measured_ceilings(device).copy_gbs == 8.0
    assert "are not kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("fp32", ("fp32",)), ("bf16", ("bf16",)), ("fp8", ("fp8", "bf16")), ("fp16-fast", ("fp16_fp16acc", "fp16"))],
)
def test_arithmetics_begin_with_the_one_that_mfu_is_a_share_of(precision, expected):
    assert ceilings.arithmetics(precision) == expected
