"""Loss spikes, told from noise by a z-score over the last steps (as llm.c's outlier detector does)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

WINDOW = 128


class SpikeDetector:
    """Mean and standard deviation of the last ``WINDOW`` losses; silent until the window is full.

    ``state`` is the window, for a checkpoint: a resumed run calls the same losses spikes.
    """

    def __init__(self, state: Iterable[float] = ()) -> None:
        self._window = deque(state, maxlen=WINDOW)

    @property
    def state(self) -> list[float]:
        return list(self._window)

    def zscore(self, loss: float) -> float | None:
        """How many standard deviations ``loss`` lies above the window, which it then joins. None where there is no saying:
        too few losses, no spread, or a loss that is not finite (which never joins)."""
        if not math.isfinite(loss):
            return None
        full, values = len(self._window) == WINDOW, self.state
        self._window.append(loss)
        if not full:
            return None
        mean = math.fsum(values) / WINDOW
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / WINDOW)
        return (loss - mean) / deviation if deviation > 0 else None
