"""Reads a checkpoint of any known format into the same portable weights."""

from __future__ import annotations

from pathlib import Path

from fastgpt.checkpoints import folder
from fastgpt.checkpoints.formats import Format, huggingface, nanochat, nanogpt, own
from fastgpt.checkpoints.formats.portable import Portable
from fastgpt.common import UserError
from fastgpt.data.letters import check_letters
from fastgpt.data.shards import shards_in


def read(source: str, optimizer: bool = True) -> tuple[Format, Portable]:
    """What ``source`` is, and its content; without ``optimizer``, a run's optimizer state is not read. A name of no file or
    folder here is looked up on the Hugging Face hub.

    Raises UserError, in one sentence, for what is not a checkpoint of a GPT-2 or does not hold together."""
    kind, portable = _read(source, optimizer)
    if portable.letters is not None:
        check_letters(portable.letters, source)
        if len(portable.letters) > (rows := portable.config.vocab_size):
            raise UserError(
                f"{source} has {len(portable.letters)} letters for a vocabulary of {rows}: they are another model's"
            )
    return kind, portable


def _read(source: str, optimizer: bool) -> tuple[Format, Portable]:
    path = Path(source)
    if (file := nanochat.newest(path)) is not None:
        return "nanochat", nanochat.read(file)
    if path.is_file():
        return "nanogpt", nanogpt.read(path)
    if path.is_dir():
        if (path / "manifest.json").exists() or folder.existing(path):
            return "fastgpt", own.read(path, optimizer)
        if (path / "config.json").exists():
            return "hf", huggingface.read(path)
        if shards := shards_in(path):
            raise UserError(f"{path} holds tokens ({shards[0].name}), no checkpoint: it is what --data takes")
        raise UserError(
            f"{path} is not a checkpoint: a Hugging Face folder has a config.json, a fastgpt run has step-... folders, "
            "nanochat's has model_....pt and meta_....json, and of nanoGPT name the ckpt.pt itself"
        )
    if huggingface.looks_like_hub_name(source):
        return "hf", huggingface.read(huggingface.download(source))
    raise UserError(f"{source} does not exist: name a checkpoint, or a model on the hub such as gpt2")


def load_weights(source: str) -> Portable:
    """The model of any checkpoint that ``convert`` reads: a path, or a name on the Hugging Face hub. Its ``config`` is the
    shape, its ``weights`` the fp32 state_dict of a fastgpt.GPT. Raises UserError, also for weights that are not finite."""
    portable = read(source, optimizer=False)[1]
    if broken := portable.not_finite():
        raise UserError(
            f"{source} has NaN or infinity in {len(broken)} of {len(portable.weights)} weights (first {broken[0]}), so it "
            "computes nothing: take an earlier checkpoint"
        )
    return portable
