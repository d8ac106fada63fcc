"""Report the progress of a preparation: a bar on a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastgpt import common
from fastgpt.common import duration, rounded

LINE_SECONDS = 30.0


class ProgressReport(Progress):
    """``with ProgressReport(...) as report: report.show(tokens, share)``.

    Args:
        label: the name of the corpus.
        tokens: the tokens written by an earlier process, which do not count towards the rate.
        console: default stderr.
    """

    def __init__(self, label: str, tokens: int, console: Console | None = None) -> None:
        console = console or common.console(stderr=True, soft_wrap=True, highlight=False)
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(show_speed=False),
            TextColumn("{task.fields[counts]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._label = label
        self._bar = self.add_task(label, total=None, counts="")
        self._first_tokens = tokens
        self._first_share: float | None = None
        self._begin = self._said = time.monotonic()

    def show(self, tokens: int, share: float | None) -> None:
        """``tokens``: written in total; ``share``: of the corpus, None if unknown."""
        now = time.monotonic()
        seconds = now - self._begin
        if self._first_share is None:
            self._first_share = share
        counts = f"{rounded(tokens)} tokens, {rounded((tokens - self._first_tokens) / max(1e-9, seconds))}/s"
        self.update(self._bar, total=None if share is None else 1.0, completed=share or 0.0, counts=counts)
        if self.disable and now - self._said >= LINE_SECONDS:
            self._said = now
            line = f"{self._label}: {counts}"
            if share is not None:
                line += f", {share:.1%}"
                if (progress := share - (self._first_share or 0.0)) > 0:
                    line += f", ETA {duration(seconds * (1 - share) / progress)}"
            self.console.print(line, markup=False)
