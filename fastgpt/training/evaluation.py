"""How good the model is by now: validation loss on fixed windows, and a sample of its text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastgpt import hellaswag
from fastgpt.data.tokenizer import get_tokenizer
from fastgpt.training.distributed import evaluating
from fastgpt.training.run import Run
from fastgpt.training.step import autocast


@torch.no_grad()
def evaluate(run: Run) -> float:
    """Mean validation loss in nats over ``eval_iters`` x ``batch_size`` windows, the same ones every time, in every run and
    on any number of ranks, in eval mode (no dropout)."""
    windows = run.config.train.eval_iters * run.config.data.batch_size
    batches = max(1, windows // (run.micro_batch * run.world.size))
    losses = []
    with evaluating(run.model):
        for batch in run.val_loader.eval_batches(batches, run.device):
            with autocast(run.device, run.stepper.precision):
                losses.append(run.stepper.forward(*batch)[1])
    return run.world.mean(torch.stack(losses).mean()).item()


def sample(run: Run, tokens: int = 40) -> str:
    """Text that continues ``sample_prompt``, from generators of its own: training's are left alone. Called by all ranks
    (sharded parameters are gathered by all)."""
    tokenizer = get_tokenizer(run.config.data.tokenizer)
    ids = list(tokenizer.encode(run.config.train.sample_prompt)) or [0]
    prompt = torch.as_tensor([ids], dtype=torch.int64, device=run.device)
    generator = torch.Generator(run.device).manual_seed(run.config.train.seed)
    with evaluating(run.model), autocast(run.device, run.stepper.precision):
        new = run.model.generate(
            prompt, tokens, temperature=0.8, top_k=50, vocab_size=tokenizer.vocab_size, generator=generator
        )
        return tokenizer.decode(ids + [int(token) for token in new])


def score_hellaswag(run: Run, examples: Sequence[hellaswag.Example]) -> hellaswag.Score:
    """HellaSwag with the model as it is now. Called by all ranks."""
    with evaluating(run.model), autocast(run.device, run.stepper.precision):
        return hellaswag.evaluate(run.model, get_tokenizer(run.config.data.tokenizer), examples, run.device)
