"""Tables on a terminal, with rich and without it."""

from __future__ import annotations

import sys

import pytest

from bench.reports import tables


@pytest.mark.parametrize("rich", [True, False])
def test_a_table_is_printed_with_rich_or_without(rich, monkeypatch, capsys):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    console = tables.terminal(80)
    tables.print_table(console, "title", [["what", "ms"], ["a|b", "1.5"]], narrow=True)
    console.print("a note", style="yellow")
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("title", "what", "1.5", "a note")) and ("| --- |" in shown) == (not rich)


def test_a_command_that_is_silent_says_that_it_is_at_work(monkeypatch, capsys):
    monkeypatch.setattr(tables, "SILENT_SECONDS", 0.01)
    with tables.waiting("compiling"):
        while not (said := capsys.readouterr().err):
            pass
    assert said.startswith("compiling: 0 s so far\n")
