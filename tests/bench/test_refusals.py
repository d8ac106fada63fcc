"""Everything that a command has to refuse is refused; and the campaign itself sees what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import refusals
from bench.refusals import Input
from fastgpt import command
from fastgpt.common import UserError


def test_every_command_refuses_what_it_cannot_obey():
    tally = refusals.campaign()
    assert [f"{case.words} {case.about}: {problem}" for case, problem in tally.short] == []
    assert tally.tried.total() >= 1000 and min(tally.tried.values()) >= 20


def test_all_commands_take_part():
    names = {name for name, _ in refusals.commands()}
    assert {"train", "sample", "doctor", "plan", "prepare", "convert", "plot", "hellaswag", "hardware", "env"} <= names
    assert {"data check", "bench mfu", "bench kernels", "bench gpu", "bench tune", "bench refusals"} <= names
    assert command.show_help.__module__ == "fastgpt.command"  # put back


@pytest.mark.parametrize(
    ("does", "says"),
    [
        (lambda: 0, "ended with 0"),
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda: fail("two\nlines"), "said 'error: two"),
        (lambda: fail("x" * 5000), None),  # the ends of a long name
        (lambda: fail("word " * 5000), "said 'error: word"),
        (lambda: fail("of something else"), "without 'wrong|xxx'"),
        (lambda: Path("new").touch() or fail("wrong"), "wrote new"),
        (lambda: Path("old").write_text("other") and fail("wrong"), "wrote old"),
        (lambda: bytearray(64 << 30) and 0, "MemoryError"),
        (lambda: fail("wrong"), None),
    ],
)
def test_what_falls_short_is_seen(tmp_path, monkeypatch, does, says):
    (tmp_path / "old").write_text("old")
    monkeypatch.setattr(refusals, "_main", lambda args: does())
    found = refusals.judge(Input("kind", "words", says="wrong|xxx"), tmp_path)
    assert found is None if says is None else says in found
    assert Path.cwd() != tmp_path


def fail(sentence):
    raise UserError(sentence)


def test_a_command_that_waits_for_ever_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(refusals, "SECONDS", 1)
    refusals.fifo("pipe")(tmp_path)
    monkeypatch.setattr(refusals, "_main", lambda args: Path("pipe").read_text())
    assert refusals.judge(Input("kind", "words"), tmp_path) == "ended with 'hangs'"


def test_one_kind_alone_and_an_unknown_one(monkeypatch, capsys):
    monkeypatch.setattr(
        refusals, "CAMPAIGN", (lambda: iter([Input("card", "hardware rtx9999"), Input("size", "plan")]),)
    )
    monkeypatch.setattr(refusals, "prepare", lambda folder: None)
    assert refusals.main(["--kind", "card"]) == 0
    assert "tried" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"kind is 'cards' .did you mean 'card'"):
        refusals.main(["--kind", "cards"])
