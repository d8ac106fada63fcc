"""Pictures of runs: loss, learning rate, gradient norm and speed, of this package's runs and of nanoGPT, nanochat and llm.c
logs on one picture.

    python -m fastgpt.plot runs/gpt2-124m
    python -m fastgpt.plot runs/new old-nanogpt.log --out compare.png
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from fastgpt import command, common
from fastgpt.checkpoints.folder import METRICS
from fastgpt.command import Arg
from fastgpt.common import UserError, at_least
from fastgpt.doctor.reading.logs import read_log
from fastgpt.training import metrics


@dataclass(frozen=True)
class Curves:
    """What a run logged, by step: arrays of one length per group, NaN where a line did not say."""

    name: str
    step: np.ndarray
    loss: np.ndarray
    lr: np.ndarray
    grad_norm: np.ndarray
    tokens_per_second: np.ndarray
    eval_step: np.ndarray
    val_loss: np.ndarray


def read(path: Path, tokens_per_step: int | None = None) -> Curves:
    """A run's folder, its metrics.jsonl, or a log file of this package, nanoGPT, nanochat or llm.c.

    ``tokens_per_step`` is for logs that give times but no rate, and do not say it themselves. Raises UserError for what
    cannot be read, and for a log without a step.
    """
    if (path / METRICS if path.is_dir() else path).name == METRICS:
        return _of_records(path if path.is_dir() else path.parent, metrics.read(path))
    if not path.is_file():
        raise UserError(f"{path} is neither a run's folder nor a log file: name one that exists")
    log = read_log(path)
    if len(log.steps) == 0:
        raise UserError(f"{path} holds no training step that could be drawn: name a log of a run")
    said = [note.value for note in log.all("tokens_per_step") if note.value]
    tokens_per_step = tokens_per_step or (said[-1] if said else None)
    rate = log.steps.tokens_per_second
    if tokens_per_step:
        rate = np.where(np.isnan(rate), 1e3 * tokens_per_step / np.where(log.steps.ms > 0, log.steps.ms, np.nan), rate)
    nothing = np.full(len(log.steps), np.nan)
    return Curves(path.stem, log.steps.step, log.steps.loss, log.steps.lr, nothing, rate, log.evals.step, log.evals.val)


def _of_records(folder: Path, records: Sequence[dict[str, Any]]) -> Curves:
    def columns(key: str, *names: str) -> list[np.ndarray]:
        """These fields of the records that have a step and ``key``."""
        rows = [record for record in records if "step" in record and key in record]
        return [np.array([row.get(name) for row in rows], dtype=float) for name in names]

    steps = columns("loss", "step", "loss", "lr", "grad_norm", "tokens_per_second")
    if not len(steps[0]):
        raise UserError(f"{folder} holds no training step yet: wait for its first log line")
    return Curves(folder.resolve().name, *steps, *columns("val_loss", "step", "val_loss"))


def draw(runs: Sequence[Curves], path: Path) -> Path:
    """One PNG with four panels; training loss as a line (a running mean over the noise of many steps), validation as dots.

    Raises UserError where matplotlib is missing or ``path`` cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib, which is not installed: pip install matplotlib") from error
    figure = Figure(figsize=(11, 7), layout="constrained")
    titles = {
        "loss": "loss, nats per token",
        "lr": "learning rate",
        "tokens_per_second": "tokens per second",
        "grad_norm": "gradient norm before clipping",
    }
    panels = dict(zip(titles, figure.subplots(2, 2).flat))
    for number, run in enumerate(runs):
        colour = f"C{number % 10}"
        for name, axes in panels.items():
            values = getattr(run, name)
            known = ~np.isnan(values)
            step, values = run.step[known], values[known]
            if name in ("loss", "grad_norm") and len(values) > 200:
                axes.plot(step, values, color=colour, alpha=0.2, linewidth=0.7)
                step, values = _running_mean(step, values)
            if len(values):
                dot = "." if len(values) == 1 else None
                axes.plot(step, values, color=colour, linewidth=1.4, marker=dot, label=run.name)
        if len(run.val_loss):
            label = f"{run.name}, validation"
            panels["loss"].plot(run.eval_step, run.val_loss, "o", color=colour, markersize=3.5, label=label)
    for name, axes in panels.items():
        axes.set_title(titles[name], loc="left", fontsize=10)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        axes.margins(x=0.02)
        if axes.lines:
            axes.legend(fontsize=8)
        else:
            axes.set(xticks=[], yticks=[], xlabel="")
            axes.text(0.5, 0.5, "not in these logs", ha="center", va="center", transform=axes.transAxes, color="0.5")
    panels["tokens_per_second"].set_ylim(bottom=0)
    panels["tokens_per_second"].yaxis.set_major_formatter("{x:,.0f}")
    # The first losses, far above the part that differs, may leave the picture.
    losses = np.concatenate([run.loss[np.isfinite(run.loss)] for run in runs])
    if len(losses) >= 100:
        low, high = float(losses.min()), float(np.quantile(losses, 0.97))
        panels["loss"].set_ylim(low - 0.05 * (high - low), high + 0.3 * (high - low))
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"out is {path}, which cannot be written ({reason}): name another .png file") from error
    return path


def _running_mean(step: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over a fiftieth of the points, at the middle of each window."""
    width = max(2, len(values) // 50)
    window = np.full(width, 1 / width)
    return np.convolve(step, window, "valid"), np.convolve(values, window, "valid")


@dataclass(frozen=True)
class PlotConfig:
    """Draw loss, learning rate, gradient norm and tokens/s of one or more runs on one picture.

    Examples:
      python -m fastgpt.plot runs/gpt2-124m                        writes runs/gpt2-124m/curves.png
      python -m fastgpt.plot runs/new old-nanogpt.log --out compare.png
      python -m fastgpt.plot old-nanogpt.log --tokens-per-step 524288
    """

    runs: Annotated[tuple[Path, ...], Arg("RUN", positional=True)]
    """Run folders, or log files of this package, nanoGPT, nanochat or llm.c."""
    out: Annotated[Path | None, Arg("FILE")] = None
    """The PNG to write. Default: curves.png in the first run's folder, or beside the first log."""
    tokens_per_step: int | None = None
    """For logs that give times but neither a rate nor the tokens of a step (nanoGPT's with another start)."""

    def __post_init__(self) -> None:
        at_least(1, tokens_per_step=self.tokens_per_step)


def main(args: list[str]) -> int:
    config = command.parse(PlotConfig, args, "fastgpt.plot")
    first = config.runs[0]
    out = config.out or (first if first.is_dir() else first.parent) / "curves.png"
    print(draw([read(path, config.tokens_per_step) for path in config.runs], out))
    return 0


if __name__ == "__main__":
    common.run(main)
