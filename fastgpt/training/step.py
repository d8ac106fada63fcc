"""One optimizer step: micro-batches forward and backward under autocast, then clip and update.

Nothing here waits for the device: loss and gradient norm come back as device tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastgpt import hardware
from fastgpt.config import EXPERIMENTAL, OptimConfig
from fastgpt.kernels import runtime
from fastgpt.model import GPT
from fastgpt.training.distributed import World

if TYPE_CHECKING:  # which imports this file
    from fastgpt.training.graphs import Graphs

DTYPES = {
    **{"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp16-fast": torch.float16},
    "fp8": torch.bfloat16,  # of what is not in fp8
}
"""Of matmul operands, by ``--precision``."""


def precision_for(name: str, device: torch.device) -> str:
    """``--precision`` with auto resolved: fp32 on a CPU, bf16 on a GPU."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" else "fp32"


def usable_precision(name: str, device: torch.device, kernels: str) -> tuple[str, str | None]:
    """What a run with ``--precision name`` computes in, and, if that is not what was asked for, a sentence that says why.

    An experimental mode needs ``--kernels triton``, and a card that is faster in it: anywhere else, such as where a run is
    resumed on another card, auto's choice takes its place. A card that hardware.GPUS does not have is given what is asked."""
    if name not in EXPERIMENTAL:
        return precision_for(name, device), None
    gpu, unable = hardware.present(device), _unable(name, device)
    if kernels != "triton":
        why = f"which --kernels {kernels} does not have"
    elif device.type != "cuda" and not runtime.INTERPRET:
        why = "which only the Triton kernels have, and they do not run here"
    elif unable is not None:
        why = f"but {unable}"
    elif gpu is not None and not hardware.gains(name, gpu):
        why = f"and {gpu.name} is no faster in it"
    else:
        return name, None
    safe = precision_for("auto", device)
    return safe, f"precision is '{name}', {why}: {safe} is used instead"


def _unable(name: str, device: torch.device) -> str | None:
    """Why the kernels of an experimental mode cannot run on a GPU, in the table or not."""
    if name != "fp8" or device.type != "cuda":
        return None
    from fastgpt.kernels._fp8_launch import refusal

    return refusal(device)


def scales_loss(precision: str) -> bool:
    """Whether gradients are stored in fp16, whose smallest numbers a loss scale has to lift them over."""
    return DTYPES[precision] == torch.float16


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
    adds_in_place: bool = False
    """Weight gradients of a later micro-batch are added to ``.grad`` by the kernel that forms them (``gradients_in_place``):
    the Triton operations on one rank, not compiled. Gradients then differ in the last bits of fp32 sums."""
    graphs: Graphs | None = None
    """Replays captured steps where they fit; whoever gives one calls ``graphs.capture()`` between steps when it is due."""
    _skipped: Tensor | None = None

    def __call__(self, batches: Iterable[tuple[Tensor, ...]], grad_accum: int, lr: float) -> tuple[Tensor, Tensor]:
        losses, captured = [], None
        for i, batch in enumerate(batches):  # (x, y), or (x, y, document ids)
            if i == 0 and self.graphs is not None:
                captured = self.graphs.for_step(batch, grad_accum)
            self.synchronize(i == grad_accum - 1)
            losses.append(self.micro_step(batch, grad_accum) if captured is None else captured.micro_step(i, batch))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = self.update() if captured is None else captured.update()
        self.optimizer.zero_grad(set_to_none=True)
        if captured is None and self.graphs is not None:
            self.graphs.ran_directly(batch, grad_accum)
        return self.world.mean(torch.stack(losses).sum()), norm

    def micro_step(self, batch: tuple[Tensor, ...], grad_accum: int) -> Tensor:
        """Forward and backward of one of ``grad_accum`` micro-batches. Returns its share of the step's loss."""
        with self._adding(), autocast(batch[0].device, self.precision):
            loss = self.forward(*batch)[1] / grad_accum
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _adding(self) -> AbstractContextManager:
        if not self.adds_in_place:
            return nullcontext()
        from fastgpt.kernels.fused_linear import gradients_in_place

        return gradients_in_place()

    def update(self) -> Tensor:
        """Clip, optimizer step, loss scale. Returns the gradient norm before clipping."""
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
