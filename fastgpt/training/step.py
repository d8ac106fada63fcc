"""One optimizer step: micro-batches forward and backward under autocast, then clip and update.

Nothing here waits for the device: loss and gradient norm come back as device tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastgpt.config import OptimConfig
from fastgpt.model import GPT
from fastgpt.training.distributed import World

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
    """``stepper(batches, grad_accum, lr)`` -> (mean loss, gradient norm before clipping), both fp32 device scalars, and
    both over all ranks.

    ``forward`` is the model or its compiled or distributed form; gradient accumulation averages, so 8 micro-batches of 1
    equal 1 of 8. A step whose gradient norm is inf or NaN changes nothing, on the device; ``skipped`` counts them.
    """

    model: GPT
    forward: Any
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: str
    grad_clip: float
    world: World = field(default_factory=World)
    synchronize: Callable[[bool], None] = lambda last: None
    """Called before each micro-batch: whether its backward pass exchanges gradients with the other ranks."""
    _skipped: Tensor | None = None

    def __call__(self, batches: Iterable[tuple[Tensor, ...]], grad_accum: int, lr: float) -> tuple[Tensor, Tensor]:
        losses = []
        for i, batch in enumerate(batches):  # (x, y), or (x, y, document ids)
            self.synchronize(i == grad_accum - 1)
            with autocast(batch[0].device, self.precision):
                loss = self.forward(*batch)[1] / grad_accum
            self.scaler.scale(loss).backward()
            losses.append(loss.detach())
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = self._update()
        self.optimizer.zero_grad(set_to_none=True)
        return self.world.mean(torch.stack(losses).sum()), norm

    def _update(self) -> Tensor:
        if isinstance(self.optimizer, torch.optim.AdamW):
            return self._update_torch()
        self.scaler.step(self.optimizer)  # FusedAdamW unscales, measures, clips and skips in its own launches
        self.scaler.update()
        return self.optimizer.grad_norm  # type: ignore[attr-defined]

    def _update_torch(self) -> Tensor:
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip or float("inf"))
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        bad = ~torch.isfinite(norm)
        self._skipped = bad.long() if self._skipped is None else self._skipped + bad
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif norm.is_cuda and not isinstance(
            next(self.model.parameters()), DTensor
        ):  # what GradScaler does: the fused kernel reads the flag, and the host need not wait
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not bad:
            self.optimizer.step()
        return norm

    def skipped_steps(self) -> int:
        """Steps that were skipped for a non-finite gradient. Waits for the device."""
        counter = getattr(self.optimizer, "skipped_steps", self._skipped)
        return 0 if counter is None else int(counter)
