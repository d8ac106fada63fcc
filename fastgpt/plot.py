"""Pictures of runs: loss, learning rate, gradient norm and speed, of this package's runs and of the logs that the doctor reads
(docs/doctor.md) on one picture.

    python -m fastgpt.plot
    python -m fastgpt.plot runs/new old-nanogpt.log --out compare.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from fastgpt import command, common
from fastgpt.checkpoints import METRICS
from fastgpt.command import Arg
from fastgpt.common import UserError, at_least, rounded
from fastgpt.doctor.evidence import ConfigFacts, Evals, Evidence, Steps
from fastgpt.doctor.figures import compute, steady, trained
from fastgpt.doctor.reading.encoding import is_text
from fastgpt.doctor.reading.logs import read_log
from fastgpt.doctor.reading.read import read as doctor_read

Axis = Literal["steps", "tokens"]


@dataclass(frozen=True)
class Curves:
    """What a run logged, as the doctor reads it."""

    name: str
    steps: Steps
    """Their tokens per second as logged, or from their time."""
    evals: Evals
    config: ConfigFacts
    tokens_per_step: int | None = None

    def tokens(self, steps: np.ndarray) -> np.ndarray:
        """Tokens of so many steps of the run, which says how many a step has."""
        assert self.tokens_per_step is not None
        return np.array([trained(int(step), self.config, self.tokens_per_step) for step in steps])


def read(path: Path, tokens_per_step: int | None = None, config: Path | None = None) -> Curves:
    """A run's folder, its metrics.jsonl, or a log file that the doctor reads.

    The tokens of a step, for logs that give times but no rate, are ``tokens_per_step``; or what the log says; or those of
    ``config``, or of the only config that lies beside the log. Steps that an evaluation was part of have no speed. Raises
    UserError for what cannot be read, and for a log without a step; what of it could not be read goes to stderr.
    """
    file = path / METRICS if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path} is neither a run's folder nor a log file: name one that exists")
    with open(file, "rb") as start:
        if not is_text(start.read(1 << 16)):
            raise UserError(f"{file} is not text: name a log of a run")
    log, own = read_log(file), file.name == METRICS
    if not len(log.steps):
        hint = "that could be drawn: name a log of a run"
        if own:
            hint = f"that could be read: {log.unread[0].why}" if log.unread else "yet: wait for its first log line"
        raise UserError(f"{path} holds no training step {hint}")
    for item in log.unread:
        common.say(f"{item.place}: {item.why}", sys.stderr)
    evidence = Evidence(log.config, log)
    if config is not None or not (own or log.config or log.all("tokens_per_step")):
        try:
            evidence = doctor_read([file, config or file.parent])
        except UserError:
            if config is not None:
                raise
    figures = compute(evidence, None)
    tokens_per_step, rate = tokens_per_step or figures.tokens_per_step, log.steps.tokens_per_second
    if tokens_per_step:
        derived = 1e3 * tokens_per_step / np.where(steady(log), log.steps.ms, np.nan)
        rate = np.where(np.isnan(rate), derived, rate)
    name = file.resolve().parent.name if own else path.stem
    return Curves(name, replace(log.steps, tokens_per_second=rate), log.evals, figures.config, tokens_per_step)


def draw(runs: Sequence[Curves], path: Path, x: Axis = "steps") -> Path:
    """One PNG with a panel for each thing that any of the runs says; training loss as a line (a running mean over the noise of
    many steps), validation as dots; by optimizer steps, or by tokens.

    Raises UserError where matplotlib is missing, a run does not say the tokens of its steps, or ``path`` cannot be written.
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
    shown = [name for name in titles if any(np.isfinite(getattr(run.steps, name)).any() for run in runs)] or ["loss"]
    grid = list(figure.subplots(2 if len(shown) > 2 else 1, 2 if len(shown) > 1 else 1, squeeze=False).flat)
    panels = dict(zip(shown, grid))
    for axes in grid[len(shown) :]:
        axes.remove()
    for number, run in enumerate(runs):
        colour = f"C{number % 10}"
        if x == "tokens" and run.tokens_per_step is None:
            raise UserError(
                f"x is 'tokens', and {run.name} does not say how many tokens a step has: name its config, too, or give "
                "--tokens-per-step"
            )
        along = run.tokens if x == "tokens" else np.asarray
        for name, axes in panels.items():
            logged = getattr(run.steps, name)
            known = ~np.isnan(logged)
            step, logged = along(run.steps.step[known]), logged[known]
            if name in ("loss", "grad_norm") and len(logged) > 200:
                axes.plot(step, logged, color=colour, alpha=0.2, linewidth=0.7)
                step, logged = _running_mean(step, logged)
            if len(logged):
                dot = "." if len(logged) == 1 else None
                axes.plot(step, logged, color=colour, linewidth=1.4, marker=dot, label=_label(run.name))
        if len(run.evals):
            label = f"{_label(run.name)}, validation"
            panels["loss"].plot(along(run.evals.step), run.evals.val, "o", color=colour, markersize=3.5, label=label)
    for name, axes in panels.items():
        axes.set_title(titles[name], loc="left", fontsize=10)
        axes.set_xlabel("optimizer step" if x == "steps" else "tokens")
        if x == "tokens":
            axes.xaxis.set_major_formatter(lambda value, _: rounded(value))
        axes.grid(alpha=0.3)
        axes.margins(x=0.02)
        axes.legend(fontsize=8)
    if "tokens_per_second" in panels:
        panels["tokens_per_second"].set_ylim(bottom=0)
        panels["tokens_per_second"].yaxis.set_major_formatter("{x:,.0f}")
    # The first losses, far above the part that differs, may leave the picture.
    losses = np.concatenate([run.steps.loss[np.isfinite(run.steps.loss)] for run in runs])
    if len(losses) >= 100 and "loss" in panels:
        low, high = float(losses.min()), float(np.quantile(losses, 0.97))
        panels["loss"].set_ylim(low - 0.05 * (high - low), high + 0.3 * (high - low))
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"out is {path}, which cannot be written ({reason}): name another .png file") from error
    return path


