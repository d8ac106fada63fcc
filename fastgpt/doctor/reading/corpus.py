"""How many tokens the training data has, from the sizes of its files: shards hold two bytes per token."""

from __future__ import annotations

from pathlib import Path

from fastgpt.doctor.evidence import Evidence


def tokens(evidence: Evidence) -> int | None:
    """Tokens of the config's dataset: a folder of .bin shards, or nanoGPT's data/NAME beside the working directory or the
    config. None if no such folder is found."""
    config = evidence.config
    dataset = config.settings.get("dataset") if config else None
    if dataset is None or not isinstance(dataset.value, str) or not dataset.value:
        return None
    name, beside = Path(dataset.value), Path(dataset.place.file).parent
    for folder in (name, Path("data") / name, beside / "data" / name, beside.parent / "data" / name):
        if found := in_folder(folder):
            return found
    return None


def in_folder(folder: Path) -> int | None:
    """Tokens in the train shards of a folder: names without "val". None if it has no shards."""
    try:
        sizes = [path.stat().st_size for path in folder.glob("*.bin") if "val" not in path.name and path.is_file()]
    except (OSError, ValueError):
        return None
    return sum(sizes) // 2 or None
