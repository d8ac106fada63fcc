"""nanoGPT's ckpt.pt: {model, optimizer, model_args, iter_num, best_val_loss, config}, plain values and tensors.

Its optimizer's state goes by index: parameters of two and more dimensions first (those that decay), then the rest, each in
the model's order. ``torch.load`` runs with weights_only, so that a pickle naming any code is refused unread.
"""

from __future__ import annotations

import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.checkpoints.formats.portable import Portable, check, check_optimizer, in_fp32, model_config, tied
from fastgpt.common import UserError, atomic_file

_BUFFERS = (".attn.bias", ".attn.masked_bias")  # the causal mask of attention without SDPA
_COMPILED = "_orig_mod."


def load_file(path: Path) -> Any:
    """A ``.pt`` file's content. Raises UserError for another file, and for one that needs more than tensors and plain
    values."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        what = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), "")
        raise UserError(
            f"{path} holds more than tensors and plain values, and a pickle can run code: it is refused"
            + (f" ({what[:120]})" if what else "")
        ) from error
    except Exception as error:  # torch reports damage as RuntimeError, EOFError, zipfile and OS errors
        raise UserError(f"{path} is not a checkpoint that torch.load reads ({type(error).__name__})") from error


def read(path: Path) -> Portable:
    """A checkpoint of nanoGPT. Raises UserError."""
    source, saved = str(path), load_file(path)
    if not isinstance(saved, dict) or not {"model", "model_args"} <= saved.keys():
        raise UserError(f"{path} is not nanoGPT's: a checkpoint of nanoGPT has 'model' and 'model_args'")
    args, model = saved["model_args"], saved["model"]
    if not isinstance(args, dict) or not isinstance(model, dict):
        raise UserError(f"{path} is not nanoGPT's: 'model' and 'model_args' are dictionaries there")
    config = model_config(source, {"dropout": 0.0, "bias": True, **args})
    weights = {
        name.removeprefix(_COMPILED): w
        for name, w in model.items()
        if isinstance(w, Tensor) and not name.endswith(_BUFFERS)
    }
    weights = check(source, tied(source, weights), config)
    notes: list[str] = []
    portable = Portable(config, in_fp32(weights, notes), exact_gelu=True, notes=notes)
    step = saved.get("iter_num", 0)
    portable.step = step if isinstance(step, int) and step >= 0 else 0
    if saved.get("optimizer"):
        portable.optimizer = _by_name(source, saved["optimizer"], weights)
    portable.extras["nanogpt"] = {key: saved[key] for key in saved if key not in ("model", "optimizer", "fastgpt")}
    if isinstance(saved.get("fastgpt"), dict):
        portable.extras["fastgpt"] = saved["fastgpt"]
        portable.exact_gelu = bool(saved["fastgpt"].get("exact_gelu", False))
    return portable


def write(path: Path, portable: Portable) -> None:
    """Write ckpt.pt, whole or not at all. Raises OSError."""
    weights = portable.weights
    own = portable.extras.get("nanogpt", {})
    best = portable.extras.get("fastgpt", {}).get("best_val_loss")
    saved: dict[str, Any] = {
        "model": {**weights, "lm_head.weight": weights["transformer.wte.weight"]},
        "model_args": asdict(portable.config),
        "iter_num": portable.step,
        "best_val_loss": 1e9 if best is None else best,
        "config": {},
        **own,
    }
    if "fastgpt" in portable.extras:
        saved["fastgpt"] = {**portable.extras["fastgpt"], "exact_gelu": portable.exact_gelu}
    if portable.optimizer is not None:
        by_index = _by_index(portable.optimizer, weights)
        if by_index is None:
            portable.notes.append("the optimizer's groups are not nanoGPT's, so its state stays behind")
        else:
            saved["optimizer"] = by_index
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        torch.save(saved, file)


def _order(weights: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Names in the order of nanoGPT's two groups."""
    return [n for n in weights if weights[n].dim() >= 2], [n for n in weights if weights[n].dim() < 2]


def _by_name(source: str, optimizer: Any, weights: dict[str, Tensor]) -> dict[str, Any]:
    names = [name for group in _order(weights) for name in group]
    try:
        groups, state = optimizer["param_groups"], optimizer["state"]
        indices = [index for group in groups for index in group["params"]]
        name_of = dict(zip(indices, names))
        named = {
            "state": {name_of[index]: dict(values) for index, values in state.items()},
            "param_groups": [{**group, "params": [name_of[index] for index in group["params"]]} for group in groups],
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{source} has an optimizer state that is not torch.optim.AdamW's") from error
    if len(indices) != len(names):
        raise UserError(f"{source} has an optimizer over {len(indices)} tensors for a model of {len(names)}")
    check_optimizer(source, named, weights)
    return named


def _by_index(optimizer: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Any] | None:
    """nanoGPT's form, or None if the groups are not its two."""
    wanted = _order(weights)
    groups = optimizer["param_groups"]
    if [set(group["params"]) for group in groups] != [set(names) for names in wanted]:
        return None
    index_of = {name: i for i, name in enumerate(name for names in wanted for name in names)}
    return {
        "state": {index_of[name]: state for name, state in optimizer["state"].items()},
        "param_groups": [
            {**group, "params": [index_of[name] for name in names]} for group, names in zip(groups, wanted)
        ],
    }
