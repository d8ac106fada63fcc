"""How good a model is: validation loss on fixed windows, a sample of its text, HellaSwag.

HellaSwag (Zellers et al. 2019) asks which of four endings continues a context. The model's answer is the ending with the lowest
summed loss of its tokens (acc), or the lowest mean loss, which does not favour short endings (acc_norm).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastgpt.common import UserError, first_line, read_text, shortened
from fastgpt.data.tokenizer import CharTokenizer, Tokenizer, get_tokenizer
from fastgpt.model import GPT
from fastgpt.ops import autocast
from fastgpt.ops import get as get_ops
from fastgpt.training.distributed import evaluating
from fastgpt.training.run import Run

HELLASWAG_HUB = "Rowan/hellaswag"
IGNORED = -100
"""The target of padding, and of a context's tokens."""


def load_model(source: str, kernels: str, where: torch.device) -> tuple[GPT, Tokenizer]:
    """The model of any checkpoint that fastgpt.convert reads, in eval mode on ``where``, and the tokenizer that it was trained
    with (GPT-2's, where the checkpoint does not say). Raises UserError."""
    from fastgpt.checkpoints.formats.any import load_weights  # the formats of others: training has no use for them

    portable = load_weights(source)
    letters = portable.letters
    tokenizer = get_tokenizer(portable.tokenizer) if letters is None else CharTokenizer(letters, source)
    if "fastgpt" not in portable.extras and portable.config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"{source} has a vocabulary of {portable.config.vocab_size}, and does not say of which tokenizer: the letters of "
            "nanoGPT's character models are in data/NAME/meta.pkl, so be where that is, or put meta.pkl beside it"
        )
    model = GPT.from_weights(portable.config, portable.weights, get_ops(kernels))
    return model.to(where).eval(), tokenizer


def _tokenizer_of(run: Run) -> Tokenizer:
    return run.corpus.tokenizer if run.corpus else get_tokenizer(run.config.data.tokenizer)


def _never() -> bool:
    return False


@torch.no_grad()
def evaluate(run: Run, stopping: Callable[[], bool] = _never) -> float | None:
    """Mean validation loss in nats over ``eval_iters`` x ``batch_size`` windows, the same ones every time, in every run and
    on any number of ranks, in eval mode (no dropout). None if ``stopping()``, which is asked before each batch, wants its end.
    """
    windows = run.config.train.eval_iters * run.config.data.batch_size
    batches = max(1, windows // (run.eval_batch * run.world.size))
    losses = []
    with evaluating(run.model):
        for batch in run.val_loader.eval_batches(batches, run.device, run.eval_batch):
            if stopping():
                return None
            with autocast(run.device, run.stepper.precision):
                losses.append(run.stepper.forward(*batch)[1])
    return run.world.mean(torch.stack(losses).mean()).item()


def sample(run: Run, tokens: int = 40) -> str:
    """Text that continues ``sample_prompt``, from generators of its own: training's are left alone. Called by all ranks
    (sharded parameters are gathered by all)."""
    tokenizer = _tokenizer_of(run)
    try:
        ids = list(tokenizer.encode(run.config.train.sample_prompt)) or [0]
    except (
        UserError
    ):  # a vocabulary of letters without the default's line end; a prompt that was given has been checked
        ids = [0]
    prompt = torch.as_tensor([ids], dtype=torch.int64, device=run.device)
    generator = torch.Generator(run.device).manual_seed(run.config.train.seed)
    model = run.model
    if run.device.type == "cpu" and run.config.train.kernels == "triton" and run.world.size == 1:
        # In the interpreter a token takes a second. The weights are the same tensors.
        model = GPT.from_weights(run.config.model, run.model.state_dict(), get_ops("eager"))
    with evaluating(model), autocast(run.device, run.stepper.precision):
        new = model.generate(
            prompt, tokens, temperature=0.8, top_k=50, vocab_size=tokenizer.vocab_size, generator=generator
        )
        return tokenizer.decode(ids + [int(token) for token in new])


class HellaSwagExample(NamedTuple):
    """A context, its possible endings, and the index of the right one."""

    context: str
    endings: tuple[str, ...]
    label: int


class HellaSwagScore(NamedTuple):
    """Shares of examples answered correctly, by summed and by mean loss."""

    acc: float
    acc_norm: float
    examples: int

    def __str__(self) -> str:
        return f"HellaSwag acc {self.acc:.4f}, acc_norm {self.acc_norm:.4f} over {self.examples} examples (chance 0.25)"


def load_hellaswag(source: str) -> list[HellaSwagExample]:
    """Examples with a label, from a jsonl or parquet file with columns ctx, endings, label, or from the hub.

    Raises UserError for a source that cannot be read or holds something else.
    """
    try:
        rows: Sequence[dict[str, Any]]
        if source == "hub":
            from datasets import load_dataset

            rows = list(load_dataset(HELLASWAG_HUB, split="validation"))
        elif source.endswith(".parquet"):
            from pyarrow import parquet

            rows = parquet.read_table(source).to_pylist()
        else:
            lines = read_text(Path(source), "hellaswag file").splitlines()
            rows = [json.loads(line) for line in lines if line.strip()]
        labelled = [(number, row) for number, row in enumerate(rows, 1) if str(row["label"]) != ""]
        examples = [_example(row, f"hellaswag file {source}, row {number},") for number, row in labelled]
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"hellaswag is {source!r}, for which a package is missing: pip install {error.name}") from error
    except (KeyError, TypeError) as error:
        raise UserError(f"hellaswag file {source} has not the columns ctx, endings and label ({error})") from error
    except Exception as error:  # of the libraries that read it, each with its own classes
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"hellaswag is {source!r}, which cannot be read ({reason}): give its jsonl or parquet file"
        ) from error
    if not examples:
        raise UserError(f"hellaswag file {source} holds no example with a label")
    return examples


