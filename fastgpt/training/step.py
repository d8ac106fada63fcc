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
from torch.amp.grad_scaler import OptState
from torch.distributed.tensor import DTensor

from fastgpt.kernels.working_copy import copies_kept, gradients_in_place
from fastgpt.model import GPT
from fastgpt.ops import autocast
from fastgpt.training.distributed import World


class LossScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler, whose ``step`` leaves the search for inf and NaN to an optimizer that does it itself.

    GradScaler reads and writes every gradient once before it calls the optimizer, 8 bytes per parameter. FusedAdamW unscales
    in its own pass, skips a step whose norm is not finite on the device and counts it: its ``grad_norm`` says what GradScaler
    wants to know, over all ranks. Scale and growth counter are tensors that ``update`` changes in place, so that a CUDA graph
    may hold ``scale``, ``step`` and ``update``, once a step outside of it has made them. Any other optimizer, and one whose
    gradients were unscaled beforehand, gets GradScaler's own step. Micikevicius et al. 2018 (arXiv 1710.03740).
    """

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        if not self.is_enabled() or not hasattr(optimizer, "grad_norm"):
            return super().step(optimizer, *args, **kwargs)
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is not OptState.READY:  # unscaled by hand, or stepped already, which is refused
            return super().step(optimizer, *args, **kwargs)
        scale, _ = self._check_scale_growth_tracker("step")
        optimizer.grad_scale = scale  # type: ignore[attr-defined]
        try:
            result = optimizer.step(*args, **kwargs)
        finally:
            del optimizer.grad_scale  # type: ignore[attr-defined]
        overflow = (~torch.isfinite(optimizer.grad_norm)).to(torch.float32)
        state["found_inf_per_device"] = {overflow.device: overflow}
        state["stage"] = OptState.STEPPED
        return result


@dataclass
class Stepper:
    """``stepper(batches, grad_accum, lr)`` -> (mean loss, gradient norm before clipping), both fp32 device scalars, and
    both over all ranks. Groups with an ``lr_ratio`` take that multiple of ``lr``, and Muon's take ``momentum`` where it is
    given.

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
    graphs: Any = None
    """A graphs.Graphs, which replays captured steps where they fit; the caller runs its ``capture()`` between steps when it is
    ``due``."""
    _skipped: Tensor | None = None

    @copies_kept()  # until its end nothing but the optimizer writes parameters
    def __call__(
        self, batches: Iterable[tuple[Tensor, ...]], grad_accum: int, lr: float, momentum: float | None = None
    ) -> tuple[Tensor, Tensor]:
        losses, captured = [], None
        for i, batch in enumerate(batches):  # (x, y), or (x, y, document ids)
            if i == 0 and self.graphs is not None:
                captured = self.graphs.for_step(batch, grad_accum)
            self.synchronize(i == grad_accum - 1)
            losses.append(self.micro_step(batch, grad_accum) if captured is None else captured.micro_step(i, batch))
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)
            if momentum is not None and "momentum" in group:
                group["momentum"] = momentum
        norm = self.update() if captured is None else captured.update()
        self.optimizer.zero_grad(set_to_none=True)
        if captured is None and self.graphs is not None:
            self.graphs.ran_directly(batch, grad_accum)
        return self.world.mean(torch.stack(losses).sum()), norm

    def micro_step(self, batch: tuple[Tensor, ...], grad_accum: int) -> Tensor:
        """Forward and backward of one of ``grad_accum`` micro-batches. Returns its share of the step's loss."""
        adding: AbstractContextManager = gradients_in_place() if self.adds_in_place else nullcontext()
        with adding, autocast(batch[0].device, self.precision):
            loss = self.forward(*batch)[1] / grad_accum
        self.scaler.scale(loss).backward()
        return loss.detach()

    def update(self) -> Tensor:
        """Clip, optimizer step, loss scale. Returns the gradient norm before clipping."""
        if isinstance(self.optimizer, torch.optim.AdamW):
            return self._update_torch()
        self.scaler.step(self.optimizer)  # FusedAdamW and MuonAdamW unscale, measure, clip and skip themselves
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
        elif norm.is_cuda and not isinstance(next(self.model.parameters()), DTensor):
            # What GradScaler does: the fused kernel reads the flag on the device, so the host need not wait for it.
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
