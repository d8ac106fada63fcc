"""nanochat's checkpoints: model_000100.pt, a state_dict, beside meta_000100.json, which says the shape.

fastgpt/modern.py computes the same function under the same names, but for queries, keys and values, which are three weights
there, and for rows that pad the vocabulary to a multiple of 64, whose logits it drops. nanochat always has the token before
mixed into each (smear) and the residual stream of the middle taken off at the end (backout); of a model without, they are
written as zeros, where they do nothing. Karpathy 2025, as of July 2026.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import anatomy
from fastgpt.checkpoints.formats.nanogpt import load_file
from fastgpt.checkpoints.formats.portable import Portable, check, in_fp32, model_config, steps
from fastgpt.common import UserError, atomic_folder, read_json, shortened, write_json

_FILE = re.compile(r"model_(\d{1,18})\.pt")
_ALWAYS = dict(
    family="modern",
    rotary_base=100_000.0,
    qk_norm=True,
    activation="relu2",
    tied_head=False,
    embedding_norm=True,
    softcap=15.0,
)
"""What nanochat's model has in any case, as fields of ModelConfig."""
_PADDING = 64
_SMEAR = {"smear_gate.weight": (1, anatomy.SMEAR_COLUMNS), "smear_lambda": (1,)}
_BACKOUT = {"backout_lambda": (1,)}
_TOP = ("resid_lambdas", "x0_lambdas", "value_embeds.", *_SMEAR, *_BACKOUT)
"""What lies outside of ``transformer`` there."""


def newest(path: Path) -> Path | None:
    """The checkpoint ``path`` itself, or the newest in a folder; None where there is none of nanochat's."""
    files = [path] if path.is_file() else path.glob("model_*.pt")
    found = {int(match[1]): file for file in files if (match := _FILE.fullmatch(file.name)) and _meta(file).is_file()}
    return found[max(found)] if found else None


def _meta(file: Path) -> Path:
    return file.with_name(f"meta_{file.stem.removeprefix('model_')}.json")


def read(file: Path) -> Portable:
    """The checkpoint whose weights lie in ``file``. Raises UserError."""
    source, meta, saved = str(file), read_json(_meta(file)) or {}, load_file(file)
    shape = meta.get("model_config")
    if not isinstance(shape, dict) or not isinstance(saved, dict):
        raise UserError(
            f"{file} is not nanochat's: meta_....json beside it has a table model_config, and it is a state_dict"
        )
    found = {str(n).removeprefix("_orig_mod."): w for n, w in saved.items() if isinstance(w, Tensor)}
    if "smear_lambda" not in found:
        raise UserError(
            f"{file} is of a nanochat before March 2026, whose rotary base and factors were others and are not written down"
        )
    fields = {name: shape.get(name) for name in ("n_layer", "n_head", "n_embd", "n_kv_head", "vocab_size")}
    fields |= {"block_size": shape.get("sequence_len"), "window_pattern": str(shape.get("window_pattern", "L")).upper()}
    fields |= dict(bias=False, dropout=0.0, residual_scalars=True, value_embeddings=True, zero_init=True, **_ALWAYS)
    for part, names in (("smear", _SMEAR), ("backout", _BACKOUT)):
        fields[part] = any(bool(found[name].any()) for name in names if name in found)
    config = model_config(source, fields)
    _check_windows(config)
    notes: list[str] = []
    weights = in_fp32(check(source, _ours(found, config), config), notes)
    own = meta.get("fastgpt")
    extras = {"fastgpt": own} if isinstance(own, dict) else {}
    return Portable(config, weights, step=steps(meta.get("step")), extras=extras, notes=notes)


