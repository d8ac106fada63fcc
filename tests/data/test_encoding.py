"""Tokenising that is cut short does not wait for what was begun."""

import threading

import pytest

from fastgpt.data import corpora, encoding
from fastgpt.data.tokenizer import get_tokenizer


def test_ctrl_c_does_not_wait_for_a_document_that_takes_long(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text " * 100)
    release, waited = threading.Event(), []
    real = encoding.encode_texts

    def slow(tok, texts, seed):
        waited.append(release.wait(30))
        return real(tok, texts, seed)

    monkeypatch.setattr(encoding, "encode_texts", slow)
    monkeypatch.setattr(encoding, "BATCH_CHARS", 100)
    reading = corpora.open_corpus(tmp_path).read()
    tasks = encoding.encode_corpus(reading, get_tokenizer("bytes"), 0, 2, processes=False)
    monkeypatch.setattr(encoding, "_all_but", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        next(tasks)
    assert not waited  # it is still at work
    release.set()
