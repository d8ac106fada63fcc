"""HellaSwag (Zellers et al. 2019): which of four endings does the model find likeliest?

    python -m fastgpt.hellaswag runs/gpt2-124m --data hellaswag_val.jsonl
    python -m fastgpt.hellaswag runs/gpt2-124m --data hub

Scored as llm.c and build-nanogpt do: the context, a space and an ending; ``acc`` compares the summed log-probability of the
ending's tokens, ``acc_norm`` their mean. Chance is 0.25; OpenAI's GPT-2 124M has an acc_norm of 0.2955 by this count.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from fastgpt import common, device
from fastgpt.common import UserError
from fastgpt.config import Device, Kernels

HUB = "Rowan/hellaswag"


class Example(NamedTuple):
    context: str
    endings: tuple[str, ...]
    label: int


class Score(NamedTuple):
    """Shares of examples answered correctly."""

    acc: float
    acc_norm: float
    examples: int

    def __str__(self) -> str:
        return f"HellaSwag acc {self.acc:.4f}, acc_norm {self.acc_norm:.4f} over {self.examples} examples (chance 0.25)"


def load(source: str) -> list[Example]:
    """Examples with a label, from a jsonl or parquet file with columns ctx, endings, label, or from the hub.

    Raises UserError for a source that cannot be read or holds something else.
    """
    try:
        rows: Sequence[dict[str, Any]]
        if source == "hub":
            from datasets import load_dataset

            rows = list(load_dataset(HUB, split="validation"))
        elif source.endswith(".parquet"):
            from pyarrow import parquet

            rows = parquet.read_table(source).to_pylist()
        else:
            rows = [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines() if line.strip()]
        examples = [
            Example(row["ctx"], tuple(row["endings"]), int(row["label"])) for row in rows if str(row["label"]) != ""
        ]
    except ImportError as error:
        raise UserError(
            f"hellaswag is {source!r}, for which the package {error.name} is missing: pip install it"
        ) from error
    except (KeyError, TypeError) as error:
        raise UserError(f"hellaswag file {source} has not the columns ctx, endings and label ({error})") from error
    except Exception as error:  # of the libraries that read it, each with its own classes
        reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"hellaswag is {source!r}, which cannot be read ({reason}): give its jsonl or parquet file"
        ) from error
    if not examples:
        raise UserError(f"hellaswag file {source} holds no example with a label")
    return examples


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, examples: Sequence[Example], where: torch.device, batch: int = 16) -> Score:
    """Score ``model`` (a GPT, called as it is: put it into eval mode) on ``examples``, ``batch`` of them at a time.

    A context too long for the model loses its beginning."""
    right = right_norm = 0
    for first in range(0, len(examples), batch):
        group = examples[first : first + batch]
        encoded = list(_encode(group, tokenizer, model.config.block_size))
        losses, counts = _losses(model, encoded, where)
        at = 0
        for example in group:
            n = len(example.endings)
            mine, tokens = losses[at : at + n], counts[at : at + n]
            right += int(mine.argmin() == example.label)
            right_norm += int((mine / tokens).argmin() == example.label)
            at += n
    return Score(right / len(examples), right_norm / len(examples), len(examples))


def _encode(examples: Sequence[Example], tokenizer: Any, block_size: int) -> Iterator[tuple[list[int], int]]:
    """Per ending: the ids, and how many of them, at the end, are the ending's."""
    for example in examples:
        context = list(tokenizer.encode(example.context))
        for ending in example.endings:
            added = list(tokenizer.encode(" " + ending))[:block_size]
            yield (context + added)[-(block_size + 1) :], len(added)


def _losses(model: Any, encoded: list[tuple[list[int], int]], where: torch.device) -> tuple[Tensor, Tensor]:
    """Summed loss of each ending's tokens, and their number, fp32 on the CPU."""
    width = max(len(ids) for ids, _ in encoded) - 1
    x = torch.zeros(len(encoded), width, dtype=torch.int64)
    y = torch.full_like(x, -100)
    for row, (ids, ending) in enumerate(encoded):
        x[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        y[row, len(ids) - 1 - min(ending, len(ids) - 1) : len(ids) - 1] = torch.tensor(ids[1:])[-ending:]
    logits = model(x.to(where))[0].float()
    losses = F.cross_entropy(logits.flatten(0, 1), y.to(where).flatten(), ignore_index=-100, reduction="none")
    return losses.view_as(x).sum(1).cpu(), (y != -100).sum(1).clamp(min=1).float()


@dataclass(frozen=True)
class HellaSwagConfig:
    """Score a checkpoint on HellaSwag.

    Examples:
      python -m fastgpt.hellaswag runs/gpt2-124m --data hellaswag_val.jsonl
      python -m fastgpt.hellaswag runs/gpt2-124m --data hub --examples 1000
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A checkpoint, or a run's folder (its newest checkpoint)."""
    data: str = "hub"
    """A jsonl or parquet file, or 'hub' to download the validation split."""
    examples: int | None = None
    """Only the first so many."""
    kernels: Kernels = "eager"
    device: Device = "auto"


def main(args: list[str]) -> int:
    config = tyro.cli(HellaSwagConfig, args=args, prog="python -m fastgpt.hellaswag")
    where = device.pick(config.device, config.kernels)
    from fastgpt.data.tokenizer import get_tokenizer
    from fastgpt.sample import load_model

    examples = load(config.data)[: config.examples]
    model, trained = load_model(config.checkpoint, config.kernels, where)
    print(evaluate(model, get_tokenizer(trained["data"]["tokenizer"]), examples, where))
    return 0


if __name__ == "__main__":
    common.run(main)
