"""The training loop: build everything, check everything, and only then write the first file."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastgpt import flops, hardware
from fastgpt.config import Config, differences
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

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: plain values and tensors."""
        return {
            "config": self.config.to_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.stepper.optimizer.state_dict(),
            "scaler": self.stepper.scaler.state_dict(),
            "loader": self.train_loader.state_dict(),
            "rng": checkpoint.rng_state(),
            "best_val_loss": self.best_val_loss,
            "torch": str(torch.__version__),
        }


def build(config: Config, device: torch.device) -> Run:
    """Model, optimizer and loaders of a run, restored from a checkpoint if ``--resume`` asks. Writes nothing (but may fill
    the token cache). Raises UserError for anything that cannot work."""
    resumed = _load_resumed(config) if config.train.resume else None
    train_paths, val_paths, tokenizer = resolve(
        config.data.data,
        tokenizer=config.data.tokenizer,
        vocab_size=config.model.vocab_size,
        block_size=config.model.block_size,
    )
    loaders = [
        TokenLoader(
            paths,
            block_size=config.model.block_size,
            batch_size=config.data.batch_size,
            seed=config.train.seed,
            vocab_size=config.model.vocab_size,
        )
        for paths in (train_paths, val_paths)
    ]
    torch.manual_seed(config.train.seed)
    model = GPT(config.model, get_ops(config.train.kernels)).to(device)
    precision = precision_for(config.train.precision, device)
    optimizer = build_optimizer(model, config.optim, config.train.kernels)
    stepper = Stepper(
        model=model,
        forward=torch.compile(model) if config.train.compile else model,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        precision=precision,
        grad_clip=config.optim.grad_clip,
    )
    run = Run(config, device, model, stepper, *loaders)
    if resumed is not None:
        _restore(run, resumed)
    return run


def _load_resumed(config: Config) -> dict[str, Any]:
    path = checkpoint.resolve(str(config.train.resume), config.train.out)
    saved = checkpoint.load(path)
    checkpoint.check_shape(saved["config"], config.model, path)
    if saved["step"] >= config.train.max_iters:
        raise UserError(f"max_iters is {config.train.max_iters}, but {path} has done {saved['step']} steps: raise --max-iters")
    return saved


def _restore(run: Run, saved: dict[str, Any]) -> None:
    run.model.load_state_dict(saved["model"])
    run.stepper.optimizer.load_state_dict(saved["optimizer"])
    run.stepper.scaler.load_state_dict(saved["scaler"])
    run.train_loader.load_state_dict(saved["loader"])
    checkpoint.set_rng_state(saved["rng"])
    run.step, run.best_val_loss = saved["step"], saved["best_val_loss"]


@torch.no_grad()
def evaluate(run: Run) -> float:
    """Mean validation loss over the same ``eval_iters`` batches every time, in eval mode (no dropout)."""
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
    console = console or Console(soft_wrap=True)
    run = build(config, device)
    banner(console, run.config, run.model, device, run.stepper.precision, run.step)
    for note in _changed_settings(config):
        console.print(f"[yellow]resumed with {note}")
    out = config.train.out
    out.mkdir(parents=True, exist_ok=True)
    model_shape = flops.Shape.of(config.model)
    meter = StepMeter(device, flops.palm(model_shape), hardware.peak_flops(device, run.stepper.precision))
    with StopRequest() as stop, open(out / "metrics.jsonl", "a") as metrics:
        for record in _steps(run, meter, stop, console):
            metrics.write(json.dumps(record) + "\n")
            metrics.flush()
    return run, 130 if stop.asked else 0


def _changed_settings(config: Config) -> list[str]:
    """Settings, other than the shape, that a resumed run changes: allowed, but said."""
    if not config.train.resume:
        return []
    saved = checkpoint.load(checkpoint.resolve(config.train.resume, config.train.out))["config"]
    now = config.to_dict()
    ignored = ("out", "resume")
    return [
        change
        for section in ("model", "data", "optim", "train")
        for change in differences(saved[section], now[section])
        if not change.startswith(ignored)
    ]
