"""Pictures of runs: loss, learning rate, gradient norm and speed, of this package's runs and of the logs that the doctor reads
(docs/doctor.md) on one picture.

    python -m fastgpt.plot
    python -m fastgpt.plot runs/new old-nanogpt.log --out compare.png
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from fastgpt import command, common
from fastgpt.checkpoints import METRICS
from fastgpt.command import Arg
from fastgpt.common import UserError, at_least, rounded
from fastgpt.config import OptimConfig
from fastgpt.doctor.evidence import LogFacts
from fastgpt.doctor.figures import compute, steady
from fastgpt.doctor.reading.logs import read_log
from fastgpt.doctor.reading.read import read as doctor_read
from fastgpt.schedule import micro_batches_until
from fastgpt.training import metrics

Axis = Literal["steps", "tokens"]


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
    tokens_per_step: int | None = None
    batch_warmup: tuple[int, int] = (0, 1)
    """Steps over which the micro-batches of a step rise, and to how many."""

    def tokens(self, steps: np.ndarray) -> np.ndarray:
        """Tokens of so many steps of the run, which says how many a step has."""
        rising, accum = self.batch_warmup
        assert self.tokens_per_step is not None
        if not rising:
            return self.tokens_per_step * steps
        optim = OptimConfig(batch_warmup_iters=rising)
        return np.array([micro_batches_until(int(step), optim, accum) for step in steps]) * (
            self.tokens_per_step / accum
        )


def read(path: Path, tokens_per_step: int | None = None, config: Path | None = None) -> Curves:
    """A run's folder, its metrics.jsonl, or a log file that the doctor reads.

    The tokens of a step, for logs that give times but no rate, are ``tokens_per_step``; or what the log says; or those of
    ``config``, or of the only config that lies beside the log. Steps that an evaluation was part of have no speed. Raises
    UserError for what cannot be read, and for a log without a step.
    """
    if (path / METRICS if path.is_dir() else path).name == METRICS:
        curves = _of_records(path if path.is_dir() else path.parent, metrics.read(path))
        return replace(curves, tokens_per_step=tokens_per_step or curves.tokens_per_step)
    if not path.is_file():
        raise UserError(f"{path} is neither a run's folder nor a log file: name one that exists")
    log = read_log(path)
    if len(log.steps) == 0:
        raise UserError(f"{path} holds no training step that could be drawn: name a log of a run")
    tokens_per_step = tokens_per_step or _tokens_per_step(path, log, config)
    rate = log.steps.tokens_per_second
    if tokens_per_step:
        derived = 1e3 * tokens_per_step / np.where(steady(log), log.steps.ms, np.nan)
        rate = np.where(np.isnan(rate), derived, rate)
    nothing, evals = np.full(len(log.steps), np.nan), log.evals
    return Curves(
        *(path.stem, log.steps.step, log.steps.loss, log.steps.lr, nothing, rate, evals.step, evals.val),
        tokens_per_step=tokens_per_step,
    )


def _tokens_per_step(path: Path, log: LogFacts, config: Path | None) -> int | None:
    """As the doctor finds it."""
    said = [note.value for note in log.all("tokens_per_step") if note.value]
    if said and config is None:
        return said[-1]
    try:
        return compute(doctor_read([path, config or path.parent]), None).tokens_per_step
    except UserError:
        if config is not None:
            raise
        return None


def _of_records(folder: Path, records: Sequence[dict[str, Any]]) -> Curves:
    def columns(key: str, *names: str) -> list[np.ndarray]:
        """These fields of the records that have a step and ``key``."""
        rows = [record for record in records if "step" in record and key in record]
        return [np.array([row.get(name) for row in rows], dtype=float) for name in names]

    steps = columns("loss", "step", "loss", "lr", "grad_norm", "tokens_per_second")
    if not len(steps[0]):
        raise UserError(f"{folder} holds no training step yet: wait for its first log line")
    config: dict[str, Any] = next((record["config"] for record in reversed(records) if record.get("config")), {})
    try:
        data, rising = config["data"], config.get("optim", {}).get("batch_warmup_iters", 0)
        tokens = int(data["batch_size"] * data["grad_accum"] * config["model"]["block_size"])
        warmup = max(0, int(rising)), max(1, int(data["grad_accum"]))
    except (KeyError, TypeError, ValueError, AttributeError):  # of a stranger's file
        tokens, warmup = None, (0, 1)
    eval_step, val_loss = columns("val_loss", "step", "val_loss")
    step, loss, lr, grad_norm, rate = steps
    return Curves(folder.resolve().name, step, loss, lr, grad_norm, rate, eval_step, val_loss, tokens, warmup)


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
    shown = [name for name in titles if any(np.isfinite(getattr(run, name)).any() for run in runs)] or ["loss"]
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
            values = getattr(run, name)
            known = ~np.isnan(values)
            step, values = along(run.step[known]), values[known]
            if name in ("loss", "grad_norm") and len(values) > 200:
                axes.plot(step, values, color=colour, alpha=0.2, linewidth=0.7)
                step, values = _running_mean(step, values)
            if len(values):
                dot = "." if len(values) == 1 else None
                axes.plot(step, values, color=colour, linewidth=1.4, marker=dot, label=_label(run.name))
        if len(run.val_loss):
            label = f"{_label(run.name)}, validation"
            panels["loss"].plot(along(run.eval_step), run.val_loss, "o", color=colour, markersize=3.5, label=label)
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
    losses = np.concatenate([run.loss[np.isfinite(run.loss)] for run in runs])
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
