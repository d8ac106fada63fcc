"""Signs of life of the ranks: none waits long for one that is gone.

A collective waits for every rank, on a GPU without an end, and the main thread cannot be interrupted there. So a thread of each
rank renews a counter in the store that torchrun (or rank 0) keeps, looks at the others' counters, and ends its process in one
sentence when a rank has stopped for too long, has died, or says that it fails.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from fastgpt.checkpoints.lock import is_running, this_process


def restart(rank: int) -> str:
    """The end of a sentence about a rank that is gone: what becomes of ``rank``, and what to do."""
    return (
        f"so rank {rank} stops: start again, with --resume if there is a checkpoint (on any number of GPUs that divides "
        "grad_accum)"
    )


class Watch:
    """The thread of rank ``rank`` of ``size``. ``patience``: seconds without a sign of life after which one is given up, also
    one that never came: where it ended with exit code 0 torchrun says nothing. ``end(sentence)`` is called from the thread when
    the run cannot go on: it has to end the process."""

    def __init__(
        self, store: Any, rank: int, size: int, patience: float, end: Callable[[str], None], pulse: float | None = None
    ) -> None:
        self.rank, self.size, self.patience, self.end = rank, size, patience, end
        self._store = store.clone()  # a connection of its own: the main thread may be waiting over the other
        self._pulse = pulse or min(1.0, patience / 5)
        # Looks in a row without news of a rank: counted and not timed, as this process may have been stopped as well.
        self._silent: Counter[int] = Counter()
        self._seen: dict[int, int] = {}
        self._over = threading.Event()
        self._store.set(f"who/{rank}", json.dumps(this_process()))
        self._thread = threading.Thread(target=self._run, name="watch over the ranks", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No more: this rank leaves the run, and the caller says why. Also ``fail`` or ``leave``."""
        self._over.set()
        self._thread.join(timeout=10)

    def fail(self, sentence: str) -> None:
        """Tell the other ranks that this one cannot go on: they end, and say so."""
        with suppress(RuntimeError):
            if not self._store.check(["failed"]):
                self._store.set("failed", json.dumps([self.rank, sentence]))
            self._wait_for_all("told", 5)
            self._go_last()

    def leave(self) -> None:
        """Tell the other ranks that this one has done its work, and wait for theirs."""
        with suppress(RuntimeError):
            self._wait_for_all("left", int(self.patience / self._pulse))

    def _wait_for_all(self, word: str, pulses: int) -> None:
        """The store may be rank 0's: it is the last to leave, when the others have read all they need."""
        for step in (word, f"{word} and done"):
            self._store.set(f"{step}/{self.rank}", "")
            if step == word or self.rank == 0:
                self._wait(pulses, partial(self._store.check, [f"{step}/{rank}" for rank in range(self.size)]))

    def _go_last(self) -> None:
        """Wait, as rank 0, until the others have ended: one that still asks the store by then prints a page of C++ trace."""
        if self.rank == 0:
            self._wait(5, lambda: not any(self._runs(rank) for rank in range(1, self.size)))

    def _wait(self, pulses: int, done: Callable[[], bool]) -> None:
        for _ in range(10 * pulses):
            if done():
                return
            time.sleep(self._pulse / 10)

    def _runs(self, rank: int) -> bool | None:
        """Whether the process of a rank runs; None where this cannot be known."""
        who = f"who/{rank}"
        return is_running(json.loads(self._store.get(who))) if self._store.check([who]) else None

    def reason(self) -> str | None:
        """Why the run cannot go on, in one sentence; None while it can."""
        try:
            self._store.add(f"alive/{self.rank}", 1)
            gone = next(filter(None, (self._gone(rank) for rank in range(self.size) if rank != self.rank)), None)
            if self._store.check(["failed"]):  # looked up after a rank was found dead: it may have said why
                rank, sentence = json.loads(self._store.get("failed"))
                self._store.set(f"told/{self.rank}", "")
                self._go_last()
                return f"rank {rank} stopped, and with it rank {self.rank}: {sentence}"
        except RuntimeError:  # of a store whose process has ended
            return self._no_store()
        return gone and f"{gone}, {restart(self.rank)}"

    def _no_store(self) -> str:
        return f"the process that connects the ranks of this run is gone, {restart(self.rank)}"

    def _gone(self, rank: int) -> str | None:
        """That a rank is gone, and how this is known; None while it is not."""
        count, silent = self._store.add(f"alive/{rank}", 0), self._silent
        silent[rank] = 0 if count != self._seen.get(rank, 0) else silent[rank] + 1
        self._seen[rank] = count
        if not silent[rank] or self._store.check([f"left/{rank}"]):
            return None
        seconds = silent[rank] * self._pulse
        if self._runs(rank) is False:
            return f"rank {rank} of this run is gone (its process has ended)"
        if seconds >= self.patience:
            return f"rank {rank} of this run is gone (no sign of life for {seconds:.0f} s, --rank-timeout)"
        return None

    def _run(self) -> None:
        while not self._over.wait(self._pulse):
            # A store whose process was stopped takes every question and never answers.
            unanswered = threading.Timer(self.patience, self.end, [self._no_store()])
            unanswered.daemon = True
            unanswered.start()
            sentence = self.reason()
            unanswered.cancel()
            if sentence is not None and not self._over.is_set():
                self.end(sentence)
                return
