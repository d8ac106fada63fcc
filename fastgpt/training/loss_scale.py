"""Dynamic loss scaling that never waits for the device, and reads no gradient that the optimizer does not read anyway."""

from __future__ import annotations

from typing import Any

import torch
from torch.amp.grad_scaler import OptState


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
