"""What a run says on the terminal: the banner at the start, then one line per interval."""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict, dataclass

import torch
from rich.console import Console

from fastgpt import hardware
from fastgpt.config import Config
from fastgpt.model import GPT


def peak_memory_gb(device: torch.device) -> float:
    """Most memory used so far, in GB (1e9 bytes): allocated by torch on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def banner(console: Console, config: Config, model: GPT, device: torch.device, precision: str) -> None:
    """Say what will run, on what, and, without a GPU, what one would change."""
    shape = config.model
    console.print(
        f"[bold]fastgpt[/]  {model.n_params() / 1e6:.2f}M parameters (positions apart)  "
        f"L{shape.n_layer} H{shape.n_head} C{shape.n_embd} T{shape.block_size} V{shape.vocab_size}  "
        f"{config.tokens_per_step:,} tokens per step"
    )
    console.print(
        f"kernels {config.train.kernels}{' + torch.compile' if config.train.compile else ''}  precision {precision}  "
        f"device {hardware.device_name(device)}  data {config.data.data} ({config.data.tokenizer})  out {config.train.out}"
    )
    if device.type == "cpu" and config.train.kernels == "triton":
        console.print(
            "[yellow]No GPU: the Triton kernels run in Triton's interpreter, one program at a time in NumPy. It shows that "
            "they compute the right thing, not how fast they are. On a CUDA GPU the same command compiles them and trains "
            "the larger demo: GPT-2's tokens, 6 layers of 384, bf16. --kernels eager trains this model in plain PyTorch."
        )


@dataclass(frozen=True)
class LogLine:
    """One interval of a run. ``loss`` is the mean over all micro-batches of the interval's steps, in nats; ``mfu`` the
    share of the nominal dense peak of this very card (None on one that is unknown, and before the first timed step)."""

    step: int
    max_iters: int
    loss: float
    lr: float
    grad_norm: float
    ms: float | None
    tokens_per_second: float | None
    memory_gb: float
    mfu: float | None
    data_wait: float | None
    skipped: int = 0

    def __str__(self) -> str:
        def or_na(value: float | None, form: str) -> str:
            return "n/a" if value is None else form.format(value)

        skipped = f"  skipped {self.skipped}" if self.skipped else ""
        return (
            f"step {self.step:>6}/{self.max_iters}  loss {self.loss:.4f}  lr {self.lr:.2e}  norm {self.grad_norm:.3f}  "
            f"{or_na(self.ms, '{:,.1f}')} ms  {or_na(self.tokens_per_second, '{:,.0f}')} tok/s  "
            f"mem {self.memory_gb:.2f} GB  mfu {or_na(self.mfu, '{:.1%}')}  data {or_na(self.data_wait, '{:.1%}')}{skipped}"
        )

    def to_dict(self) -> dict[str, float | int | None]:
        """The fields, as metrics.jsonl holds them."""
        return asdict(self)
