"""nanoGPT's ckpt.pt: {model, optimizer, model_args, iter_num, best_val_loss, config}, plain values and tensors.

Its optimizer's state goes by index: parameters of two and more dimensions first (those that decay), then the rest, each in
the model's order. ``torch.load`` runs with weights_only, so that a pickle naming any code is refused unread.

A model of characters has its letters in data/NAME/meta.pkl, where NAME is the config's dataset.
"""

from __future__ import annotations

import io
import itertools
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt import anatomy
from fastgpt.checkpoints.formats.portable import Portable, check, check_optimizer, in_fp32, model_config, tied
from fastgpt.checkpoints.tree import split
from fastgpt.common import UserError, atomic_file, first_line, kind_of_file, shortened
from fastgpt.config import ModelConfig
from fastgpt.data.letters import META, read_letters

_BUFFERS = (".attn.bias", ".attn.masked_bias")  # the causal mask of attention without SDPA
_ARGS = (*anatomy.SHAPE, "dropout")
_WRAPPED = re.compile(r"^(?:(?:_orig_mod|module)\.)+")  # by torch.compile and DDP, one in the other


def load_file(path: Path) -> Any:
    """A ``.pt`` file's content. Raises UserError for another file, which is named, and for one that needs more than tensors and
    plain values."""
    try:
        kind = kind_of_file(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    zipped = kind is not None and "zip" in kind  # before torch 1.6 it was none
    if kind is not None and not zipped:
        name_it = ": name the folder that it lies in, with its config.json" if "safetensors" in kind else ""
        raise UserError(f"{path} is not a checkpoint of nanoGPT, it is {kind}{name_it}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle's protocols
            if _too_many(_pickles(path, zipped)):
                raise UserError(f"{path} has more than {MOST:,} values: no checkpoint does, so it is refused")
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL |global )([\w.]+)", str(error))
        if not (named or zipped):
            # torch's own words advise weights_only=False, which would run the pickle
            raise UserError(
                f"{path} is not a checkpoint that torch.load reads: torch.save did not write it, so it is refused"
            ) from error
        raise UserError(
            f"{path} holds more than tensors and plain values, and a pickle can run code: it is refused"
            + (f" (loading it would run {named[1]})" if named else "")
        ) from error
    except UserError:
        raise
    except Exception as error:  # torch reports damage as RuntimeError, EOFError, zipfile and OS errors
        raise UserError(f"{path} is not a checkpoint that torch.load reads ({type(error).__name__})") from error
    if (why := _unusual(saved)) is not None:
        raise UserError(f"{path} has {why}: no checkpoint does, so it is refused")
    return saved


DEEPEST, MOST, LARGEST = 100, 10**6, 2**28
"""Tables in one another, values in all of them, bytes of a tensor that its storage may fall short of."""


def _pickles(path: Path, zipped: bool) -> list[bytes]:
    """The parts of a ``.pt`` file that torch.load unpickles; before torch 1.6, pickles at its begin, its tensors after them."""
    if not zipped:
        with open(path, "rb") as file:
            return [file.read(1 << 24)]
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise zipfile.BadZipFile("torch.save compresses nothing: a few bytes may unpack to terabytes")
        return [archive.read(entry) for entry in archive.infolist() if entry.filename.endswith("data.pkl")]


def _too_many(pickles: list[bytes]) -> bool:
    """Whether pickles have more than MOST opcodes, over each of which torch.load takes microseconds."""
    count = 0
    for file in map(io.BytesIO, pickles):
        with suppress(ValueError):  # it ends, or is damaged: torch.load says so, if it comes that far
            while True:
                for _ in itertools.islice(pickletools.genops(file), MOST + 1 - count):
                    count += 1
                if count > MOST:
                    return True
    return False


def _unusual(saved: Any) -> str | None:
    """What torch.load takes and nothing after it can: a file of a few bytes may claim terabytes, or hold itself."""
    todo, count = [(saved, 0)], 0
    while todo:
        found, depth = todo.pop()
        count += 1
        if isinstance(found, Tensor):
            if found.device.type != "cpu" or found.layout is not torch.strided or found.is_quantized:
                return f"a tensor on the device {found.device}, {str(found.dtype)[6:]}, {str(found.layout)[6:]}"
            if found.nbytes > max(found.untyped_storage().nbytes(), LARGEST):
                return f"a tensor {tuple(found.shape)} of {found.untyped_storage().nbytes():,} bytes"
        elif isinstance(found, (Mapping, list, tuple)):
            todo += [(item, depth + 1) for item in (found.values() if isinstance(found, Mapping) else found)]
            if depth > DEEPEST or count + len(todo) > MOST:
                return f"tables that are nested deeper than {DEEPEST}, or more than {MOST:,} values"
    return None


def _causal(mask: Tensor) -> bool:
    square = mask.dim() >= 2 and mask.shape[-1] == mask.shape[-2] and mask.numel() <= 2**28
    return square and mask.equal(torch.ones_like(mask).tril())


def read(path: Path) -> Portable:
    """A checkpoint of nanoGPT. Raises UserError."""
    source, saved = str(path), load_file(path)
    if not isinstance(saved, dict) or not {"model", "model_args"} <= saved.keys():
        raise UserError(f"{path} is not nanoGPT's, which has 'model' and 'model_args': it is {_what(saved)}")
    args, model = saved["model_args"], saved["model"]
    if not isinstance(args, dict) or not isinstance(model, dict):
        raise UserError(f"{path} is not nanoGPT's: 'model' and 'model_args' are dictionaries there")
    weights = {
        _WRAPPED.sub("", str(name)): w
        for name, w in model.items()
        if isinstance(w, Tensor) and not str(name).endswith(_BUFFERS)
    }
    _refuse_forks(source, args, weights)
    for name, mask in model.items():
        if str(name).endswith(".attn.bias") and isinstance(mask, Tensor) and not _causal(mask):
            raise UserError(f"{path} is a fork's, with another attention than GPT-2's: {name} is not a causal mask")
    config = model_config(source, {"dropout": 0.0, "bias": True, **args})
    weights = check(source, tied(source, weights), config)
    notes: list[str] = []
    portable = Portable(config, in_fp32(weights, notes), exact_gelu=True, notes=notes)
    step = saved.get("iter_num", 0)
    step = step.item() if isinstance(step, Tensor) and step.numel() == 1 else step
    if isinstance(step, (int, float)) and 0 <= step < 2**63:
        portable.step = int(step)
    else:
        notes.append(f"its iter_num is {shortened(repr(step))}, no count of steps: 0 is taken instead")
    if saved.get("optimizer"):
        portable.optimizer = _by_name(source, saved["optimizer"], weights)
    rest: dict[str, Any] = {}
    for key in (key for key in saved if key not in ("model", "optimizer")):
        try:
            split(saved[key], str(key))
            rest[key] = saved[key]
        except (TypeError, ValueError) as error:
            notes.append(f"its {shortened(str(key))} stays behind ({first_line(error)})")
    own = rest.pop("fastgpt", None)
    portable.extras["nanogpt"] = rest
    if isinstance(own, dict):
        portable.extras["fastgpt"] = own
        portable.exact_gelu = bool(own.get("exact_gelu", False))
    try:
        portable.letters = _letters(path, saved, config)
    except UserError as error:
        notes.append(str(error))
    return portable


def _what(saved: Any) -> str:
    """What a file of torch's holds, as part of a sentence."""
    if isinstance(saved, Tensor):
        return f"one tensor {tuple(saved.shape)}"
    if not isinstance(saved, Mapping) or not saved:
        return f"a {type(saved).__name__}"
    names = shortened(", ".join(map(str, saved)), 120)
    if all(isinstance(value, Tensor) for value in saved.values()):
        return f"a bare state_dict of {len(saved)} tensors ({names}), which does not say how many heads there are"
    return f"a table of {names}"


def _refuse_forks(source: str, args: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Raise UserError, listing what is unknown, for a model that is not GPT-2: it would compute something else here."""
    unknown = [f"{name} = {shortened(repr(value), 40)}" for name, value in args.items() if name not in _ARGS]
    if unknown:
        shapes = [re.sub(r"\.\d+\.", ".N.", name) for name in anatomy.parameters(ModelConfig(1, bias=True))]
        names = dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in weights)
        unknown += [name for name in names if name not in (*shapes, "lm_head.weight")]
        raise UserError(
            f"{source} is a fork's, with another model than GPT-2: its model_args and weights have "
            f"{shortened(', '.join(unknown), 400)}, which are unknown here"
        )


def _letters(path: Path, saved: Mapping[str, Any], config: ModelConfig) -> list[str] | None:
    """The letters of a model of characters: in the file, where fastgpt wrote it, else in its dataset's meta.pkl, looked for as
    nanoGPT does, and beside the checkpoint. None if there is none, or it is of another vocabulary. Raises UserError for a
    meta.pkl that cannot be read."""
    own = saved.get("fastgpt")
    if isinstance(own, dict) and own.get("letters") is not None:
        return own["letters"]
    settings = saved.get("config")
    dataset = settings.get("dataset") if isinstance(settings, dict) else None
    places = [path.parent]
    if isinstance(dataset, str) and dataset and "\0" not in dataset:
        places += [folder / "data" / dataset for folder in (Path(), path.parent, path.parent.parent)]
    for place in places:
        if (place / META).is_file():
            letters = read_letters(place / META)
            if len(letters) == config.vocab_size:
                return letters
    return None


def write(path: Path, portable: Portable) -> None:
    """Write ckpt.pt, whole or not at all. Raises OSError."""
    weights = portable.weights
    own = portable.extras.get("nanogpt", {})
    best = portable.extras.get("fastgpt", {}).get("best_val_loss")
    saved: dict[str, Any] = {
        "model": {**weights, "lm_head.weight": weights["transformer.wte.weight"]},
        "model_args": {name: value for name, value in asdict(portable.config).items() if name in _ARGS},
        "iter_num": portable.step,
        "best_val_loss": 1e9 if best is None else best,
        "config": {},
        **own,
    }
    if "fastgpt" in portable.extras:
        saved["fastgpt"] = {**portable.extras["fastgpt"], "exact_gelu": portable.exact_gelu}
    if portable.letters is not None:
        saved["fastgpt"] = {**saved.get("fastgpt", {}), "letters": portable.letters, "exact_gelu": portable.exact_gelu}
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