def _ours(found: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Names and shapes of fastgpt's state_dict. What is unknown keeps its name, so that it is refused by it."""
    weights: dict[str, Tensor] = {}
    for name, tensor in found.items():
        if (name in _SMEAR and not config.smear) or (name in _BACKOUT and not config.backout):
            continue
        if name.endswith((".attn.c_k.weight", ".attn.c_v.weight")):
            continue
        if name.endswith(".attn.c_q.weight"):
            parts = [found.get(name.replace("c_q", f"c_{part}")) for part in "qkv"]
            if any(part is None or part.dim() != 2 for part in parts):
                raise UserError(f"{name} has no keys and values beside it: c_k and c_v are missing")
            weights[name.replace("c_q", "c_attn")] = torch.cat([part for part in parts if part is not None])
            continue
        ours = f"transformer.{name}" if name.startswith(_TOP) else name
        weights[ours] = tensor[: config.vocab_size] if _has_row_per_token(name) else tensor
    return weights


def _has_row_per_token(name: str) -> bool:
    """Whether a weight's rows are padded there. Other weights may have as many rows as there are tokens, and are not."""
    return name.endswith(("wte.weight", "lm_head.weight")) or "value_embeds" in name


def _check_windows(config: Any) -> None:
    """nanochat rounds the short window up to a multiple of 128 tokens; fastgpt takes a quarter of the context."""
    T, short = config.block_size, anatomy.window(config, config.window_pattern.find("S"))
    if short and short - 1 != min(T, -(-T // 4 // 128) * 128):
        raise UserError(
            f"the model has windows in a context of {T} tokens: nanochat's short window is a multiple of 128 tokens, so only "
            "contexts that are a multiple of 512 are the same"
        )


def write(folder: Path, portable: Portable) -> None:
    """Write a folder with one checkpoint, whole or not at all. Raises OSError, and UserError for a model that is not
    nanochat's."""
    config, weights = portable.config, portable.weights
    for name, value in _ALWAYS.items():
        if getattr(config, name) != value:
            raise UserError(f"{name} is {getattr(config, name)!r}: nanochat's model has {value!r}")
    _check_windows(config)
    H, H_kv, D, V = config.n_head, config.kv_heads, config.head_size, config.vocab_size
    found: dict[str, Tensor] = {
        "resid_lambdas": torch.ones(config.n_layer),
        "x0_lambdas": torch.zeros(config.n_layer),
        **{name: torch.zeros(shape) for name, shape in (_SMEAR | _BACKOUT).items()},
    }
    for layer in range(config.n_layer):
        if layer % 2 == (config.n_layer - 1) % 2 and not config.value_embeddings:  # nanochat always has them
            found[f"value_embeds.{layer}.weight"] = torch.zeros(V, H_kv * D)
            found[f"transformer.h.{layer}.attn.ve_gate.weight"] = torch.zeros(H_kv, anatomy.GATE_COLUMNS)
    for name, tensor in weights.items():
        if name.endswith(".attn.c_attn.weight"):
            for part, rows in zip("qkv", tensor.split((H * D, H_kv * D, H_kv * D))):
                found[name.replace("c_attn", f"c_{part}")] = rows.clone()
        else:
            inner = name.removeprefix("transformer.")
            found[inner if inner.startswith(_TOP) else name] = tensor
    padding = -V % _PADDING
    found = {name: F.pad(w, (0, 0, 0, padding)) if _has_row_per_token(name) else w for name, w in found.items()}
    if portable.optimizer is not None:
        portable.notes.append("the optimizer's state stays behind: nanochat's is another one's")
    if config.dropout:
        portable.notes.append(f"dropout {shortened(config.dropout)} stays behind: nanochat has none")
    shape = {name: getattr(config, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd", "window_pattern")}
    shape |= {"sequence_len": config.block_size, "n_kv_head": H_kv}
    own = portable.settings("data").get("tokenizer")
    with atomic_folder(folder) as work:
        torch.save(found, work / f"model_{portable.step:06d}.pt")
        meta: dict[str, Any] = {"step": portable.step, "model_config": shape, "user_config": {}}
        if own is not None:  # whose tokens these are; nanochat does not say
            meta["fastgpt"] = {"config": {"data": {"tokenizer": own}}}
        write_json(work / f"meta_{portable.step:06d}.json", meta)
