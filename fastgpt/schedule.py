"""Learning rate over a run: linear warmup, then the shape that ``--schedule`` names, continuous and never negative. And what
else may change on the way: Muon's momentum, micro-batches of a step, windows. Each is told from the step alone, so that a
resumed run goes on with the same."""

from __future__ import annotations

import math

from fastgpt.config import OptimConfig


def learning_rate(step: int, optim: OptimConfig, max_iters: int) -> float:
    """Rate for optimizer step ``step`` (0-based) of ``max_iters``; steps, not micro-batches.

    Step 0 already learns (lr / (warmup + 1)). Then, down to the floor ``lr * min_lr_ratio`` at the last step and past it:

    cosine    half a cosine from the end of the warmup (Loshchilov and Hutter 2017; GPT-3's recipe)
    linear    a straight line from the end of the warmup (Bergsma et al. 2025 find it best at high tokens per parameter)
    wsd       constant, then a straight line over the last ``decay_share`` of the run (Hu et al. 2024; Haegele et al. 2024)
    constant  no decay: ``min_lr_ratio`` does not count
    """
    if step < optim.warmup_iters:
        return optim.lr * (step + 1) / (optim.warmup_iters + 1)
    if optim.schedule == "constant":
        return optim.lr
    floor, last = optim.lr * optim.min_lr_ratio, max_iters - 1
    start = optim.warmup_iters
    if optim.schedule == "wsd":
        start = max(start, last - round(optim.decay_share * max_iters))
    if step >= last or last <= start:
        return floor if step >= last > 0 else optim.lr
    progress = max(0.0, (step - start) / (last - start))
    height = 0.5 * (1 + math.cos(math.pi * progress)) if optim.schedule == "cosine" else 1 - progress
    return floor + height * (optim.lr - floor)


def muon_momentum(step: int, optim: OptimConfig) -> float:
    """Muon's momentum at optimizer step ``step`` (0-based): a straight line from ``muon_momentum_start`` to ``muon_momentum``
    over ``muon_momentum_warmup`` steps, then constant (modded-nanogpt, record 9)."""
    share = min(1.0, step / optim.muon_momentum_warmup) if optim.muon_momentum_warmup else 1.0
    return (1 - share) * optim.muon_momentum_start + share * optim.muon_momentum


def micro_batches(step: int, optim: OptimConfig, grad_accum: int) -> int:
    """Micro-batches of optimizer step ``step`` (0-based): a straight line to ``grad_accum`` over ``batch_warmup_iters``."""
    return grad_accum if step >= optim.batch_warmup_iters else _risen(step, optim.batch_warmup_iters, grad_accum)


def micro_batches_until(step: int, optim: OptimConfig, grad_accum: int) -> int:
    """Micro-batches of all steps before ``step``: their sum, level by level, as a run may have any number of steps."""
    risen, rising = min(step, optim.batch_warmup_iters), optim.batch_warmup_iters + 1
    levels = sum(max(0, risen - level * rising // grad_accum) for level in range(grad_accum)) if risen else 0
    return levels + (step - risen) * grad_accum


def window_limit(step: int, optim: OptimConfig, block_size: int) -> int | None:
    """Most tokens that a token attends to, itself among them, in training at optimizer step ``step`` (0-based): a straight line
    to ``block_size`` over ``window_warmup_iters`` steps, then None, no limit (modded-nanogpt, record 13)."""
    return None if step >= optim.window_warmup_iters else _risen(step, optim.window_warmup_iters, block_size)


def _risen(step: int, steps: int, whole: int) -> int:
    """The part of ``whole`` at ``step`` of a straight line that has all of it after ``steps``; at least 1."""
    return -(-whole * (step + 1) // (steps + 1))
