"""fastgpt's own checkpoints (checkpoints/checkpoint.py), as one of the formats."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from fastgpt.checkpoints import checkpoint, folder, saver
from fastgpt.checkpoints.formats.portable import Portable, check, check_optimizer, loss, model_config
from fastgpt.common import UserError, atomic_folder
from fastgpt.config import Config, DataConfig


def read(path: Path, optimizer: bool = True) -> Portable:
    """The checkpoint ``path``, or the newest of a run's folder; its optimizer's state is read only with ``optimizer``. Raises
    UserError."""
    where = folder.resolve(path)
    # A folder's newest has been verified when it was chosen.
    saved = checkpoint.load(where, without=() if optimizer else ("optimizer",), verify=not folder.is_run_folder(path))
    source = str(where)
    try:
        shape, model = saved["config"]["model"], saved["model"]
        weights = {name: tensor for name, tensor in model.items() if isinstance(tensor, Tensor)}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where} holds no model: it is not a checkpoint of a training run") from error
    config = model_config(source, shape)
    weights = check(source, weights, config)
    elsewhere = ("model", "optimizer", "step", "world_size", "nanogpt", "letters", "exact_gelu")
    own = {key: value for key, value in saved.items() if key not in elsewhere}
    portable = Portable(config, weights, step=saved["step"], letters=saved.get("letters"), extras={"fastgpt": own})
    portable.exact_gelu = bool(saved.get("exact_gelu", False))
    if isinstance(saved.get("nanogpt"), dict):
        portable.extras["nanogpt"] = saved["nanogpt"]
    if isinstance(saved.get("optimizer"), dict):
        check_optimizer(source, saved["optimizer"], weights)
        portable.optimizer = saved["optimizer"]
    return portable


def write(folder: Path, portable: Portable) -> None:
    """Write a run's folder with one checkpoint in it, whole or not at all. Raises OSError."""
    with atomic_folder(folder) as work:
        saver.save(work, portable.step, _state(portable))


def _state(portable: Portable) -> dict[str, Any]:
    own = dict(portable.extras.get("fastgpt", {}))
    plain = replace(Config(), data=DataConfig(tokenizer=cast(Any, portable.tokenizer)))
    config = own["config"] if isinstance(own.get("config"), dict) else plain.to_dict()
    best = loss(portable.extras.get("nanogpt", {}).get("best_val_loss"))
    state = {
        "best_val_loss": math.inf if best is None else best,
        **own,
        "config": {**config, "model": vars(portable.config)},
        **({"letters": portable.letters} if portable.letters is not None else {}),
        "model": portable.weights,
        "optimizer": portable.optimizer or {"state": {}, "param_groups": []},
    }
    if "nanogpt" in portable.extras:
        state["nanogpt"] = portable.extras["nanogpt"]
    if portable.exact_gelu or "nanogpt" in portable.extras:
        state["exact_gelu"] = portable.exact_gelu
    return state
