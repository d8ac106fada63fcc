"""One optimizer step: micro-batches forward and backward under autocast, then clip and update.

Nothing here waits for the device: loss and gradient norm come back as device tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt.config import OptimConfig
from fastgpt.model import GPT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision_for(name: str, device: torch.device) -> str:
    """``--precision`` with auto resolved: fp32 on a CPU, bf16 on a GPU."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" else "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context that forward runs under: none at fp32."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])


def parameter_groups(model: GPT, optim: OptimConfig) -> list[dict[str, Any]]:
    """Matrices and embeddings decay, norms and biases (fewer than two dimensions) do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def build_optimizer(model: GPT, optim: OptimConfig, kernels: str) -> torch.optim.Optimizer:
    """FusedAdamW for triton, torch's own (fused on CUDA) for eager: same maths, same state_dict."""
    groups = parameter_groups(model, optim)
    betas = (optim.beta1, optim.beta2)
    if kernels == "triton":
        from fastgpt.optim import FusedAdamW

        return FusedAdamW(groups, lr=optim.lr, betas=betas, eps=1e-8, max_grad_norm=optim.grad_clip or None)
    on_cuda = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=1e-8, fused=on_cuda)


@dataclass
class Stepper:
    """``stepper(batches, lr)`` -> (mean loss, gradient norm before clipping), both fp32 device scalars.

    ``forward`` is the model or its compiled form; gradient accumulation averages, so 8 micro-batches of 1 equal 1 of 8.
    """

    model: GPT
    forward: Any
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: str
    grad_clip: float

    def __call__(self, batches: Iterable[tuple[Tensor, Tensor]], grad_accum: int, lr: float) -> tuple[Tensor, Tensor]:
        losses = []
        for x, y in batches:
            with autocast(x.device, self.precision):
                loss = self.forward(x, y)[1] / grad_accum
            self.scaler.scale(loss).backward()
            losses.append(loss.detach())
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = self._update()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).sum(), norm

    def _update(self) -> Tensor:
        if hasattr(self.optimizer, "grad_norm"):  # FusedAdamW unscales, measures and clips in its own launches
            self.scaler.step(self.optimizer)
            norm = self.optimizer.grad_norm
        else:
            self.scaler.unscale_(self.optimizer)
            limit = self.grad_clip or float("inf")
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm

    def skipped_steps(self) -> int:
        """Steps that were skipped for a non-finite gradient, where the optimizer counts them. Waits for the device."""
        counter = getattr(self.optimizer, "skipped_steps", None)
        return 0 if counter is None else int(counter)
