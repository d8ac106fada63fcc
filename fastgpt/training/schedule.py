"""Learning rate over a run: linear warmup, then cosine decay to a floor (Loshchilov and Hutter 2017; GPT-3's recipe)."""

from __future__ import annotations

import math

from fastgpt.config import OptimConfig


def learning_rate(step: int, optim: OptimConfig, max_iters: int) -> float:
    """Rate for optimizer step ``step`` (0-based) of ``max_iters``; steps, not micro-batches.

    Step 0 already learns (lr / (warmup + 1)); the last step has ``lr * min_lr_ratio``; past the end it stays there.
    """
    if step < optim.warmup_iters:
        return optim.lr * (step + 1) / (optim.warmup_iters + 1)
    floor = optim.lr * optim.min_lr_ratio
    span = max_iters - 1 - optim.warmup_iters
    if step >= max_iters - 1 or span <= 0:
        return floor if max_iters > 1 and step >= max_iters - 1 else optim.lr
    progress = (step - optim.warmup_iters) / span
    return floor + 0.5 * (1 + math.cos(math.pi * progress)) * (optim.lr - floor)
