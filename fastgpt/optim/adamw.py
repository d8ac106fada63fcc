"""FusedAdamW: torch.optim.AdamW's interface over the multi-tensor kernels of kernels/fused_adamw.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fastgpt.kernels import fused_adamw, working_copy
from fastgpt.optim.shared import (
    DeviceOptimizer,
    DeviceTable,
    check_clip,
    check_numbers,
    check_state,
    local,
    sum_of_squares,
)

_MOMENTS = ("exp_avg", "exp_avg_sq")


class FusedAdamW(DeviceOptimizer):
    """torch.optim.AdamW (same maths, defaults, param groups and state_dict) in three kernel launches and no host
    sync, with:

    - ``max_grad_norm``: clips the global norm of all gradients of all groups, as ``clip_grad_norm_`` would. ``.grad``
      is not changed.
    - ``grad_norm``: that norm before clipping, of the last step, unscaled; an fp32 tensor on the device. None before.
    - A step whose gradient norm is inf or NaN changes nothing, on the device; ``skipped_steps`` (int64, on the
      device) counts them.
    - fp32 moments whatever the parameters' dtype, bf16 parameters rounded stochastically, and the working copies of
      fp32 parameters (kernels/working_copy.py) written in the same pass.
    - Sharded parameters (FSDP2's DTensors): each rank updates its shards, and clips by the norm over all ranks.
    - GradScaler: ``scaler.step(optimizer)`` unscales inside the kernel and does not wait for the GPU.

    Parameters are dense, real tensors on one device. Each one's state is ``step`` (fp32, 0-dim, on the device),
    ``exp_avg`` and ``exp_avg_sq``; state_dicts go to and from torch.optim.AdamW. ``capturable``, ``foreach``,
    ``fused`` and ``differentiable`` are accepted and change nothing; ``amsgrad`` and ``maximize`` are refused.

    CUDA graphs: run a step before capturing one (it allocates). A captured step reads learning rate and the other
    hyperparameters from a table on the device. Floats put into ``param_groups`` (by hand or a scheduler) reach it with
    ``sync_hyperparameters()``, called before ``graph.replay()``; outside graphs ``step`` does that. A learning rate
    that is a tensor on the device is read by the captured step itself. The graph knows addresses only: keep what
    ``graph_tensors()`` returns as long as the graph, and capture anew when it returns tensors at other ones.

    Raises ValueError for a value or a parameter that does not fit.

    >>> layer = torch.nn.Linear(8, 8)
    >>> optimizer = FusedAdamW(layer.parameters(), lr=1e-3, max_grad_norm=1.0)
    >>> layer(torch.randn(4, 8)).square().mean().backward()
    >>> optimizer.step()
    >>> bool(optimizer.grad_norm > 0), int(optimizer.skipped_steps)
    (True, 0)
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        max_grad_norm: float | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        check_clip(max_grad_norm)
        self._set_up(max_grad_norm)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,
        }
        super().__init__(params, defaults)

    def _set_up(self, max_grad_norm: float | None) -> None:
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None
        self.skipped_steps: Tensor = torch.zeros((), dtype=torch.int64)
        self._hyper = DeviceTable()
        # Stochastic rounding is Philox of (seed, step, tensor, element): no generator state to save.
        self._seed = torch.initial_seed() & (2**62 - 1)

    @classmethod
    def from_optimizer(cls, optimizer: Optimizer, *, max_grad_norm: float | None = None) -> FusedAdamW:
        """Take over a torch.optim.AdamW: its parameter groups (the very dictionaries, so that a scheduler on the old
        optimizer still sets the learning rate) and its state. Do not step the old one again. Raises TypeError for another
        optimizer.

        >>> old = torch.optim.AdamW(torch.nn.Linear(8, 8).parameters(), lr=1e-4)
        >>> FusedAdamW.from_optimizer(old, max_grad_norm=1.0).param_groups[0]["lr"]
        0.0001
        """
        if not isinstance(optimizer, torch.optim.AdamW):
            raise TypeError(f"optimizer is a {type(optimizer).__name__}: from_optimizer takes over a torch.optim.AdamW")
        new = cls(optimizer.param_groups, max_grad_norm=max_grad_norm)
        for param, state in optimizer.state.items():
            if state:
                new.state[param] = _adopt(param, state)
        return new

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["betas"] = tuple(float(beta) for beta in group["betas"])
        for param in group["params"]:
            if param.is_complex() or param.layout != torch.strided:
                kind = param.dtype if param.is_complex() else param.layout
                self.param_groups.pop()
                raise ValueError(f"a parameter is {kind}: FusedAdamW updates dense real tensors")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_hyper" not in self.__dict__:  # unpickled; load_state_dict comes here as well
            self._set_up(state.get("max_grad_norm"))
        for group in state["param_groups"]:
            _check_group(group)
        super().__setstate__(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of torch.optim.AdamW. Moments are kept in fp32, where torch's own
        loading would cast them to the parameter's dtype.

        Raises ValueError, before anything is replaced, for the state of other parameters: another number of them or of
        groups, other names (where both have any), moments of another shape."""
        states: list[tuple[Tensor, dict[str, Any]]] = []
        hook = self.register_load_state_dict_pre_hook(lambda _, final: states.extend(self._matched(final)))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for param, state in states:
            self.state[param] = _adopt(param, state)

    def _matched(self, state_dict: dict[str, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
        """Each parameter that ``state_dict`` has a state for, and that state. torch's own loading compares only the numbers of
        groups and of their parameters."""
        for own, other in zip(self.param_groups, state_dict["param_groups"]):
            for mine, theirs in zip(own.get("param_names") or (), other.get("param_names") or ()):
                if mine != theirs:
                    raise ValueError(f"the state is of {theirs} where the optimizer has {mine}: load its own")
        found = list(self.matched(state_dict))
        for index, param, state in found:
            _check_state(f"parameter {index}", param, state)
        return [(param, state) for _, param, state in found]

    def graph_tensors(self) -> list[Tensor]:
        """What a captured step reads and writes besides gradients: parameters, state, working copies, hyperparameters.
        ``load_state_dict`` replaces some, and so does a write to a parameter without its copy."""
        return [self.skipped_steps, *self._hyper.tensors(), *self.state_tensors()]

    def sync_hyperparameters(self) -> None:
        """Bring what ``param_groups`` and ``max_grad_norm`` say to the table that the kernels read, in stream order
        and without waiting. Only a captured CUDA graph needs the call: before each replay."""
        clip = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        rows = [[g["lr"], *g["betas"], g["eps"], g["weight_decay"], clip] for g in self.param_groups]
        self._hyper.sync(rows, self.device)

    def _update(self) -> None:
        found = list(self.with_gradients())
        params, group_of = [param for param, _ in found], [i for _, i in found]
        grads = [_like(param, param.grad, param.grad.dtype, "gradient") for param in params]
        device = self.device
        grad_norm = torch.zeros((), dtype=torch.float32, device=device)  # a new one each step: callers may keep it
        self.skipped_steps = self.skipped_steps.to(device)
        self.grad_norm = grad_norm
        if not params:
            return
        self.sync_hyperparameters()
        states = [self._state(param) for param in params]
        copies = [working_copy.existing(param) for param in params]
        grad_scale = _scalar(getattr(self, "grad_scale", None), device)
        fused_adamw.adamw_(
            [local(param) for param in params],
            [local(grad) for grad in grads],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [state["step"] for state in states],
            [copy for copy in copies if copy is not None],
            [i for i, copy in enumerate(copies) if copy is not None],
            group_of,
            self._hyper.tensor,
            grad_scale,
            _scalar(getattr(self, "found_inf", None), device),
            grad_norm,
            self.skipped_steps,
            self._seed,
            sum_of_squares(grads, grad_scale) if any(isinstance(grad, DTensor) for grad in grads) else None,
        )
        for param, copy in zip(params, copies):
            if copy is not None:
                working_copy.mark_fresh(param)

    def _state(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            # Entered together: memory that suffices for one moment alone must not leave half a state.
            made = {key: torch.zeros_like(param, dtype=_moment_dtype(param)) for key in _MOMENTS}
            state.update(step=torch.zeros((), dtype=torch.float32, device=param.device), **made)
        for key in _MOMENTS:  # the kernels go by address: a layout of another kind would be silent nonsense
            moment = state[key]
            if moment.dtype != _moment_dtype(param) or moment.device != param.device:
                raise ValueError(
                    f"{key} is {moment.dtype} on {moment.device}, for a {param.dtype} parameter on {param.device}: "
                    f"it must be {_moment_dtype(param)} on the parameter's device"
                )
            if moment.shape != param.shape:
                _check_state("a parameter", param, state)
            if moment.stride() != param.stride() and param.numel():
                raise ValueError(
                    f"a parameter of shape {tuple(param.shape)} has strides {param.stride()}, its {key} "
                    f"{moment.stride()}: parameters must be dense and keep their strides, so make it .contiguous()"
                )
        return state


def _scalar(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.to(device, torch.float32, non_blocking=True)


def _moment_dtype(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _like(param: Tensor, value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """``value`` in ``dtype``, on param's device, with its strides: the i-th number in memory is the same element's."""
    if value.layout != torch.strided:
        raise RuntimeError(f"a {name} is {value.layout}: FusedAdamW updates from dense gradients")
    value = value.to(param.device, dtype)
    return value if value.stride() == param.stride() else torch.empty_like(param, dtype=dtype).copy_(value)


def _check_state(name: str, param: Tensor, state: dict[str, Any]) -> None:
    """Raise ValueError unless it is the state of AdamW for a parameter of this shape."""
    check_state(name, param, state, "an AdamW", {"step": torch.Size(), **dict.fromkeys(_MOMENTS, param.shape)})


def _adopt(param: Tensor, state: dict[str, Any]) -> dict[str, Tensor]:
    """State of a torch AdamW (whose step may be a float, or on the host) as FusedAdamW keeps it."""
    _check_state("a parameter", param, state)
    step = torch.as_tensor(state["step"], dtype=torch.float32).to(param.device).reshape(())
    moments = {key: _like(param.detach(), state[key], _moment_dtype(param), key) for key in _MOMENTS}
    return {**state, "step": step, **moments}


def _check_group(group: dict[str, Any]) -> None:
    for name in ("amsgrad", "maximize"):
        if group.get(name):
            raise ValueError(f"{name} is True: FusedAdamW implements AdamW without {name}, so set it to False")
    if not group.get("decoupled_weight_decay", True):
        raise ValueError("decoupled_weight_decay is False: that is Adam, and FusedAdamW implements AdamW")
    lr, betas = group.get("lr", 0.0), group.get("betas", (0.0, 0.0))
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr is a tensor of shape {tuple(lr.shape)}: give one element")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas are {tuple(betas)}: each must be in [0, 1)")
    numbers = (name for name in ("lr", "eps", "weight_decay") if name in group)
    check_numbers(group, *(name for name in numbers if not isinstance(group[name], Tensor)))
