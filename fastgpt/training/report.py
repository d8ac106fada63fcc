"""What a run says on the terminal: the banner at the start, then one line per interval."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch
from rich.console import Console

from fastgpt.config import Config
from fastgpt.model import GPT


def peak_memory_gb(device: torch.device) -> float:
    """Most memory used so far, in GB (1e9 bytes): allocated by torch on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def banner(console: Console, config: Config, model: GPT, device: torch.device, precision: str, step: int) -> None:
    """Say what will run, on what, and, without a GPU, what one would change."""
    shape = config.model
    console.print(
        f"[bold]fastgpt[/]  {model.n_params() / 1e6:.2f}M parameters (positions apart)  "
        f"L{shape.n_layer} H{shape.n_head} C{shape.n_embd} T{shape.block_size} V{shape.vocab_size}  "
        f"{config.tokens_per_step:,} tokens per step"
    )
    console.print(
        f"kernels {config.train.kernels}{' + torch.compile' if config.train.compile else ''}  precision {precision}  "
        f"device {device_name(device)}  data {config.data.data} ({config.data.tokenizer})  out {config.train.out}"
    )
    if device.type == "cpu" and config.train.kernels == "triton":
        console.print(
            "[yellow]No GPU: the Triton kernels run in Triton's interpreter, one program at a time in NumPy. It shows that "
            "they compute the right thing, not how fast they are. On a CUDA GPU the same command compiles them and trains "
            "the larger demo: GPT-2's tokens, 6 layers of 384, bf16. --kernels eager trains this model in plain PyTorch."
        )
    if step:
        console.print(f"resumed at step {step}")


@dataclass(frozen=True)
class LogLine:
    """One interval of a run. ``loss`` is the mean over all micro-batches of the interval's steps; ``mfu`` is already
    formatted with its denominator, or 'n/a'."""

    step: int
    max_iters: int
    loss: float
    lr: float
    grad_norm: float
    ms: float
    tokens_per_second: float
    memory_gb: float
    mfu: str
    skipped: int = 0

    def __str__(self) -> str:
        skipped = f"  skipped {self.skipped}" if self.skipped else ""
        return (
            f"step {self.step:>6}/{self.max_iters}  loss {self.loss:.4f}  lr {self.lr:.2e}  norm {self.grad_norm:.3f}  "
            f"{self.ms:,.1f} ms  {self.tokens_per_second:,.0f} tok/s  mem {self.memory_gb:.2f} GB  mfu {self.mfu}{skipped}"
        )
