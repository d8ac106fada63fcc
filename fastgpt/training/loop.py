"""The training loop: build everything, check everything, and only then write the first file."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from torch import Tensor

from fastgpt import flops
from fastgpt.config import SECTIONS, Config, differences
from fastgpt.data import TokenLoader, resolve
from fastgpt.errors import UserError
from fastgpt.mfu import StepMeter
from fastgpt.model import GPT
from fastgpt.ops import get as get_ops
from fastgpt.training import checkpoint
from fastgpt.training.report import LogLine, banner, peak_memory_gb
from fastgpt.training.schedule import learning_rate
from fastgpt.training.step import Stepper, autocast, build_optimizer, precision_for


@dataclass
class Run:
    """All that a run consists of; ``step`` counts the optimizer steps done."""

    config: Config
    device: torch.device
    model: GPT
    stepper: Stepper
    train_loader: TokenLoader
    val_loader: TokenLoader
    step: int = 0
    best_val_loss: float = math.inf

    def save(self) -> Path:
        """Write a checkpoint of everything; only plain values and tensors."""
        state = {
            "config": self.config.to_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.stepper.optimizer.state_dict(),
            "scaler": self.stepper.scaler.state_dict(),
            "loader": self.train_loader.state_dict(),
            "rng": checkpoint.rng_state(),
            "best_val_loss": self.best_val_loss,
            "torch": str(torch.__version__),
        }
        return checkpoint.save(self.config.train.out, self.step, state, self.config.train.keep_checkpoints)


def build(config: Config, device: torch.device) -> Run:
    """Model, optimizer and loaders of a new run. Writes nothing but tokens into the user's cache.

    Raises UserError for anything that cannot work.
    """
    shape, data = config.model, config.data
    train_paths, val_paths, _ = resolve(
        data.data, tokenizer=data.tokenizer, vocab_size=shape.vocab_size, block_size=shape.block_size
    )
    train_loader, val_loader = (
        TokenLoader(paths, shape.block_size, data.batch_size, seed=config.train.seed, vocab_size=shape.vocab_size)
        for paths in (train_paths, val_paths)
    )
    torch.manual_seed(config.train.seed)
    model = GPT(shape, get_ops(config.train.kernels)).to(device)
    precision = precision_for(config.train.precision, device)
    stepper = Stepper(
        model=model,
        forward=torch.compile(model) if config.train.compile else model,
        optimizer=build_optimizer(model, config.optim, config.train.kernels),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        precision=precision,
        grad_clip=config.optim.grad_clip,
    )
    return Run(config, device, model, stepper, train_loader, val_loader)


def load_resumed(config: Config) -> dict[str, Any] | None:
    """The checkpoint that ``--resume`` names, checked against the configuration; None for a new run.

    Raises UserError if there is none, it is damaged, its model has another shape, or it has done all the steps.
    """
    if config.train.resume is None:
        return None
    where = config.train.out if config.train.resume == "newest" else Path(config.train.resume)
    path = checkpoint.resolve(where)
    saved = checkpoint.load(path)
    checkpoint.check_shape(saved["config"], config.model, path)
    if saved["step"] >= config.train.max_iters:
        raise UserError(
            f"max_iters is {config.train.max_iters} but checkpoint {path} has done {saved['step']} steps: raise --max-iters"
        )
    return saved


def restore(run: Run, saved: dict[str, Any]) -> None:
    """Put a checkpoint's state into a freshly built run."""
    run.model.load_state_dict(saved["model"])
    # Hyperparameters are the configuration's, not the checkpoint's: a flag changed on resume takes effect.
    groups = run.stepper.optimizer.param_groups
    wanted = [{key: group[key] for key in ("betas", "eps", "weight_decay")} for group in groups]
    run.stepper.optimizer.load_state_dict(saved["optimizer"])
    for group, values in zip(run.stepper.optimizer.param_groups, wanted):
        group.update(values)
    run.stepper.scaler.load_state_dict(saved["scaler"])
    run.train_loader.load_state_dict(saved["loader"])
    checkpoint.set_rng_state(saved["rng"])
    run.step, run.best_val_loss = saved["step"], saved["best_val_loss"]


def changed_settings(saved: dict[str, Any], config: Config) -> list[str]:
    """Settings that a resumed run changes: allowed, but said."""
    now = config.to_dict()
    return [
        change
        for section in SECTIONS
        for change in differences(saved["config"][section], now[section])
        if not change.startswith(("out:", "resume:"))
    ]


@torch.no_grad()
def evaluate(run: Run) -> float:
    """Mean validation loss in nats over the same ``eval_iters`` batches every time, in eval mode (no dropout)."""
    run.model.eval()
    losses = []
    for x, y in run.val_loader.eval_batches(run.config.train.eval_iters, run.device):
        with autocast(run.device, run.stepper.precision):
            losses.append(run.stepper.forward(x, y)[1])
    run.model.train()
    return torch.stack(losses).mean().item()


