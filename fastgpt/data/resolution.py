"""Turn the value of ``--data`` into lists of shards; text is prepared first."""

from __future__ import annotations

import json
import platform
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from fastgpt.common import UserError, cache_dir
from fastgpt.data.corpora import STDLIB, is_hub_name, open_corpus
from fastgpt.data.manifest import PROGRESS, check_complete, read_manifest, recipe_of
from fastgpt.data.preparation import prepare
from fastgpt.data.tokenizer import Tokenizer, get_tokenizer


class ResolvedData(NamedTuple):
    train_paths: list[Path]
    val_paths: list[Path]
    tokenizer: Tokenizer


def resolve(data: str, tokenizer: str, vocab_size: int) -> ResolvedData:
    """The shards to train on.

    Args:
        data: ``"stdlib"``; a folder with ``*train*.bin`` and ``*val*.bin`` (what ``prepare`` made, llm.c shards, or
            nanoGPT's headerless files, which are read as they are); or any file or folder of text that ``open_corpus``
            accepts, which one process tokenises into the cache while the other processes of the run wait.
        tokenizer: ``"gpt2"`` or ``"bytes"``; for shards, the one they were made with.
        vocab_size: of the model, which must have a row for every id of the tokenizer. (TokenLoader checks that the files
            hold no other ids.)

    Raises:
        UserError: the data is missing, empty, damaged, unfinished, or made with another tokenizer.
    """
    tok = get_tokenizer(tokenizer)
    if vocab_size < tok.vocab_size:
        raise UserError(f"vocab_size is {vocab_size}: the {tok.name} tokenizer needs at least {tok.vocab_size}")
    path = Path(data).expanduser()
    if path.suffix == ".bin":
        raise UserError(
            f"data {data!r} is one token file: name the folder that holds train*.bin and val*.bin, so that there is "
            "something to validate on"
        )
    if (path / PROGRESS).exists() or (not path.exists() and (path.with_name(path.name + ".partial")).exists()):
        raise UserError(f"data {data!r} is not finished: give the command that prepares it again to continue")
    train, val = _shards_in(path, "train"), _shards_in(path, "val")
    if data == STDLIB or not (train or val):
        folder = _prepare_in_cache(data, tok)
        train, val = _shards_in(folder, "train"), _shards_in(folder, "val")
    else:
        for split, found in (("train", train), ("val", val)):
            if not found:
                raise UserError(f"data {data!r} holds token files but no *{split}*.bin: both train and val are needed")
        check_complete(path)
        made_with = (read_manifest(path) or {}).get("tokenizer", tok.name)
        if made_with != tok.name:
            raise UserError(f"data {data!r} was made with the {made_with} tokenizer: tokenizer is {tok.name!r}")
    return ResolvedData(train, val, tok)


def _prepare_in_cache(data: str, tok: Tokenizer) -> Path:
    if is_hub_name(data):
        name = data.rsplit("/", 1)[-1].removeprefix("hf:")
        raise UserError(
            f"data {data!r} does not exist here; if it is a Hugging Face dataset, first run "
            f"`python -m fastgpt.data prepare {data} --out data/{name}`, then give data/{name}"
        )
    corpus = open_corpus(data)
    recipe = recipe_of(corpus, tok)
    label = f"{STDLIB}-py{platform.python_version()}" if data == STDLIB else Path(data).stem or "data"
    key = sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_dir() / f"{label}-{tok.name}-{key}"
    prepare(data, folder, tok)
    return folder


def _shards_in(folder: Path, side: str) -> list[Path]:
    return sorted(folder.glob(f"*{side}*.bin")) if folder.is_dir() else []
