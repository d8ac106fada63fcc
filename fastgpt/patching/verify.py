"""``patch(model, verify=batch)``: one training step's loss and gradients, patched against unpatched, on the model's own device
and in its dtypes. What the trials on a CPU copy cannot see is a kernel that is wrong on this machine.

The bound is that of every kernel (fastgpt/kernels/parity.py): twice the unpatched model's own error, and a few eps."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fastgpt.common import UserError, first_line
from fastgpt.kernels.parity import allowed, errors
from fastgpt.ops import Ops
from fastgpt.patching.probe import cast, computing_in, dropouts
from fastgpt.patching.swap import Change, fuse, restore

Figures = dict[str, tuple[float, float]]
"""{"loss" or the parameter whose gradient it is: (error, largest error that is allowed)}."""

_MATRICES = 8
"""So many weight matrices have their gradient compared, beside every bias and norm."""


def fuse_and_verify(model: nn.Module, changes: Sequence[Change], ops: Ops, batch: Any) -> Figures:
    """Make the changes, and return how far loss and gradients then are from those of ``model`` in fp64, beside what is allowed.

    ``batch`` is what the model is called with: (idx, targets), or a dict with labels. An autocast that is on applies. The mode,
    dropout (off meanwhile), ``.grad`` and random state of the model stay as they are. Takes the memory of a copy of the
    model in fp64. Raises UserError, naming the operation, if anything is further off than allowed."""
    device = next(model.parameters()).device
    arguments = dict(batch) if isinstance(batch, Mapping) else batch
    if not isinstance(arguments, (dict, tuple, list)):
        raise UserError(f"verify is a {type(batch).__name__}: give (idx, targets), or a dict of arguments with labels")
    arguments = tree_map_only(Tensor, lambda tensor: tensor.to(device), arguments)

    def measured(model: nn.Module, enabled: bool) -> dict[str, Tensor]:
        dtype = torch.get_autocast_dtype(device.type)
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.autocast(device.type, enabled=enabled, dtype=dtype),
            torch.enable_grad(),
        ):
            return _loss_and_gradients(model, arguments)

    autocast = torch.is_autocast_enabled(device.type)
    with _training_without_dropout(model):
        try:
            own = measured(model, autocast)
            with computing_in(torch.float64, model):
                wide = measured(cast(copy.deepcopy(model), torch.float64), False)
        except Exception as failure:
            raise UserError(
                f"verify: the unpatched model fails on this batch ({type(failure).__name__}: {first_line(failure)})"
            ) from failure
        if not all(tensor.isfinite().all() for tensor in own.values()):
            raise UserError("verify: loss or gradients of the unpatched model are not finite on this batch")
        narrow = torch.get_autocast_dtype(device.type) if autocast else min(_dtypes(model), key=lambda d: d.itemsize)

        figures: Figures = {}

        def wrong() -> str | None:
            """What is wrong with the model as it is patched now."""
            try:
                found = measured(model, autocast)
            except Exception as failure:
                return f"the model fails ({type(failure).__name__}: {first_line(failure)})"
            figures.update((name, _worst(got, own[name], wide[name], narrow)) for name, got in found.items())
            name = max(figures, key=lambda name: _ratio(figures[name]))
            if _ratio(figures[name]) <= 1:
                return None
            what = "the loss" if name == "loss" else f"the gradient of {name}"
            return "{} is off by {:.1e}, where {:.1e} is allowed".format(what, *figures[name])

        for change in changes:
            fuse(change, ops)
        if (why := wrong()) is None:
            return figures
        for change in changes:
            restore(change.module)
        for operation in dict.fromkeys(change.operation for change in changes):  # one after the other, until it fails
            for change in changes:
                if change.operation == operation:
                    fuse(change, ops)
            if again := wrong():
                why = again
                break
    raise UserError(f"patch was undone: with the fused {operation} {why}")


def _loss_and_gradients(model: nn.Module, arguments: Any) -> dict[str, Tensor]:
    outputs = model(**arguments) if isinstance(arguments, dict) else model(*arguments)
    scalars = [y for y in tree_leaves(outputs) if isinstance(y, Tensor) and y.numel() == 1 and y.requires_grad]
    if not scalars:
        raise ValueError("it returns no loss that depends on a parameter: are there targets or labels?")
    # Not of a single number, whose own error may be next to nothing by chance.
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel() > 1}
    matrices = [name for name, parameter in trained.items() if parameter.dim() > 1]
    skipped = set(matrices) - set(matrices[:: -(-len(matrices) // _MATRICES) or 1])
    names = [name for name in trained if name not in skipped]
    gradients = torch.autograd.grad(scalars[0], [trained[name] for name in names], allow_unused=True)
    found = {name: torch.zeros_like(trained[name]) if g is None else g for name, g in zip(names, gradients)}
    return {"loss": scalars[0].detach(), **found}


def _worst(got: Tensor, own: Tensor, wide: Tensor, narrow: torch.dtype) -> tuple[float, float]:
    """Of the rms and the largest error, the one that is nearer to its limit: (error, limit)."""
    pairs = zip(errors(got, wide), errors(own, wide))
    judged = [(mine, allowed(theirs, got.dtype, narrow if narrow.itemsize < 4 else None)) for mine, theirs in pairs]
    return max(judged, key=_ratio)


def _ratio(figure: tuple[float, float]) -> float:
    error, limit = figure
    return error / limit if error < float("inf") else float("inf")  # NaN is no number to compare with


def _dtypes(model: nn.Module) -> list[torch.dtype]:
    return [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]


@contextmanager
def _training_without_dropout(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    probabilities = [(module, name, vars(module)[name]) for module, name in dropouts(model)]
    model.train()
    for module, name, _ in probabilities:
        vars(module)[name] = 0.0
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, name, p in probabilities:
            vars(module)[name] = p
