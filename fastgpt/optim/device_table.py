"""Hyperparameters of an optimizer's groups as a table on the device, which kernels and captured CUDA graphs read."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.kernels import runtime


class DeviceTable:
    """``tensor``: (groups, hyperparameters) fp64. It stays where it is while its size does, so a graph may hold its address."""

    def __init__(self) -> None:
        self._tensor: Tensor | None = None
        self._values: list[list[float]] = []

    @property
    def tensor(self) -> Tensor:
        assert self._tensor is not None, "sync it first"
        return self._tensor

    def tensors(self) -> list[Tensor]:
        """The table, once it is there."""
        return [] if self._tensor is None else [self._tensor]

    @torch.no_grad()
    def sync(self, rows: list[list[float | Tensor]], device: torch.device) -> None:
        """Bring ``rows`` to the device, in stream order and without waiting. One-element tensors among them are copied each
        time, on the device: a captured graph then reads them itself."""
        values = [[0.0 if isinstance(value, Tensor) else float(value) for value in row] for row in rows]
        old = self._tensor
        if old is None or old.device != device or values != self._values:
            if runtime.capturing(device):
                raise RuntimeError(
                    "hyperparameters changed since the last step: call sync_hyperparameters() before the graph capture"
                )
            host = torch.tensor(values, dtype=torch.float64)
            # New pinned memory each time: the GPU may not have read the last.
            host = host.pin_memory() if device.type == "cuda" else host
            if old is None or old.device != device or old.shape != host.shape:
                self._tensor = torch.empty(host.shape, dtype=torch.float64, device=device)
            self.tensor.copy_(host, non_blocking=True)
            self._values = values
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                if isinstance(value, Tensor):
                    if runtime.capturing(device) and value.device != device:
                        raise RuntimeError(f"lr is a tensor on {value.device}: a graph would not see it change")
                    self.tensor[i, j].copy_(value.squeeze(), non_blocking=True)
