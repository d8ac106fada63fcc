"""Ctrl-C and SIGTERM: ask the loop to stop at the next good moment; a second Ctrl-C leaves at once."""

from __future__ import annotations

import signal
from typing import Any

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class StopRequest:
    """``asked`` is None, "Ctrl-C" or "SIGTERM". A context manager: puts the earlier handlers back at its end."""

    def __enter__(self) -> StopRequest:
        self.asked: str | None = None
        self._previous: dict[int, Any] = {number: signal.signal(number, self._ask) for number in _NAMES}
        return self

    def _ask(self, number: int, _frame: object) -> None:
        self.asked = _NAMES[signal.Signals(number)]
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """0 to the end or after SIGTERM (the state is saved: whoever sent it got what it wanted), 130 after Ctrl-C."""
        return 130 if self.asked == "Ctrl-C" else 0
