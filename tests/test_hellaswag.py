"""The command that scores a checkpoint."""

from __future__ import annotations

import json

from fastgpt import hellaswag
from tests.test_convert import fastgpt_run


def test_it_scores_a_run_and_shows_a_bar_on_a_terminal_alone(tmp_path, capsys, monkeypatch):
    fastgpt_run(tmp_path / "run")
    question = {"ctx": "! ", "endings": ["!", "#", "##", "$"], "label": 1}  # bytes below its vocabulary
    (tmp_path / "val.jsonl").write_text(20 * (json.dumps(question) + "\n"))
    shown = []
    for terminal in (False, True):
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal)
        assert hellaswag.main([str(tmp_path / "run"), "--data", str(tmp_path / "val.jsonl"), "--device", "cpu"]) == 0
        shown.append(capsys.readouterr())
    assert shown[0].out == shown[1].out and "20" in shown[0].out
    assert not shown[0].err and "scoring" in shown[1].err
