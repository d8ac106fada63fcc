"""Does a model trained on the kernels follow the one trained in plain PyTorch? ``python -m bench.training_parity``.

A tiny GPT is trained for 200 steps from one seed, on real text, eager and triton. Two runs in floating point drift apart
even when both are right, so the yardstick is eager against itself: the same run from initial weights perturbed by a
relative 1e-7 (about the rounding of fp32), several times. The envelope at a step is the largest distance of any perturbed
run up to that step, and triton has to stay within three times that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from bench.numerics.runs import perturb, windows
from bench.reports import results
from fastgpt import command, common
from fastgpt.command import Arg
from fastgpt.common import UserError, at_least
from fastgpt.config import Device, ModelConfig, OptimConfig
from fastgpt.hardware import device as device_module

# T and C of 32: one block per attention row and one per norm row, so that the interpreter needs a minute.
MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=32, vocab_size=256, bias=True)
OPTIM = OptimConfig(lr=3e-3, warmup_iters=10)
ALLOWED = 3.0
LICENCE = Path(__file__).parents[1] / "LICENSE"


@dataclass(frozen=True)
class Parity:
    """Loss curves (steps,) in nats; ``perturbed`` (runs, steps); ``unmoved`` names parameters that triton left in place."""

    eager: np.ndarray
    triton: np.ndarray
    perturbed: np.ndarray
    unmoved: list[str]

    @property
    def envelope(self) -> np.ndarray:
        """Largest distance of a perturbed run so far, never below the rounding of the loss itself (fp32)."""
        distance = np.abs(self.perturbed - self.eager).max(0)
        return np.maximum.accumulate(np.maximum(distance, np.finfo(np.float32).eps * self.eager))

    @property
    def ratio(self) -> float:
        """The largest distance of triton from eager, in envelopes: at most ``ALLOWED``."""
        return float((np.abs(self.triton - self.eager) / self.envelope).max())


def batches(steps: int, where: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Windows of the licence, as bytes: a text that edits of the code do not change."""
    text = torch.frombuffer(bytearray(LICENCE.read_bytes()), dtype=torch.uint8).long()
    for x, y in islice(windows(text, MODEL.block_size, rows=2, seed=0), steps):
        yield x.to(where), y.to(where)


def curve(kernels: str, steps: int, where: torch.device, perturbed: int | None = None) -> tuple[np.ndarray, list[str]]:
    """Losses of a run and the names of the parameters that did not move. ``perturbed`` seeds a perturbation."""
    from fastgpt import ops  # after device.pick(): importing the kernels fixes whether they are interpreted
    from fastgpt.model import GPT
    from fastgpt.optim.build import build_optimizer
    from fastgpt.schedule import learning_rate
    from fastgpt.training.step import Stepper

    torch.manual_seed(0)
    model = GPT(MODEL, ops.get(kernels)).to(where)
    if perturbed is not None:
        perturb(model, 1000 + perturbed, relative=1e-7)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    scaler = torch.amp.GradScaler(where.type, enabled=False)
    stepper = Stepper(model, model, build_optimizer(model, OPTIM, kernels), scaler, "fp32", OPTIM.grad_clip)
    losses = [
        stepper([batch], 1, learning_rate(step, OPTIM, steps))[0] for step, batch in enumerate(batches(steps, where))
    ]
    unmoved = [name for name, parameter in model.named_parameters() if torch.equal(parameter, start[name])]
    return torch.stack(losses).double().cpu().numpy(), unmoved


def measure(steps: int, where: torch.device, runs: int = 8) -> Parity:
    """Train eager, ``runs`` perturbed eager and triton. Raises UserError where PyTorch would stand in for the kernels."""
    from fastgpt.kernels import runtime

    if not runtime.runs_in_triton(torch.empty(0, device=where)):
        raise UserError("the kernels would not run here: set TRITON_INTERPRET=1 to run them on a CPU")
    eager, _ = curve("eager", steps, where)
    perturbed = np.stack([curve("eager", steps, where, perturbed=run)[0] for run in range(runs)])
    triton, unmoved = curve("triton", steps, where)
    return Parity(eager, triton, perturbed, unmoved)


def draw(parity: Parity, path: Path) -> None:
    """Two panels: the curves, and the distances on a log scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(parity.eager, label="eager", linewidth=3, alpha=0.4)
    left.plot(parity.triton, label="triton", linewidth=1)
    left.set(xlabel="step", ylabel="training loss (nat)", title="Same seed, same batches")
    distance = np.abs(parity.triton - parity.eager)
    right.semilogy(distance, ".", label=f"|triton - eager| (0 in {(distance == 0).sum()} of {len(distance)} steps)")
    right.semilogy(parity.envelope, label="eager perturbed by 1e-7 (envelope)")
    right.semilogy(ALLOWED * parity.envelope, "--", label=f"allowed: {ALLOWED:g} envelopes")
    right.set(xlabel="step", ylabel="distance (nat)", title=f"Largest: {parity.ratio:.2f} envelopes", ylim=(1e-7, 1))
    for axes, corner in ((left, "upper right"), (right, "upper left")):
        axes.legend(loc=corner)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


@dataclass(frozen=True)
class ParityConfig:
    """Train a tiny GPT eager and triton, and compare their loss curves."""

    steps: int = 200
    device: Device = "auto"
    out: Annotated[Path | None, Arg("FILE")] = None
    """A PNG to draw."""

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps)


def main(args: list[str]) -> int:
    config = command.parse(ParityConfig, args, "bench.training_parity")
    if config.out:
        results.check_writable(config.out.parent)
    parity = measure(config.steps, device_module.pick(config.device, "triton", plain=""))
    print(
        f"{config.steps} steps: final loss eager {parity.eager[-1]:.6f}, triton {parity.triton[-1]:.6f}; largest distance "
        f"{np.abs(parity.triton - parity.eager).max():.2e} nat, {parity.ratio:.2f} envelopes (allowed {ALLOWED:g})"
    )
    if config.out:
        draw(parity, config.out)
    return int(parity.ratio > ALLOWED or bool(parity.unmoved))


if __name__ == "__main__":
    common.run(main)
