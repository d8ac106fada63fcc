"""A model's optimizer: which parameters decay, and which implementation updates them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastgpt.config import OptimConfig


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Matrices and embeddings decay, norms and biases (fewer than two dimensions) do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, optim: OptimConfig, kernels: str) -> torch.optim.Optimizer:
    """FusedAdamW for triton, torch's own (fused on CUDA) for eager: same maths, same state_dict."""
    groups = parameter_groups(model, optim)
    betas = (optim.beta1, optim.beta2)
    if kernels == "triton":
        from fastgpt.optim.adamw import FusedAdamW

        return FusedAdamW(groups, lr=optim.lr, betas=betas, eps=1e-8, max_grad_norm=optim.grad_clip or None)
    on_cuda = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=1e-8, fused=on_cuda)
