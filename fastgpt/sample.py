"""Print text from a checkpoint: ``python -m fastgpt.sample runs/demo --prompt "def "``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from fastgpt import command, common
from fastgpt.command import Arg
from fastgpt.common import UserError, at_least
from fastgpt.config import Device, Kernels


@dataclass(frozen=True)
class SampleConfig:
    """Print text from a checkpoint, token by token as it is made.

    Examples:
      python -m fastgpt.sample runs/demo --prompt "def "
      python -m fastgpt.sample runs/gpt2-124m --temperature 0            greedy
      python -m fastgpt.sample runs/gpt2-124m --top-p 0.9 --samples 3
    """

    checkpoint: Annotated[str, Arg("CHECKPOINT", positional=True)]
    """A run's folder (its newest checkpoint), or any checkpoint that fastgpt.convert reads."""
    prompt: Annotated[str, Arg("TEXT")] = "\n"
    """The text to continue."""
    tokens: int = 200
    """How many tokens to add."""
    samples: int = 1
    """How many continuations."""
    temperature: float = 0.8
    """0 is greedy; 1 samples from the model's own distribution."""
    top_k: int | None = 200
    """Sample among the k likeliest tokens only."""
    top_p: float | None = None
    """Sample among the fewest tokens whose probabilities reach p (nucleus sampling)."""
    seed: int = 1337
    """The same seed, prompt and settings give the same text."""
    kernels: Kernels = "eager"
    """Plain PyTorch, which is the faster one for a token at a time, or the Triton kernels."""
    device: Device = "auto"
    """auto takes a CUDA GPU if there is one."""

    def __post_init__(self) -> None:
        at_least(1, tokens=self.tokens, samples=self.samples, top_k=self.top_k)
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}: it must be 0 (greedy) or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: it must lie in (0, 1]")
        if not self.prompt:
            raise UserError("prompt is empty: give at least one character")


def pieces(tokenizer: Any, ids: list[int], new: Iterable[int]) -> Iterator[str]:
    """The text of ``new`` ids after ``ids``, piece by piece; a character that needs several tokens comes when it is whole."""
    ids, shown = list(ids), len(tokenizer.decode(ids))
    for token in new:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[shown:]
            shown = len(text)
    yield tokenizer.decode(ids)[shown:]


def main(args: list[str]) -> int:
    config = command.parse(SampleConfig, args, "fastgpt.sample")
    import torch  # which takes seconds: no help page needs it

    from fastgpt.hardware.device import pick

    where = pick(config.device, config.kernels)
    # After pick(): it chooses Triton's interpreter before triton is imported.
    from fastgpt.training.evaluation import load_model

    model, tokenizer = load_model(config.checkpoint, config.kernels, where)
    generator = torch.Generator(where).manual_seed(config.seed)
    ids = list(tokenizer.encode(config.prompt))
    for _ in range(config.samples):
        new = model.generate(
            torch.as_tensor([ids], dtype=torch.int64, device=where),
            config.tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            vocab_size=tokenizer.vocab_size,
            generator=generator,
        )
        print(common.printable(config.prompt), end="", flush=True)
        for text in pieces(tokenizer, ids, map(int, new)):
            print(common.printable(text), end="", flush=True)  # a model of bytes can spell a terminal's escapes
        print("\n" + "-" * 80)
    return 0


if __name__ == "__main__":
    common.run(main)
