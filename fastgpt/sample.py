"""Print text from a checkpoint: ``python -m fastgpt.sample runs/demo --prompt "def "``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from fastgpt import cli, device
from fastgpt.config import Device, Kernels, ModelConfig
from fastgpt.errors import UserError


@dataclass(frozen=True)
class SampleConfig:
    """Print text from a checkpoint."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A checkpoint file, or a run's folder (its newest checkpoint)."""
    prompt: str = "\n"
    """The text to continue."""
    tokens: int = 200
    """How many tokens to add."""
    samples: int = 1
    """How many continuations."""
    temperature: float = 0.8
    """0 is greedy; 1 samples from the model's own distribution."""
    top_k: int | None = 200
    """Sample among the k likeliest tokens only."""
    seed: int = 1337
    kernels: Kernels = "eager"
    device: Device = "auto"

    def __post_init__(self) -> None:
        for name in ("tokens", "samples"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}: it must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}: it must be at least 1")
        if not self.prompt:
            raise UserError("prompt is empty: give at least one character")


def main(args: list[str]) -> int:
    config = tyro.cli(SampleConfig, args=args, prog="fastgpt.sample")
    where = device.pick(config.device, config.kernels)
    from fastgpt.data import get_tokenizer
    from fastgpt.model import GPT
    from fastgpt.ops import get as get_ops
    from fastgpt.training import checkpoint

    saved = checkpoint.load(checkpoint.resolve(config.checkpoint))
    model = GPT(ModelConfig(**saved["config"]["model"]), get_ops(config.kernels))
    model.load_state_dict(saved["model"])
    model.to(where).eval()
    tokenizer = get_tokenizer(saved["config"]["data"]["tokenizer"])
    generator = torch.Generator(where).manual_seed(config.seed)
    prompt = torch.as_tensor([list(tokenizer.encode(config.prompt))], dtype=torch.int64, device=where)
    for _ in range(config.samples):
        new = model.generate(
            prompt,
            config.tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            vocab_size=tokenizer.vocab_size,
            generator=generator,
        )
        print(tokenizer.decode(prompt[0].tolist() + [int(token) for token in new]))
        print("-" * 80)
    return 0


if __name__ == "__main__":
    cli.run(main)