def _label(name: str) -> str:
    """A run's name as it is: matplotlib sets what is between $ as a formula, and leaves out what begins with _."""
    return common.printable(f" {name}" if name.startswith("_") else name).replace("$", r"\$")


def _running_mean(step: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over a fiftieth of the points, at the middle of each window."""
    width = max(2, len(values) // 50)
    window = np.full(width, 1 / width)
    return np.convolve(step, window, "valid"), np.convolve(values, window, "valid")


@dataclass(frozen=True)
class PlotConfig:
    """Draw loss, learning rate, gradient norm and tokens/s of one or more runs on one picture.

    Examples:
      python -m fastgpt.plot                                       the newest run below runs/, and here
      python -m fastgpt.plot runs/gpt2-124m                        writes runs/gpt2-124m/curves.png
      python -m fastgpt.plot runs/new old-nanogpt.log --out compare.png
      python -m fastgpt.plot old-nanogpt.log train_gpt2.py --x tokens
    """

    runs: Annotated[tuple[Path, ...], Arg("RUN", positional=True)] = ()
    """Run folders, or log files of any program that docs/doctor.md names. A config (.py, .toml) gives the tokens of a step to
    the log before it. Without any, the newest run."""
    out: Annotated[Path | None, Arg("FILE")] = None
    """The PNG to write. Default: curves.png in the first run's folder, or beside the first log."""
    tokens_per_step: int | None = None
    """For logs that give times but neither a rate nor the tokens of a step, and have no config beside them."""
    x: Axis = "steps"
    """What lies along the pictures: optimizer steps, or tokens."""

    def __post_init__(self) -> None:
        at_least(1, tokens_per_step=self.tokens_per_step)


def main(args: list[str]) -> int:
    config = command.parse(PlotConfig, args, "fastgpt.plot")
    runs: list[tuple[Path, Path | None]] = []
    for path in config.runs or [newest_run()]:
        if path.suffix not in (".py", ".toml"):
            runs.append((path, None))
        elif not runs:
            raise UserError(f"{path} is a config: name the log that it belongs to before it")
        else:
            runs[-1] = (runs[-1][0], path)
    first = runs[0][0]
    out = config.out or (first if first.is_dir() else first.parent) / "curves.png"
    common.say(str(draw([read(path, config.tokens_per_step, beside) for path, beside in runs], out, config.x)))
    return 0


def newest_run() -> Path:
    """The folder below runs/, or here, whose metrics.jsonl was written last. Raises UserError if there is none."""
    found = [path for pattern in (f"runs/*/{METRICS}", f"*/{METRICS}", METRICS) for path in Path().glob(pattern)]
    if not found:
        raise UserError("RUN is missing, and no run lies in runs/ or here: name a run's folder or a log")
    return max(found, key=lambda path: path.stat().st_mtime).parent


if __name__ == "__main__":
    common.run(main)
