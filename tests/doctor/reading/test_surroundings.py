"""Tokens of the training data, from the sizes of its files."""

from __future__ import annotations

from fastgpt.doctor.evidence import Evidence
from fastgpt.doctor.reading.surroundings import corpus_tokens
from tests.doctor.runs import config


def test_the_corpus_is_measured_where_nanogpt_keeps_it(tmp_path, monkeypatch):
    folder = tmp_path / "data" / "mine"
    folder.mkdir(parents=True)
    (folder / "train.bin").write_bytes(b"\0" * 2000)
    (folder / "val.bin").write_bytes(b"\0" * 500)
    monkeypatch.chdir(tmp_path)
    assert corpus_tokens(Evidence(config("dataset = 'mine'"))) == 1000
    assert corpus_tokens(Evidence(config("dataset = 'other'"))) is None
    assert corpus_tokens(Evidence(config("dataset = '\\0'"))) is None
    assert corpus_tokens(Evidence()) is None
