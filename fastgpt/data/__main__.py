"""``python -m fastgpt.data prepare SOURCE --out DIR``: text into token shards to train on; ``check DIR`` reads them."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.table import Table

from fastgpt import command, common
from fastgpt.command import Arg
from fastgpt.common import UserError, at_least, duration
from fastgpt.data.manifest import SHARD_TOKENS, VAL_FRACTION, check_complete, left_out, read_manifest
from fastgpt.data.preparation import prepare
from fastgpt.data.resolution import told
from fastgpt.data.shards import open_shard, shards_in
from fastgpt.data.tokenizer import SIZES, get_tokenizer
from fastgpt.data.verification import verify_files


@dataclass(frozen=True)
class Prepare:
    """Turn text into token shards (llm.c's format) and a manifest.

    After an interruption at any point, the same command continues, and the shards are the same, byte for byte. Equal
    documents are on the same side of the split, so nothing in validation was trained on.

    Examples:
      python -m fastgpt.data prepare stdlib --out data/stdlib
      python -m fastgpt.data prepare ~/texts --out data/mine --text-column body
      python -m fastgpt.data prepare roneneldan/TinyStories --out data/stories
      python -m fastgpt.data prepare HuggingFaceFW/fineweb --out data/fineweb \\
          --config-name sample-10BT --val-fraction 0.005
    """

    source: Annotated[str, Arg("SOURCE", positional=True)]
    """A text, .jsonl(.gz, .zst) or .parquet file, or a folder of them; a .json, .csv or .tsv file; stdlib; or a Hugging Face
    dataset (hf:NAME)."""
    out: Annotated[Path, Arg("FOLDER")]
    """The folder to make. It appears when it is complete; until then the work is in FOLDER.partial."""
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"
    """GPT-2's BPE, or raw bytes (vocabulary 256)."""
    config_name: str | None = None
    """The configuration of a Hugging Face dataset, such as sample-10BT."""
    split: str = "train"
    """The split of a Hugging Face dataset to read; train and val of the result are both made from it."""
    text_column: str = "text"
    """The column of a table, or the field of a JSON line, that holds the text."""
    val_fraction: float = VAL_FRACTION
    """The share of documents kept for validation."""
    seed: int = 0
    """Decides which documents are kept for validation."""
    shard_tokens: int = SHARD_TOKENS
    """Tokens per shard; two bytes each."""
    max_tokens: int | None = None
    """Stop after the document that reaches this many tokens."""
    workers: int | None = None
    """Cores to use (default: all). The result does not depend on it."""


@dataclass(frozen=True)
class Check:
    """Read every token of a folder of shards: sha256 against its manifest, ids against the vocabulary.

    Examples:
      python -m fastgpt.data check data/fineweb
    """

    folder: Annotated[Path, Arg("FOLDER", positional=True)]
    """A folder made by prepare, llm.c's shards, nanoGPT's train.bin and val.bin, or build-nanogpt's .npy files."""
    vocab_size: int | None = None
    """Every id must be below it (default: the manifest's, that of nanoGPT's letters, or GPT-2's 50257)."""

    def __post_init__(self) -> None:
        at_least(1, vocab_size=self.vocab_size)


def main(args: list[str]) -> int:
    known = {"prepare": "text into token shards to train on", "check": "read every token of a folder of shards"}
    name, rest = command.subcommand(args, known, f"{command.program('fastgpt.data')} COMMAND ...")
    if name == "check":
        return _check(command.parse(Check, rest, "fastgpt.data check"))
    return _prepare(command.parse(Prepare, rest, "fastgpt.data prepare"))


def _prepare(options: Prepare) -> int:
    begin = time.monotonic()
    try:
        manifest = prepare(**{**vars(options), "tokenizer": get_tokenizer(options.tokenizer)})
    except KeyboardInterrupt:
        print("stopped: give the same command again to continue", file=sys.stderr)
        return 130
    taken = duration(time.monotonic() - begin)
    common.say(f"{options.out} is ready ({taken}); train on it with --data {options.out}")
    common.console(soft_wrap=True, highlight=False).print(_table(manifest))
    if said := left_out(manifest):
        common.say(f"left out or replaced: {said}")
    return 0


def _check(options: Check) -> int:
    files = shards_in(options.folder)
    if not files:
        raise UserError(f"folder {str(options.folder)!r} holds no .bin or .npy files: name one that holds token shards")
    manifest = read_manifest(options.folder) or {"shards": []}
    said = told(str(options.folder))
    vocab_size = options.vocab_size or (said.vocab_size if said else SIZES["gpt2"])
    check_complete(options.folder)
    verify_files(files, vocab_size)
    against = "the manifest's sha256" if manifest["shards"] else "no manifest here: sha256 not compared"
    print(f"{len(files)} files are whole ({against}), every id is below {vocab_size}")
    tokens = sum(len(open_shard(path)) for path in files)
    print(f"{tokens:,} tokens{f' of the {said.tokenizer} tokenizer' if said else ''}")
    return 0


def _table(manifest: dict[str, Any]) -> Table:
    table = Table("", "documents", "tokens", "shards", title=f"{manifest['source']}, tokenizer {manifest['tokenizer']}")
    for column in table.columns[1:]:
        column.justify = "right"
    for side in ("train", "val"):
        shards = sum(s["file"].startswith(side) for s in manifest["shards"])
        table.add_row(side, f"{manifest['documents'][side]:,}", f"{manifest['tokens'][side]:,}", str(shards))
    return table


if __name__ == "__main__":
    common.run(main)
