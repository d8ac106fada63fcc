"""Tables of results: rows of strings whose first row is the head, printed on a terminal or written as Markdown."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fastgpt import common

if TYPE_CHECKING:
    from rich.console import Console

Cells = list[list[str]]
SILENT_SECONDS = 5.0
"""How long a command says nothing, at most, before it says that it is at work; from then on every half minute."""


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Inside, where nothing is printed until all is done: ``what`` is being done, and for how long, on standard error."""
    done, began = threading.Event(), time.monotonic()

    def tell() -> None:
        seconds = SILENT_SECONDS
        while not done.wait(seconds):
            print(f"{what}: {common.duration(time.monotonic() - began)} so far", file=sys.stderr, flush=True)
            seconds = 6 * SILENT_SECONDS

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


def is_figures(cells: Cells, column: int) -> bool:
    """Whether a column holds figures, or words that stand for a missing one. Such a column is aligned to the right."""
    return all(row[column][:1] in "-+0123456789" or row[column] in ("n/a", "failed") for row in cells[1:])


def terminal(width: int) -> Console:
    """A console as wide as the terminal, or of ``width`` columns where the output goes to a file or another program."""
    return common.console(width=None if sys.stdout.isatty() else width, highlight=False)


def print_table(
    console: Console,
    title: str,
    cells: Cells,
    style: Callable[[list[str]], str | None] = lambda row: None,
    *,
    narrow: bool = False,
) -> None:
    """Print a table under its title. Figures are never cut; text wraps where the terminal is narrow. ``style``: of a row.
    ``narrow``: less space between the columns, and none around them."""
    if isinstance(console, common.PlainConsole):
        print(title, markdown(cells), sep="\n")
        return
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    padding = (0, 1, 0, 0) if narrow else (0, 1)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=padding, show_edge=not narrow)
    for i, name in enumerate(cells[0]):
        figures = is_figures(cells, i)
        table.add_column(
            name,
            justify="right" if figures else "left",
            overflow="fold",
            min_width=max((len(row[i]) for row in cells[1:]), default=0) if figures else None,
        )
    for row in cells[1:]:
        table.add_row(*map(escape, row), style="bold" if row[0] == "sum" else style(row))
    console.print(f"\n[bold]{escape(title)}[/]" if title else "", soft_wrap=True)
    console.print(table)


def markdown(cells: Cells, *, right: bool = False) -> str:
    """The table in Markdown, without a line break at its end. ``right``: all columns but the first are aligned to the right."""
    rule = ["---"] + ["---:" if right else "---"] * (len(cells[0]) - 1)
    lines = [[cell.replace("|", "/").replace("\n", " ") for cell in row] for row in cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))