class StopRequest:
    """Ctrl-C asks the loop to finish its step and save; a second one leaves at once. Restores the handler on exit."""

    def __enter__(self) -> StopRequest:
        self.asked = False
        self._previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)


def train(config: Config, device: torch.device, console: Console | None = None) -> tuple[Run, int]:
    """Train as configured. Returns the run and the exit code: 0, or 130 after Ctrl-C (the state is saved)."""
    console = console or Console(soft_wrap=True, highlight=False)
    saved = load_resumed(config)
    run = build(config, device)
    if saved is not None:
        restore(run, saved)
    banner(console, config, run.model, device, run.stepper.precision)
    if saved is not None:
        changes = changed_settings(saved, config)
        console.print(f"resumed at step {run.step}" + (f", with {'; '.join(changes)}" if changes else ""), markup=False)
    elif (moved := checkpoint.set_aside(config.train.out)) is not None:
        console.print(
            f"{config.train.out} held an earlier run: it is now {moved} (--resume would have continued it)",
            markup=False,
        )
    meter = StepMeter.for_shape(flops.Shape.of(config.model), device, run.stepper.precision)
    with StopRequest() as stop, _open_metrics(config.train.out) as metrics:
        for record in _steps(run, meter, stop, console):
            metrics.write(json.dumps(record) + "\n")
            metrics.flush()
    return run, 130 if stop.asked else 0


def _open_metrics(out: Path) -> TextIO:
    """The run's metrics file, for appending. Raises UserError for a folder that cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        return open(out / "metrics.jsonl", "a")
    except OSError as error:
        raise UserError(f"out is {out}, which cannot be written ({error.strerror}): name another folder") from error


def _steps(run: Run, meter: StepMeter, stop: StopRequest, console: Console) -> Iterator[dict[str, Any]]:
    """Run to the end or to Ctrl-C, evaluating, saving and printing on the way; yields what metrics.jsonl holds."""
    settings = run.config.train
    losses: list[Tensor] = []
    if run.step == 0:
        yield _evaluate(run, meter, console)
    while run.step < settings.max_iters and not stop.asked:
        lr = learning_rate(run.step, run.config.optim, settings.max_iters)
        with meter.step(run.config.tokens_per_step):
            loss, norm = run.stepper(_micro_batches(run, meter), run.config.data.grad_accum, lr)
        losses.append(loss)
        run.step += 1
        last = run.step == settings.max_iters
        if run.step % settings.log_interval == 0 or run.step == 1 or last or stop.asked:
            line = _log_line(run, meter, losses, lr, norm)
            losses.clear()
            console.print(str(line), markup=False)
            yield line.to_dict()
            if not math.isfinite(line.loss):
                raise UserError(_not_finite(run, line))
        if last or _due(run.step, settings.eval_interval):
            yield _evaluate(run, meter, console)
        if last or stop.asked or _due(run.step, settings.checkpoint_interval):
            with meter.excluded():
                console.print(f"saved {run.save()}", markup=False)
    if stop.asked:
        console.print("stopped by Ctrl-C: continue with --resume")


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _micro_batches(run: Run, meter: StepMeter) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(run.config.data.grad_accum):
        with meter.data_wait():
            batch = run.train_loader.next_batch(run.device)
        yield batch


def _evaluate(run: Run, meter: StepMeter, console: Console) -> dict[str, Any]:
    with meter.excluded():
        loss = evaluate(run)
    run.best_val_loss = min(run.best_val_loss, loss)
    console.print(f"step {run.step:>6}/{run.config.train.max_iters}  val loss {loss:.4f}", markup=False)
    return {"step": run.step, "val_loss": loss}


def _log_line(run: Run, meter: StepMeter, losses: list[Tensor], lr: float, norm: Tensor) -> LogLine:
    report = meter.report()  # waits for the device
    return LogLine(
        step=run.step,
        max_iters=run.config.train.max_iters,
        loss=torch.stack(losses).mean().item(),
        lr=lr,
        grad_norm=norm.item(),
        ms=report.ms_per_step,
        tokens_per_second=report.tokens_per_second,
        memory_gb=peak_memory_gb(run.device),
        mfu=report.mfu_nominal,
        data_wait=report.data_wait,
        skipped=run.stepper.skipped_steps(),
    )


def _not_finite(run: Run, line: LogLine) -> str:
    good = checkpoint.existing(run.config.train.out)
    resume = f"the last checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
    return f"loss is {line.loss} at step {run.step}: lower --lr or use --precision bf16 or fp32; {resume}"
