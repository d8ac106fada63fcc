"""The loss curve as SVG: iteration losses as dots, evaluations as lines, numbered pins where findings are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

import numpy as np

from fastgpt.doctor.evidence import LogFacts
from fastgpt.doctor.findings import Finding

WIDTH, HEIGHT = 900, 380
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 46, 40
DOTS = 2000  # a longer log is drawn thinned
Pin = tuple[int, int, Finding]  # step, number, finding
Scale = Callable[[float], float]  # a step or loss -> its place in the picture


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers from low to high, about ``count`` of them."""
    raw = max(high - low, 1e-9) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw)
    return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def loss_curve(log: LogFacts, pins: Sequence[Pin]) -> str:
    """An <svg>. The loss axis is logarithmic in the distance from a little below the lowest loss: early and late both show."""
    steps, losses = _thin(log.steps.step, log.steps.loss)
    series = [("train evaluation", "var(--warning)", *_thin(log.evals.step, log.evals.train))]
    series.append(("val", "var(--info)", *_thin(log.evals.step, log.evals.val)))
    shown = np.concatenate([losses, *(values for *_, values in series)])
    last = max([int(s[-1]) for s in (steps, series[0][2], series[1][2]) if len(s)], default=1) or 1
    low, high = float(shown.min()), float(shown.max())
    base = low - max(0.15 * (high - low), 0.05)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(loss: float) -> float:
        if high - low < 1e-6:  # a flat curve: the logarithms below would be of one number
            return (TOP + HEIGHT - BOTTOM) / 2
        part = math.log((loss - base) / (high - base)) / math.log((low - base) / (high - base))
        return TOP + (HEIGHT - TOP - BOTTOM) * part

    parts = _axes(x, y, last, low, high)
    dots = "".join(f"M{x(s):.1f} {y(v):.1f}h0" for s, v in zip(steps, losses))
    parts.append(f"<path d='{dots}' stroke='var(--dim)' stroke-opacity=.5 stroke-width=3.5 stroke-linecap=round />")
    legend = [("iteration loss", "var(--dim)")] if len(steps) else []
    for name, colour, at, values in series:
        if len(at):
            line = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(at, values))
            parts.append(f"<polyline points='{line}' fill=none stroke='{colour}' stroke-width=2 />")
            legend.append((name, colour))
    for i, (name, colour) in enumerate(legend):
        parts.append(f"<rect x={WIDTH - 330} y={TOP + 10 + 18 * i} width=14 height=4 fill='{colour}'/>")
        parts.append(f"<text x={WIDTH - 310} y={TOP + 16 + 18 * i}>{name}</text>")
    parts += _pins(pins, x, y, *(series[1][2:] if len(series[1][2]) else (steps, losses)))
    return f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role=img aria-label='Loss by step'>{''.join(parts)}</svg>"


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    good = np.flatnonzero(np.isfinite(values))
    good = good[:: max(1, math.ceil(len(good) / DOTS))]
    return steps[good], values[good]


def _axes(x: Scale, y: Scale, last: int, low: float, high: float) -> list[str]:
    parts, taken = [], math.inf
    marks = sorted({*ticks(low, low + (high - low) / 6, 4), *ticks(low, high, 7)})
    for loss in marks:
        if taken - y(loss) < 16:
            continue
        taken = y(loss)
        parts.append(f"<line x1={LEFT} x2={WIDTH - RIGHT} y1={taken:.1f} y2={taken:.1f} stroke='var(--line)'/>")
        parts.append(f"<text class=dim x={LEFT - 8} y={taken + 4:.1f} text-anchor=end>{loss:.3g}</text>")
    for step in ticks(0, last):
        parts.append(
            f"<text class=dim x={x(step):.1f} y={HEIGHT - BOTTOM + 20} "
            f"text-anchor={'middle' if x(step) < WIDTH - 40 else 'end'}>{step:,.0f}</text>"
        )
    parts.append(
        f"<text class=dim x={WIDTH - RIGHT} y={HEIGHT - 4} text-anchor=end>by step; nats per token, the axis stretched "
        "towards the lowest loss</text>"
    )
    return parts


def _pins(pins: Sequence[Pin], x: Scale, y: Scale, steps: np.ndarray, losses: np.ndarray) -> list[str]:
    """A numbered circle above each step that a finding cites, a thread down to the curve of these losses; neighbours stand
    side by side."""
    parts: list[str] = []
    taken: list[tuple[float, float]] = []
    drawn: dict[int, float] = {}  # number -> where its last pin points
    for step, number, finding in sorted(pins, key=lambda pin: (-pin[0], -pin[1])):
        if number in drawn and abs(drawn[number] - x(step)) < 24:
            continue
        drawn[number] = x(step)
        at, height = min(x(step), WIDTH - RIGHT - 10), 14.0
        while any(abs(at - other) < 22 and height == level for other, level in taken):
            at -= 22
            if at < LEFT:
                at, height = x(step), height + 22
        taken.append((at, height))
        foot = y(float(np.interp(step, steps, losses)))
        colour = f"var(--{finding.severity})"
        parts.append(
            f"<a href='#finding-{number}'><title>{escape(finding.title)}</title><line x1={at:.1f} x2={x(step):.1f} "
            f"y1={height:.1f} y2={foot:.1f} stroke='{colour}' stroke-opacity=.5 stroke-dasharray='3 3'/><circle "
            f"class=pin-{number} cx={at:.1f} cy={height:.1f} r=10 fill='{colour}'/><text class=pin x={at:.1f} "
            f"y={height + 4:.1f}>{number}</text></a>"
        )
    return parts
