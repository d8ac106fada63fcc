"""Turn the value of ``--data`` into lists of shards; text is prepared first."""

from __future__ import annotations

import json
import platform
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from fastgpt.common import UserError, cache_dir
from fastgpt.data.corpora import STDLIB, is_hub_name, open_corpus
from fastgpt.data.letters import META, read_letters
from fastgpt.data.manifest import PROGRESS, check_complete, left_out, read_manifest, recipe_of
from fastgpt.data.preparation import prepare
from fastgpt.data.shards import SUFFIXES, open_shard, shards_in
from fastgpt.data.tokenizer import CHARS, SIZES, CharTokenizer, Tokenizer, get_tokenizer

SAMPLE = 1 << 16
"""Tokens of a file without a description that are looked at."""
NO_BYTE = 4096
"""An id from which on it is GPT-2's: far above bytes and what a wrong file may have just past them."""


class ResolvedData(NamedTuple):
    train_paths: list[Path]
    val_paths: list[Path]
    tokenizer: Tokenizer

    @property
    def skipped(self) -> str:
        """What was left out when the data was prepared, in words."""
        return left_out(read_manifest(self.train_paths[0].parent) or {})


class Told(NamedTuple):
    """What a folder of tokens says of itself."""

    tokenizer: str
    vocab_size: int


def told(data: str) -> Told | None:
    """What a folder of tokens says of itself: in its manifest; in nanoGPT's meta.pkl; by a large id, which only GPT-2's
    tokens have here. None for text, and where nothing tells.

    Raises:
        UserError: the folder's manifest, meta.pkl or first file is damaged, or of another kind.
    """
    folder = Path(data).expanduser()
    if data == STDLIB or not (shards := shards_in(folder)):
        return None
    if manifest := read_manifest(folder):
        name = manifest.get("tokenizer")
        return Told(name, SIZES[name]) if name in SIZES else None
    if (folder / META).is_file():
        return Told(CHARS, len(read_letters(folder / META)))
    return Told("gpt2", SIZES["gpt2"]) if open_shard(shards[0])[:SAMPLE].max() >= NO_BYTE else None


def resolve(data: str, tokenizer: str, vocab_size: int, text_column: str = "text") -> ResolvedData:
    """The shards to train on.

    Args:
        data: ``"stdlib"``; a folder with token files that have train and val in their names (what ``prepare`` made, llm.c
            shards, nanoGPT's headerless files or build-nanogpt's .npy, which are read as they are); or any file or folder
            of text that ``open_corpus`` accepts, which one process tokenises into the cache while the others wait.
        tokenizer: ``"gpt2"``, ``"bytes"``, or ``"chars"``, the letters of the folder's meta.pkl; for shards, the one they
            were made with.
        vocab_size: of the model, which must have a row for every id of the tokenizer. (TokenLoader checks that the files
            hold no other ids.)
        text_column: the field of text in a table.

    Raises:
        UserError: the data is missing, empty, damaged, unfinished, or made with another tokenizer.
    """
    path = Path(data).expanduser()
    meta = path / META
    of_letters = tokenizer == CHARS and meta.is_file()
    tok = CharTokenizer(read_letters(meta), str(meta)) if of_letters else get_tokenizer(tokenizer)
    if vocab_size < tok.vocab_size:
        raise UserError(f"vocab_size is {vocab_size}: the {tok.name} tokenizer needs at least {tok.vocab_size}")
    if path.suffix in SUFFIXES:
        raise UserError(
            f"data {data!r} is one token file: name the folder that holds train*{path.suffix} and val*{path.suffix}, so "
            "that there is something to validate on"
        )
    if (path / PROGRESS).exists() or (not path.exists() and (path.with_name(path.name + ".partial")).exists()):
        raise UserError(f"data {data!r} is not finished: give the command that prepares it again to continue")
    train, val = shards_in(path, "train"), shards_in(path, "val")
    if data == STDLIB or not (train or val):
        folder = _prepare_in_cache(data, tok, text_column)
        train, val = shards_in(folder, "train"), shards_in(folder, "val")
    else:
        for split, found in (("train", train), ("val", val)):
            if not found:
                raise UserError(
                    f"data {data!r} holds token files but no *{split}*.bin or .npy: both train and val are needed"
                )
        check_complete(path)
        made_with = (read_manifest(path) or {}).get("tokenizer") or _made_of_letters(meta) or tok.name
        if made_with != tok.name:
            raise UserError(
                f"data {data!r} was made with the {made_with} tokenizer: tokenizer is {tok.name!r}, leave --tokenizer out"
            )
    return ResolvedData(train, val, tok)


def _made_of_letters(meta: Path) -> str | None:
    """CHARS where there is a meta.pkl that can be read."""
    try:
        return CHARS if meta.is_file() and read_letters(meta) else None
    except UserError:  # the tokenizer was given: it counts
        return None


def _prepare_in_cache(data: str, tok: Tokenizer, text_column: str) -> Path:
    if is_hub_name(data):
        name = data.rsplit("/", 1)[-1].removeprefix("hf:")
        raise UserError(
            f"data {data!r} does not exist here; if it is a Hugging Face dataset, first run "
            f"`python -m fastgpt.data prepare {data} --out data/{name}`, then give data/{name}"
        )
    corpus = open_corpus(data, text_column=text_column)
    recipe = recipe_of(corpus, tok)
    label = f"{STDLIB}-py{platform.python_version()}" if data == STDLIB else Path(data).stem or "data"
    key = sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_dir() / f"{label}-{tok.name}-{key}"
    prepare(data, folder, tok, text_column=text_column)
    return folder
