"""Checkpoints: all that a run needs to go on as if it had never stopped, whole or absent.

    state = {"config": ..., **state_of(model, optimizer), "loader": ..., "rng": rng_state(), ...}
    saver.save(folder, step, state)                 at once; saver.AsyncSaver does it in the background
    path, damaged = folder.newest_valid(out)        the newest that verifies, and a sentence for each that does not
    saved = load(path, without=("model", "optimizer"), verify=False)
    load_into(path, model, optimizer)               into whatever sharding they have now

``state`` is any nesting of tensors (DTensors too) and plain values. Rank 0's plain values count; of a sharded tensor every rank
gives its part; ``state["rng"]`` is kept for each rank. A checkpoint loads on any number of ranks.
Keys that this package reads: config, model, optimizer, rng, best_val_loss.

The format and what makes it safe: write.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastgpt.checkpoints.folder import previous_good
from fastgpt.checkpoints.read import Damaged, Source, open_directory
from fastgpt.checkpoints.tree import join, references
from fastgpt.checkpoints.write import own_rank
from fastgpt.common import UserError, shortened
from fastgpt.config import MODERN, DataConfig, ModelConfig, differences, typed_fields


def load(
    path: Path,
    only: Collection[str] | None = None,
    *,
    without: Collection[str] = (),
    verify: bool = True,
) -> dict[str, Any]:
    """The state saved at ``path``, tensors whole and on the CPU, plus "step" and "world_size" (how many ranks saved it).

    ``only`` and ``without`` pick among the state's keys; what is not wanted is not read. "rng" is this rank's own, and
    absent if fewer ranks saved. ``verify=False`` trusts a path that ``newest_valid`` has just returned.

    Raises UserError for a checkpoint that is damaged or not ours, and then names the newest earlier one beside it that is
    whole."""
    with _naming_damage(path):
        source = open_directory(path, verify)
        own = source.ranks[own_rank()] if own_rank() < len(source.ranks) else {}
        tree = {key: item for key, item in {**source.state, **own}.items() if key not in without}
        if only is not None:
            tree = {key: item for key, item in tree.items() if key in only}
        saved = source.reader.tensors
        targets = {n: torch.empty(saved[n].size, dtype=saved[n].properties.dtype) for n in set(references(tree))}
        source.reader.into(targets)
        found = join(tree, targets)
        _check(found)
        return {**found, "step": source.step, "world_size": len(source.ranks)}


def _check(state: dict[str, Any]) -> None:
    """Raise Damaged for a value that nobody who reads it could use: a checksum says who wrote it no more than a file's name
    does. A field of the model that this version does not have is refused, since it may change what the model computes."""
    config, best = state.get("config", {}), state.get("best_val_loss", 0.0)
    if not isinstance(config, dict) or not all(isinstance(section, dict) for section in config.values()):
        raise Damaged("its config is not a table of sections")
    try:
        shape = typed_fields(
            ModelConfig, config.get("model", {}), "its [model], which a newer version may have written,"
        )
        replace(ModelConfig(), **shape)
        typed_fields(DataConfig, {k: v for k, v in config.get("data", {}).items() if k == "tokenizer"}, "its [data]")
    except UserError as error:
        raise Damaged(str(error)) from error
    if not isinstance(best, (int, float)) or best != best:
        raise Damaged(f"its best_val_loss is {shortened(best)}")


def check_shape(saved: dict[str, Any], config: ModelConfig, path: Path) -> None:
    """Raise UserError listing every field of the model's shape that differs from the checkpoint's (old -> new).

    Dropout is not shape: changing it between runs is fine."""
    shape = {f.name: f.default for f in fields(ModelConfig) if f.name != "dropout"}
    model = saved.get("model", {})
    # What a checkpoint does not say is as it was before there was a field for it.
    old = {k: model.get(k, default if k in MODERN or k == "family" else None) for k, default in shape.items()}
    changed = differences(old, {k: getattr(config, k) for k in shape})
    if changed:
        raise UserError(
            f"checkpoint {path} holds a model of another shape ({'; '.join(changed)}): "
            "use the checkpoint's values, or start a new run in another --out"
        )


def state_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The "model" and "optimizer" parts of a state. ``model`` is bare (no DDP, no torch.compile around it), sharded by
    fully_shard or not. Optimizer state goes by parameter name, so that it does not depend on the order of groups."""
    names = _names(model, optimizer)
    groups = [
        {**{k: v for k, v in group.items() if k != "params"}, "params": [names[p] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    states = {names[parameter]: dict(state) for parameter, state in optimizer.state.items() if state}
    return {"model": model.state_dict(), "optimizer": {"state": states, "param_groups": groups}}


@torch.no_grad()
def load_into(path: Path, model: nn.Module, optimizer: Optimizer | None = None, *, verify: bool = False) -> None:
    """Put the saved weights into ``model`` in place, and the optimizer's state into ``optimizer``, both as in ``state_of``.
    Sharded parameters (DTensor) get their own part, and no more is read. Bit exact.

    Hyperparameters of the optimizer (param_groups) stay as they are: the configuration's, not the checkpoint's.

    Raises UserError naming what does not fit: nothing has been changed then."""
    names = _names(model, optimizer) if optimizer is not None else {}
    with _naming_damage(path):
        source = open_directory(path, verify)
        weights = _weights(source, model)
        states, moments = _optimizer_state(source, optimizer, names) if optimizer is not None else ({}, {})
        targets: dict[str, Tensor] = {}
        twins = []
        for reference, tensor in chain(weights, moments.items()):
            if targets.setdefault(reference, tensor) is not tensor:
                twins.append((reference, tensor))
        source.reader.into(targets)
    for reference, tensor in twins:  # tied in the checkpoint: one tensor there, maybe two here
        tensor.copy_(targets[reference])
    if optimizer is not None:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": join(states, targets), "param_groups": groups})


def _weights(source: Source, model: nn.Module) -> list[tuple[str, Tensor]]:
    """(name in the checkpoint, tensor to fill) of all that the model's state_dict holds."""
    saved = {name: next(references(entry), "") for name, entry in source.state["model"].items()}
    if "" in saved.values():
        raise Damaged("its model holds more than tensors")
    wanted = model.state_dict()
    wrong = [f"{name} is missing" for name in wanted if name not in saved]
    wrong += [f"{name} is not in the model" for name in saved if name not in wanted]
    for name in wanted.keys() & saved.keys():
        there, here = source.reader.tensors[saved[name]], wanted[name]
        if (old := _described(there.size, there.properties.dtype)) != (new := _described(here.shape, here.dtype)):
            wrong.append(f"{name}: {old} -> {new}")
    if wrong:
        raise UserError(
            f"the checkpoint's weights do not fit the model ({'; '.join(sorted(wrong))}): give the model its shape"
        )
    return [(saved[name], tensor) for name, tensor in wanted.items()]


def _names(model: nn.Module, optimizer: Optimizer) -> dict[Tensor, str]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    if any(parameter not in names for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError("the optimizer holds parameters that are not the model's: make it after fully_shard(model)")
    return names


def _optimizer_state(
    source: Source, optimizer: Optimizer, names: dict[Tensor, str]
) -> tuple[dict[int, Any], dict[str, Tensor]]:
    """(the optimizer's state as a tree by parameter index, tensors to fill by name in the checkpoint)."""
    parameters = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
    by_name = source.state["optimizer"]["state"]
    states: dict[int, Any] = {}
    targets: dict[str, Tensor] = {}
    for index, parameter in enumerate(parameters):
        if (state := by_name.get(names[parameter])) is None:
            continue
        states[index] = state
        for reference in references(state):
            meta = source.reader.tensors[reference]
            by_row = parameter.dim() == 2 and meta.size == (len(parameter), 1)  # one value per row: NorMuon's
            if meta.size and meta.size != parameter.shape and not by_row:
                raise UserError(
                    f"optimizer state {reference} is {tuple(meta.size)} for {names[parameter]} of {tuple(parameter.shape)}: "
                    "give the model the checkpoint's shape"
                )
            like = (
                parameter[:, :1] if by_row else parameter if meta.size else torch.empty(())
            )  # sharded as its parameter is
            targets[reference] = torch.empty_like(like, dtype=meta.properties.dtype)
    return states, targets


def _described(size: torch.Size, dtype: torch.dtype) -> str:
    return f"{tuple(size)} {str(dtype)[6:]}"


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """Turn what a damaged or foreign checkpoint makes of reading it into one sentence that names an earlier good one."""
    try:
        yield
    except (Damaged, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"checkpoint {path} is damaged or not a fastgpt checkpoint ({error}){previous_good(path)}"
        ) from error
