"""A small GPT trained on the standard library's sources, as bytes, with its matmuls simulated in a mode; and the operands of
its matmuls, recorded. CPU, fp32 tensors, one seed: runs differ in nothing but the mode."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from torch import Tensor

from bench.numerics.ops import Recorder, simulated
from bench.numerics.runs import perturb, windows
from bench.numerics.simulation import FP32, Mode
from fastgpt.config import ModelConfig, OptimConfig
from fastgpt.data.corpora import open_corpus
from fastgpt.model import GPT
from fastgpt.optim.build import build_optimizer
from fastgpt.schedule import learning_rate
from fastgpt.training.step import Stepper

VOCABULARY = 256
EVERY = 20  # one document in so many is held back for validation


@dataclass(frozen=True)
class Experiment:
    """Sizes of the training runs."""

    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 64
    block_size: int = 64
    batch_size: int = 16
    steps: int = 500
    lr: float = 2e-3
    eval_every: int = 50
    eval_batches: int = 16
    growth_interval: int = 50  # of the loss scale: 2000 would never be reached in a short run
    characters: int = 3_000_000

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_embd=self.n_embd,
            block_size=self.block_size,
            vocab_size=VOCABULARY,
            bias=True,
        )


RECORDED = Experiment(n_head=4, n_embd=256, block_size=256, batch_size=8, steps=200)
"""Wider, so that the sums are longer: 256, 1,024 and, over the tokens of a recorded step, 8,192 products."""
QUICK = Experiment(
    n_layer=1,
    n_head=2,
    n_embd=32,
    block_size=32,
    batch_size=4,
    steps=6,
    eval_every=3,
    eval_batches=2,
    characters=60_000,
)


@dataclass
class SimulatedRun:
    """Curves of one training run: ``losses`` of every step, ``validation`` as (steps taken, loss), both in nats."""

    mode: str
    losses: list[float]
    validation: list[tuple[int, float]] = field(default_factory=list)
    skipped: int = 0
    scale: float | None = None  # the loss scale at the end
    seconds: float = 0.0

    @property
    def final(self) -> float:
        return self.validation[-1][1]


def corpus(characters: int) -> tuple[Tensor, Tensor]:
    """About so many bytes of the standard library's sources, int64: for training, and documents held back."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    total = 0
    for index, document in enumerate(open_corpus("stdlib").read()):
        raw = document.text.encode()[
            : characters // (2 * EVERY)
        ]  # no file is more than its share, and one at least is held back
        parts[index % EVERY == EVERY - 1].append(raw)
        total += len(raw)
        if total >= characters:
            break
    train, held = (torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8).long() for part in parts)
    return train, held


def batches(tokens: Tensor, setup: Experiment, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    return windows(tokens, setup.block_size, setup.batch_size, seed)


def optimizer_of(setup: Experiment) -> OptimConfig:
    return OptimConfig(lr=setup.lr, warmup_iters=max(1, setup.steps // 15), min_lr_ratio=0.05)


def build(setup: Experiment, mode: Mode, record: Recorder | None = None, perturbed: int = 0) -> Stepper:
    """Model, optimizer and loss scaler, as the training loop steps them. ``perturbed``, if not 0, seeds a relative change of
    every initial weight by about 1e-3, less than bf16 rounds it by."""
    torch.manual_seed(0)
    model = GPT(setup.model, simulated(mode, record))
    if perturbed:
        perturb(model, perturbed, relative=1e-3)
    optim = optimizer_of(setup)
    scaler = torch.amp.GradScaler("cpu", enabled=mode.needs_loss_scaling, growth_interval=setup.growth_interval)
    return Stepper(model, model, build_optimizer(model, optim, "eager"), scaler, "fp32", optim.grad_clip)


@torch.no_grad()
def validate(model: GPT, held: Tensor, setup: Experiment) -> float:
    losses = [model(x, y)[1] for x, y in islice(batches(held, setup, seed=2), setup.eval_batches)]
    return float(torch.stack(losses).mean())  # type: ignore[arg-type]


def train(
    mode: Mode, setup: Experiment, tokens: tuple[Tensor, Tensor], *, name: str = "", perturbed: int = 0
) -> SimulatedRun:
    """One run. The validation batches are the same each time and for each mode."""
    start = time.perf_counter()
    stepper = build(setup, mode, perturbed=perturbed)
    run = SimulatedRun(name or mode.name, [])
    optim = optimizer_of(setup)
    for step, batch in enumerate(islice(batches(tokens[0], setup, seed=1), setup.steps)):
        loss, _ = stepper([batch], 1, learning_rate(step, optim, setup.steps))
        run.losses.append(float(loss))
        if (step + 1) % setup.eval_every == 0 or step + 1 == setup.steps:
            run.validation.append((step + 1, validate(stepper.model, tokens[1], setup)))
    run.skipped = stepper.skipped_steps()
    run.scale = stepper.scaler.get_scale() if stepper.scaler.is_enabled() else None
    run.seconds = time.perf_counter() - start
    return run


@dataclass(frozen=True)
class Operands:
    """Two operands of a matmul at a step of training, fp32: ``what`` as in numerics.ops.Recorder."""

    what: str
    step: int
    a: Tensor
    b: Tensor


def record(setup: Experiment, tokens: tuple[Tensor, Tensor], at: Iterable[int], most: int = 128) -> list[Operands]:
    """Trains in fp32 and keeps the operands of every matmul at steps ``at``, whose batches are four times as large.

    The dimension that is summed over is kept whole; of rows and columns about ``most``, evenly spaced, of a batch of heads 4.
    """
    found: list[Operands] = []
    now, wanted = -1, set(at)

    def keep(what: str, a: Tensor, b: Tensor) -> None:
        if now in wanted:
            a, b = (a[:4], b[:4]) if a.dim() == 3 else (a, b)
            rows, columns = max(1, a.shape[-2] // most), max(1, b.shape[-1] // most)
            found.append(Operands(what, now, a[..., ::rows, :].clone(), b[..., ::columns].clone()))

    stepper = build(setup, FP32, keep)
    optim = optimizer_of(setup)
    usual = batches(tokens[0], setup, seed=1)
    large = batches(tokens[0], replace(setup, batch_size=4 * setup.batch_size), seed=3)
    for now in range(max(wanted) + 1):
        batch = next(large if now in wanted else usual)
        stepper([batch], 1, learning_rate(now, optim, setup.steps))
    return found
