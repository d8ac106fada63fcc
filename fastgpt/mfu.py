"""How fast a training step is, honestly timed, and as a share of which limit.

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
from fastgpt.common import percent
from fastgpt.hardware import cards
from fastgpt.hardware.ceilings import Ceilings, device_name
from fastgpt.performance import flops


@dataclass(frozen=True)
class StepReport:
    """Means over ``steps`` whole steps. None where there is nothing to say: no step yet, or no such denominator."""

    steps: int
    tokens: int
    seconds: float
    ms_per_step: float | None
    tokens_per_second: float | None
    mfu_nominal: float | None
    mfu_measured: float | None
    mfu_nanogpt: float | None
    formula: str
    denominator: str
    measured_denominator: str
    data_wait: float | None
    """Share of the time in which the host waited for data; the device may have had work meanwhile."""

    def format(self) -> str:
        """One line that names its formula and every denominator; n/a for what is not known."""
        if self.ms_per_step is None:
            return "no step measured yet (the first ones compile and warm up)"
        return (
            f"{self.ms_per_step:.1f} ms/step | {self.tokens_per_second:,.0f} tok/s | "
            f"MFU {percent(self.mfu_nominal)} of {self.denominator}, "
            f"{percent(self.mfu_measured)} of {self.measured_denominator}, "
            f"{percent(self.mfu_nanogpt)} in nanoGPT's unit (an A100's 312 TFLOP/s) | "
            f"{self.formula} | data wait {percent(self.data_wait)}"
        )


def _named(flops_per_second: float | None, name: str) -> str:
    return f"{name}: n/a" if flops_per_second is None else f"{flops_per_second / 1e12:.4g} TFLOP/s ({name})"


@dataclass(frozen=True)
class _StepTally:
    """What has been counted: sums only, so tallies of windows add up to the tally of the run."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def __add__(self, other: _StepTally) -> _StepTally:
        return _StepTally(
            self.steps + other.steps,
            self.tokens + other.tokens,
            self.seconds + other.seconds,
            self.waited + other.waited,
        )


class StepMeter:
    """A clock for the training loop that counts training and nothing else.

        with meter.data_wait():
            batch = next(loader)
        with meter.step(tokens):
            ...                         # forward, backward, optimizer
        with meter.excluded():
            ...                         # evaluation, checkpoint
        print(meter.report().format())

    From the end of the warm-up on, all wall time counts but what is inside ``excluded``: logging and data loading too.
    A step that raises is not counted, its time is. Tokens, FLOPs and peaks are those of this one device.
    """

    def __init__(
        self,
        device: torch.device | str,
        flops_per_token: float,
        peak_flops: float | None = None,
        *,
        formula: str = "palm",
        peak_name: str | None = None,
        measured_flops: float | None = None,
        palm_flops_per_token: float | None = None,
        warmup_steps: int = 1,
        synchronize: Callable[[], object] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """``peak_flops``: nominal, None on a card that is not in the table. ``formula``: which of flops.FORMULAS gave
        ``flops_per_token``; ``palm_flops_per_token``: for nanoGPT's figure where that is another one than palm.
        The first ``warmup_steps`` are left out. Tests put in their own ``synchronize`` and ``clock``.

        Raises ValueError for FLOPs or peaks that are not positive, an unknown formula, and a negative warm-up.
        """
        for name, value in (
            ("flops_per_token", flops_per_token),
            ("peak_flops", peak_flops),
            ("measured_flops", measured_flops),
            ("palm_flops_per_token", palm_flops_per_token),
        ):
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}: it must be positive, or None if it is not known")
        if formula not in flops.FORMULAS:
            raise ValueError(f"formula is {formula!r}: it must be one of {', '.join(flops.FORMULAS)}")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps is {warmup_steps}: it must not be negative")
        self.device = torch.device(device)
        self.flops_per_token, self.peak_flops, self.measured_flops = flops_per_token, peak_flops, measured_flops
        self.palm_flops_per_token = flops_per_token if formula == "palm" else palm_flops_per_token
        self.formula = str(flops.FORMULAS[formula])
        card = device_name(self.device)
        self.denominator = _named(peak_flops, peak_name or f"nominal dense peak of {card}")
        self.measured_denominator = _named(measured_flops, "matmul ceiling measured here")
        self._synchronize = synchronize or self._synchronize_device
        self._clock = clock
        self._warmup_left = warmup_steps
        self._since: float | None = None  # the clock when the running stretch began; None while it stands still
        self._excluded_depth = 0
        self._in_step = False
        self._window, self._before = _StepTally(), _StepTally()

    @classmethod
    def for_shape(
        cls,
        shape: anatomy.Shape,
        device: torch.device | str,
        precision: str,
        *,
        formula: str = "palm",
        ceilings: Ceilings | None = None,
        warmup_steps: int = 1,
    ) -> StepMeter:
        """A meter with every name and number filled in. ``ceilings``: what measured_ceilings(device) gives."""
        arithmetic = cards.arithmetic_of(precision)
        return cls(
            device,
            flops.FORMULAS[formula].per_token(shape),
            cards.peak_flops(device, precision),
            formula=formula,
            peak_name=f"nominal dense {arithmetic} peak of {device_name(device)}",
            measured_flops=ceilings.peak_flops(arithmetic) if ceilings else None,
            palm_flops_per_token=flops.palm(shape),
            warmup_steps=warmup_steps,
        )

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
            self._window += _StepTally(steps=1, tokens=tokens)

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
        begun = self._seconds()
        try:
            yield
        finally:
            self._window += _StepTally(waited=max(0.0, self._seconds() - begun))

    def report(self) -> StepReport:
        """Means since the last report. Waits for the device."""
        if self._in_step:
            raise RuntimeError("report() inside a step: its time would count and its tokens would not")
        self._settle()
        window, self._window = self._window, _StepTally()
        self._before += window
        return self._describe(window)

    def total(self) -> StepReport:
        """Means since the warm-up; does not begin a new report."""
        if self._in_step:
            raise RuntimeError("total() inside a step: its time would count and its tokens would not")
        self._settle()
        return self._describe(self._before + self._window)

    def _resume(self) -> None:
        self._synchronize()
        self._since = self._clock()

    def _settle(self) -> None:
        """Wait for the device and move the running stretch into the tally."""
        if self._since is None:
            return
        self._synchronize()
        now = self._clock()
        self._window += _StepTally(seconds=now - self._since)
        self._since = now

    def _seconds(self) -> float:
        """Time counted in this window up to now, as the host sees it."""
        return self._window.seconds + (0.0 if self._since is None else self._clock() - self._since)

    def _describe(self, tally: _StepTally) -> StepReport:
        measured = tally.steps > 0 and tally.seconds > 0
        rate = tally.tokens / tally.seconds if measured else None

        def share(flops_per_token: float | None, peak: float | None) -> float | None:
            return None if rate is None or flops_per_token is None or peak is None else rate * flops_per_token / peak

        return StepReport(
            steps=tally.steps,
            tokens=tally.tokens,
            seconds=tally.seconds,
            ms_per_step=1e3 * tally.seconds / tally.steps if measured else None,
            tokens_per_second=rate,
            mfu_nominal=share(self.flops_per_token, self.peak_flops),
            mfu_measured=share(self.flops_per_token, self.measured_flops),
            mfu_nanogpt=share(self.palm_flops_per_token, cards.NANOGPT_PEAK),
            formula=self.formula,
            denominator=self.denominator,
            measured_denominator=self.measured_denominator,
            data_wait=tally.waited / tally.seconds if measured else None,
        )
