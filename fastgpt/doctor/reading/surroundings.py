"""What lies around a run: the machine it is to start on, and how large its data is (shards hold two bytes per token)."""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from fastgpt.doctor.evidence import Evidence, Machine


def this_machine() -> Machine:
    """This machine. Imports torch; makes no CUDA context."""
    import torch

    driver = shutil.which("nvidia-smi") is not None
    return Machine(sys.platform, torch.__version__, torch.cuda.is_available(), find_spec("triton") is not None, driver)


def corpus_tokens(evidence: Evidence) -> int | None:
    """Tokens of the config's dataset: a folder of .bin shards, or nanoGPT's data/NAME beside the working directory or the
    config. None if no such folder is found."""
    config = evidence.config
    dataset = config.settings.get("dataset") if config else None
    if dataset is None or not isinstance(dataset.value, str) or not dataset.value:
        return None
    name, beside = Path(dataset.value), Path(dataset.place.file).parent
    for folder in (name, Path("data") / name, beside / "data" / name, beside.parent / "data" / name):
        if found := tokens_in(folder):
            return found
    return None


def tokens_in(folder: Path) -> int | None:
    """Tokens in the train shards of a folder: names without "val". None if it has no shards."""
    try:
        sizes = [path.stat().st_size for path in folder.glob("*.bin") if "val" not in path.name and path.is_file()]
    except (OSError, ValueError):
        return None
    return sum(sizes) // 2 or None
