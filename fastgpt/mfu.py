"""How fast a training step is, honestly timed, and as a share of the card's peak.

Three mistakes make most printed MFU wrong: the clock stops before the device does; evaluation, checkpoints and
compilation run inside it; and the peak is some other card's. ``StepMeter`` waits for the device only to report or to
leave time out: the queue stays full in between, and the mean does not depend on how often one asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fastgpt import anatomy
from fastgpt.hardware import cards
from fastgpt.performance import flops


@dataclass(frozen=True)
class StepReport:
    """Means over ``steps`` whole steps. None where there is nothing to say: no step yet, or a card whose peak is unknown."""

    steps: int
    tokens: int
    seconds: float
    ms_per_step: float | None
    tokens_per_second: float | None
    mfu: float | None
    data_wait: float | None
    """Share of the time in which the host waited for data; the device may have had work meanwhile."""


class StepMeter:
    """A clock for the training loop that counts training and nothing else.

        with meter.data_wait():
            batch = next(loader)
        with meter.step(tokens):
            ...                         # forward, backward, optimizer
        with meter.excluded():
            ...                         # evaluation, checkpoint
        report = meter.report()

    From the end of the warm-up on, all wall time counts but what is inside ``excluded``: logging and data loading too.
    A step that raises is not counted, its time is. Tokens, FLOPs and the peak are those of this one device.
    """

    def __init__(
        self,
        device: torch.device | str,
        flops_per_token: float,
        peak_flops: float | None = None,
        *,
        warmup_steps: int = 1,
        synchronize: Callable[[], object] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """``peak_flops``: FLOP per second, None on a card that is not in the table. The first ``warmup_steps`` are left out.
        Tests put in their own ``synchronize`` and ``clock``."""
        self.device = torch.device(device)
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self._synchronize = synchronize or self._synchronize_device
        self._clock = clock
        self._warmup_left = warmup_steps
        self._since: float | None = None  # the clock when the running stretch began; None while it stands still
        self._excluded_depth = 0
        self._in_step = False
        self._begin_report()

    @classmethod
    def for_shape(cls, shape: anatomy.Shape, device: torch.device | str, precision: str) -> StepMeter:
        """A meter for a model of this shape: FLOPs by PaLM's formula (appendix B of arXiv:2204.02311, as nanoGPT's), over
        the card's nominal dense peak in ``precision``."""
        return cls(device, flops.palm(shape), cards.peak_flops(device, precision))

    def _begin_report(self) -> None:
        self._steps = self._tokens = 0
        self._seconds = self._waited = 0.0

    def _synchronize_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """Measure one step of ``tokens`` tokens. It is launched at the end, and may not be done; not counted if it raises."""
        if self._in_step:
            raise RuntimeError("a step is already being measured: end it first")
        if self._excluded_depth:
            raise RuntimeError("a step begins inside excluded(): leave it first")
        if self._since is None and not self._warmup_left:
            self._resume()
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False
        if self._warmup_left:
            self._warmup_left -= 1
            if not self._warmup_left:
                self._resume()
        else:
            self._steps += 1
            self._tokens += tokens

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Leave this out of the time: evaluation, checkpoints, compilation. May be nested, and be inside a step."""
        running = self._since is not None
        self._settle()
        self._since = None
        self._excluded_depth += 1
        try:
            yield
        finally:
            self._excluded_depth -= 1
            if running:
                self._resume()

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """The host waits for data here: counted as time, and reported as a share of it."""
        begun = self._counted()
        try:
            yield
        finally:
            self._waited += max(0.0, self._counted() - begun)

    def report(self) -> StepReport:
        """Means since the last report. Waits for the device."""
        if self._in_step:
            raise RuntimeError("report() inside a step: its time would count and its tokens would not")
        self._settle()
        steps, tokens, seconds, waited = self._steps, self._tokens, self._seconds, self._waited
        self._begin_report()
        if not steps or not seconds:
            return StepReport(steps, tokens, seconds, None, None, None, None)
        rate = tokens / seconds
        return StepReport(
            steps,
            tokens,
            seconds,
            ms_per_step=1e3 * seconds / steps,
            tokens_per_second=rate,
            mfu=None if self.peak_flops is None else rate * self.flops_per_token / self.peak_flops,
            data_wait=waited / seconds,
        )

    def _resume(self) -> None:
        self._synchronize()
        self._since = self._clock()

    def _settle(self) -> None:
        """Wait for the device and count the running stretch."""
        if self._since is None:
            return
        self._synchronize()
        now = self._clock()
        self._seconds += now - self._since
        self._since = now

    def _counted(self) -> float:
        """Seconds counted since the last report, up to now, as the host sees it."""
        return self._seconds + (0.0 if self._since is None else self._clock() - self._since)
