"""Rows of numbers from a log of any length, in bounded memory: thinned evenly by powers of two; then put in order."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence

import numpy as np

STRAGGLERS = 8
"""Step lines within which a step that went back is the output of another rank, not a run begun again."""


class Series:
    """Rows of ``columns`` numbers, at most ``limit`` of them. When it is full every second row goes, and from then on one
    row in ``stride`` is kept; the first row always, the last by ``add_last``."""

    def __init__(self, columns: int, limit: int) -> None:
        self._rows = np.empty((limit, columns), np.float64)
        self._used = 0
        self.seen = 0
        self.stride = 1

    def add(self, row: Sequence[float]) -> None:
        """The next row. Whoever has many may count one that would be dropped (``seen % stride``) without making it."""
        if self.seen % self.stride == 0:
            if self._used == len(self._rows):
                self._thin()
            if self.seen % self.stride == 0:
                self._rows[self._used] = row
                self._used += 1
        self.seen += 1

    def add_last(self, row: Sequence[float]) -> None:
        """Keep the last row whatever the stride."""
        if self._used == len(self._rows):
            self._thin()
        self._rows[self._used] = row
        self._used += 1

    def rows(self) -> np.ndarray:
        return self._rows[: self._used]

    def _thin(self) -> None:
        half = (self._used + 1) // 2
        self._rows[:half] = self._rows[: self._used : 2].copy()
        self._used, self.stride = half, self.stride * 2


def in_order(rows: np.ndarray, step_column: int = 0) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """Rows with strictly rising steps, and where the run was begun again: (index of the row, step before, step it went back
    to).

    A step that is printed again at once (by another rank) counts as printed last. Where a run was begun again, what it had
    done past that step is dropped. A step that goes back for a moment (a rank that lags, a garbled digit) fills a gap or is
    dropped."""
    steps = rows[:, step_column]
    back: list[tuple[int, int, int]] = []
    order: list[float] = []  # steps kept, rising
    row_of: dict[float, int] = {}
    first = top = -np.inf
    for i, step in enumerate(steps):
        if step < top:
            coming = steps[i + 1 : i + 1 + STRAGGLERS]
            lag = len(order) - bisect_right(order, step)
            at_end = len(coming) == 0 or (len(coming) < STRAGGLERS and lag < STRAGGLERS)
            if at_end or (coming > top).any():
                if step > first and step not in row_of:
                    insort(order, step)
                    row_of[step] = i
                continue
            back.append((i, int(top), int(step)))
            dropped = bisect_left(order, step)
            for done in order[dropped:]:
                del row_of[done]
            del order[dropped:]
            first = step
        elif not order:
            first = step
        if step not in row_of:
            order.append(step)
        row_of[step] = i
        top = step
    return rows[[row_of[step] for step in order]], back
