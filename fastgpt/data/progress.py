"""Report the progress of a preparation: a bar on a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from fastgpt.common import duration, rounded

if TYPE_CHECKING:
    from rich.console import Console

LINE_SECONDS = 30.0


class ProgressReport:
    """``with ProgressReport(...) as report: report.update(tokens, share)``.

    Args:
        label: the name of the corpus.
        tokens: the tokens written by an earlier process, which do not count towards the rate.
        console: default stderr.
    """

    def __init__(self, label: str, tokens: int, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.label = label
        self.console = console or Console(stderr=True, soft_wrap=True, highlight=False)
        self._first_tokens = tokens
        self._first_share: float | None = None
        self._begin = self._said = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(show_speed=False),
            TextColumn("{task.fields[counts]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task(label, total=None, counts="")

    def __enter__(self) -> ProgressReport:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def update(self, tokens: int, share: float | None) -> None:
        """``tokens``: written in total; ``share``: of the corpus, None if unknown."""
        now = time.monotonic()
        if self._first_share is None:
            self._first_share = share
        counts = f"{rounded(tokens)} tokens, {rounded((tokens - self._first_tokens) / max(1e-9, now - self._begin))}/s"
        self._bar.update(self._task, total=None if share is None else 1.0, completed=share or 0.0, counts=counts)
        if not self.console.is_terminal and now - self._said >= LINE_SECONDS:
            self._said = now
            self.console.print(f"{self.label}: {counts}{self._outlook(share, now)}", markup=False)

    def _outlook(self, share: float | None, now: float) -> str:
        if share is None:
            return ""
        progress = share - (self._first_share or 0.0)
        if progress <= 0:
            return f", {share:.1%}"
        return f", {share:.1%}, ETA {duration((now - self._begin) * (1 - share) / progress)}"