def _example(row: dict[str, Any], where: str) -> HellaSwagExample:
    """A row, if it can be scored: a context, at least two endings, and the label of one. Raises UserError beginning with
    ``where``."""
    context, endings, label = row["ctx"], row["endings"], row["label"]
    if not isinstance(context, str) or not context:
        raise UserError(f"{where} has no context: ctx is {shortened(repr(context))}")
    if not isinstance(endings, (list, tuple)) or len(endings) < 2 or not all(e and isinstance(e, str) for e in endings):
        raise UserError(f"{where} has no two endings to choose from: endings is {shortened(repr(endings))}")
    if str(label) not in map(str, range(len(endings))):
        raise UserError(
            f"{where} has label {shortened(repr(label))}: of {len(endings)} endings the last is {len(endings) - 1}"
        )
    return HellaSwagExample(context, tuple(endings), int(label))


@torch.no_grad()
def hellaswag_score(
    model: Any,
    tokenizer: Any,
    examples: Sequence[HellaSwagExample],
    where: torch.device,
    batch: int = 16,
    stopping: Callable[[], bool] = _never,
) -> HellaSwagScore | None:
    """Score ``model`` (a GPT, called as it is: put it into eval mode) on ``examples``, ``batch`` of them at a time. None as in
    ``evaluate``.

    A context too long for the model loses its beginning."""
    right = right_norm = 0
    for first in range(0, len(examples), batch):
        if stopping():
            return None
        group = examples[first : first + batch]
        encoded = [
            _ending(example, ending, tokenizer, model.config.block_size)
            for example in group
            for ending in example.endings
        ]
        x, y = (pad_sequence(list(rows), True, padding) for rows, padding in zip(zip(*encoded), (0, IGNORED)))
        logits = model(x.to(where))[0].float()
        losses = F.cross_entropy(logits.flatten(0, 1), y.to(where).flatten(), ignore_index=IGNORED, reduction="none")
        sums, counts = losses.view_as(x).sum(1).cpu(), (y != IGNORED).sum(1).clamp(min=1)
        endings = [len(example.endings) for example in group]
        for example, loss, tokens in zip(group, sums.split(endings), counts.split(endings)):
            right += int(loss.argmin() == example.label)
            right_norm += int((loss / tokens).argmin() == example.label)
    return HellaSwagScore(right / len(examples), right_norm / len(examples), len(examples))


def _ending(example: HellaSwagExample, ending: str, tokenizer: Any, block_size: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a context and one of its endings; no loss is counted for the context."""
    added = list(tokenizer.encode(" " + ending))[:block_size]
    ids = torch.tensor((list(tokenizer.encode(example.context)) + added)[-(block_size + 1) :])
    targets = ids[1:].clone()
    targets[: max(0, len(targets) - len(added))] = IGNORED
    return ids[:-1], targets


def score_hellaswag(
    run: Run, examples: Sequence[HellaSwagExample], stopping: Callable[[], bool] = _never
) -> HellaSwagScore | None:
    """HellaSwag with the model as it is now. None as in ``evaluate``. Called by all ranks."""
    tokenizer = _tokenizer_of(run)
    with evaluating(run.model), autocast(run.device, run.stepper.precision):
        return hellaswag_score(run.model, tokenizer, examples, run.device, min(16, run.eval_batch), stopping)
