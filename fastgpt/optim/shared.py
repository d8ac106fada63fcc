"""What FusedAdamW and Muon share: the frame of a step, hyperparameters as a table on the device, checks, FSDP2's shards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fastgpt.kernels import runtime, working_copy


class DeviceOptimizer(Optimizer):
    """An optimizer that does its work in ``_update``, and what it knows of its parameters."""

    grad_scale: Tensor
    found_inf: Tensor
    """Set by GradScaler around ``step``; absent otherwise."""
    _step_supports_amp_scaling = True  # GradScaler then sets these two and leaves the rest to step

    @torch.no_grad()
    @torch.compiler.disable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. Returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    def _update(self) -> None:
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """That of the first parameter; a group may be empty."""
        return next(chain.from_iterable(group["params"] for group in self.param_groups)).device

    def with_gradients(self) -> Iterator[tuple[Any, int]]:
        """Each parameter that has a gradient, and the number of its group. Raises ValueError for one on another device."""
        device = self.device
        for i, group in enumerate(self.param_groups):
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.device != device:
                    raise ValueError(
                        f"parameters lie on {device} and {param.device}: use one {type(self).__name__} per device"
                    )
                yield param, i

    def matched(self, state_dict: dict[str, Any]) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
        """(index, parameter, state) of each parameter that ``state_dict`` has a state for."""
        for own, other in zip(self.param_groups, state_dict["param_groups"]):
            for param, index in zip(own["params"], other["params"]):
                if state := state_dict["state"].get(index):
                    yield index, param, state

    def state_tensors(self) -> list[Tensor]:
        """Every parameter with its state and its working copy."""
        tensors: list[Tensor] = []
        for param in chain.from_iterable(group["params"] for group in self.param_groups):
            copy = working_copy.existing(param)
            tensors += [param, *self.state.get(param, {}).values(), *([] if copy is None else [copy])]
        return tensors


def check_clip(max_grad_norm: float | None) -> None:
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm is {max_grad_norm}: give a positive number, or None not to clip")


def check_numbers(group: dict[str, Any], *names: str) -> None:
    for name in names:
        if not 0 <= group[name] < math.inf:
            raise ValueError(f"{name} is {group[name]}: give a number >= 0 that is finite")


def check_state(name: str, param: Tensor, state: dict[str, Any], kind: str, shapes: dict[str, torch.Size]) -> None:
    """Raise ValueError unless a parameter's state has tensors of these shapes: the kernels go by address. ``kind``: the
    optimizer whose state it should be."""
    for key, needed in shapes.items():
        if key not in state:
            raise ValueError(f"the state of {name} has no {key}, but {', '.join(state)}: load the state of {kind}")
        found = torch.as_tensor(state[key])
        if found.shape != needed and not (needed == () and found.numel() == 1):
            raise ValueError(
                f"{key} of {name} is {tuple(found.shape)}, and must be {tuple(needed)}: load the state of an optimizer over "
                "the same parameters, in the same order"
            )


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


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_of_squares(grads: list[Tensor], grad_scale: Tensor | None) -> Tensor:
    """Sum over all unscaled gradients, one fp32, the same on every rank. Raises ValueError if their shards differ in kind."""
    layouts = {(grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None for grad in grads}
    if len(layouts) > 1:
        raise ValueError(
            "parameters are sharded in different ways: shard all of them alike, or use one FusedAdamW each"
        )
    norm = torch.nn.utils.get_total_norm([local(grad) for grad in grads]).float()
    total = (norm if grad_scale is None else norm / grad_scale.squeeze()).square()
    mesh, placements = next(iter(layouts)) or (None, ())
    for dim, placement in enumerate(placements):
        if placement.is_shard():
            assert mesh is not None
            torch.distributed.all_reduce(total, group=mesh.get_group(dim))
    return total
