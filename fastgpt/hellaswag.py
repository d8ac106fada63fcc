"""Score a checkpoint on HellaSwag (Zellers et al. 2019): which of four endings does the model find likeliest?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastgpt import command, common
from fastgpt.command import Arg
from fastgpt.common import at_least
from fastgpt.config import Device, Kernels


@dataclass(frozen=True)
class HellaSwagConfig:
    """Score a checkpoint on HellaSwag.

    Examples:
      python -m fastgpt.hellaswag runs/gpt2-124m --data hellaswag_val.jsonl
      python -m fastgpt.hellaswag runs/gpt2-124m --data hub --examples 1000
    """

    checkpoint: Annotated[str, Arg("CHECKPOINT", positional=True)]
    """A run's folder (its newest checkpoint), or any checkpoint that fastgpt.convert reads."""
    data: Annotated[str, Arg("FILE")] = "hub"
    """A jsonl or parquet file, or 'hub' to download the validation split."""
    examples: int | None = None
    """Only the first so many."""
    kernels: Kernels = "eager"
    """Plain PyTorch, or the Triton kernels."""
    device: Device = "auto"
    """auto takes a CUDA GPU if there is one."""

    def __post_init__(self) -> None:
        at_least(1, examples=self.examples)


def main(args: list[str]) -> int:
    config = command.parse(HellaSwagConfig, args, "fastgpt.hellaswag")
    from fastgpt.hardware.device import pick  # which imports torch: no help page needs it

    where = pick(config.device, config.kernels)
    # After pick(): it chooses Triton's interpreter before triton is imported.
    from fastgpt.training.evaluation import hellaswag_score, load_hellaswag, load_model

    model, tokenizer = load_model(config.checkpoint, config.kernels, where)  # first: it may not be one, the hub is slow
    examples = load_hellaswag(config.data)[: config.examples]
    from rich.progress import Progress

    console = common.console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("scoring", total=len(examples))

        def going_on() -> bool:  # asked before each batch
            bar.advance(task, 16)
            return False

        score = hellaswag_score(model, tokenizer, examples, where, 16, going_on)
    print(score)
    return 0


if __name__ == "__main__":
    common.run(main)
