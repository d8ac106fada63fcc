"""The description of a folder of prepared tokens: manifest.json in a finished folder, progress.json in an unfinished one.

A manifest holds the recipe (everything that determines the shards) and the result: counts, the rule of the split, and the
sha256 of each shard.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fastgpt.common import UserError, file_sha256, load_json
from fastgpt.data.corpora import Corpus
from fastgpt.data.shards import open_shard
from fastgpt.data.tokenizer import Tokenizer

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
FORMAT = 2
VAL_FRACTION = 0.05
SHARD_TOKENS = 100_000_000
_OF_A_SHARD = {"file": str, "tokens": int, "sha256": str}


def recipe_of(
    corpus: Corpus,
    tok: Tokenizer,
    val_fraction: float = VAL_FRACTION,
    seed: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Everything that determines the shards."""
    return {
        "format": FORMAT,
        **corpus.recipe(),
        "tokenizer": tok.name,
        "val_fraction": val_fraction,
        "seed": seed,
        "shard_tokens": shard_tokens,
        "max_tokens": max_tokens,
    }


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a prepared folder; None if it has none, or one of another program. Raises UserError for one that is
    damaged or of a newer version."""
    path = folder / MANIFEST
    manifest = load_json(path, "manifest") if path.exists() else None
    if not isinstance(manifest, dict) or "shards" not in manifest:
        return None
    version, shards = manifest.get("format"), manifest["shards"]
    if type(version) is int and version > FORMAT:
        raise UserError(f"manifest {path} has format {version} and this version reads up to {FORMAT}: update fastgpt")
    if not isinstance(shards, list) or not all(isinstance(s, dict) and _is_shard(s) for s in shards):
        raise UserError(f"manifest {path} is damaged: its shards are not a list of files with tokens and sha256")
    return manifest


def _is_shard(said: dict[str, Any]) -> bool:
    return (
        all(type(said.get(key)) is kind for key, kind in _OF_A_SHARD.items())
        and Path(said["file"]).name == said["file"]
    )


def check_complete(folder: Path) -> None:
    """Raise UserError if a shard is missing that the folder's manifest names."""
    said = [shard["file"] for shard in (read_manifest(folder) or {"shards": []})["shards"]]
    if missing := [name for name in said if not (folder / name).is_file()]:
        raise UserError(
            f"folder {str(folder)!r} lacks {', '.join(missing[:5])}, which its manifest names: copy or prepare it again"
        )


def fingerprint(paths: list[Path]) -> str:
    """Which token files these are, in a few words: how many, their size, and a hash of names, sizes and manifests."""
    sizes = [path.stat().st_size for path in paths]
    manifests = [folder / MANIFEST for folder in sorted({path.parent for path in paths})]
    facts = [[path.name for path in paths], sizes, [file_sha256(path) for path in manifests if path.is_file()]]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    return f"{len(paths)} files of {sum(sizes):,} bytes, sha256 {digest}"


def left_out(manifest: dict[str, Any]) -> str:
    """What a preparation left out or replaced, in words."""
    files = manifest.get("skipped_files") or []
    rows, places = manifest.get("skipped_rows"), manifest.get("replaced")
    said = []
    if files:
        names = ", ".join(map(str, files[:3])) + (", ..." if len(files) > 3 else "")
        said.append(f"{len(files)} files that are not UTF-8 ({names})")
    if rows:
        said.append(f"{rows:,} rows without text")
    if places:
        said.append(f"{places:,} places that are not UTF-8")
    return " and ".join(said)


def differences(then: dict[str, Any], now: dict[str, Any]) -> str:
    """``key A then, B now; ...``"""
    changed = [key for key in {**then, **now} if then.get(key) != now.get(key) and key != "source_digest"]
    said = "; ".join(f"{key} {then.get(key)!r} then, {now.get(key)!r} now" for key in changed)
    return said or "the files of the source have changed since"


def whole(folder: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest, if the folder holds what the recipe would make; None if it does not exist or is empty.

    Raises UserError for anything else: nothing is ever overwritten, and a damaged shard is not made again in silence.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    manifest = read_manifest(folder)
    if manifest is None:
        if (folder / PROGRESS).exists() or folder.name.endswith(".partial"):
            return None  # the preparation decides whether it can continue there
        raise UserError(f"{str(folder)!r} already holds something else: name another folder, or move it away")
    then = {key: manifest.get(key) for key in recipe}
    if then != recipe:
        raise UserError(
            f"{str(folder)!r} already holds something else ({differences(then, recipe)}): name another folder, or delete it"
        )
    for shard in manifest["shards"]:
        path, said = folder / shard["file"], shard["tokens"]
        try:
            if (found := len(open_shard(path))) != said:
                raise UserError(f"data file {str(path)!r} holds {found} tokens and its manifest says {said}")
        except UserError as error:
            raise UserError(f"{error}; delete {str(folder)!r} to prepare it again") from error
    return manifest
