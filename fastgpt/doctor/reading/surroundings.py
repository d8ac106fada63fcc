"""What lies around a run: the machine it is to start on, and how large its data is (shards hold two bytes per token)."""

from __future__ import annotations

import pickletools
import shutil
import sys
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from fastgpt.common import number, read_json
from fastgpt.doctor.evidence import Evidence, Machine, Note, Place


def this_machine() -> Machine:
    """This machine. Imports torch; makes no CUDA context."""
    import torch

    driver = shutil.which("nvidia-smi") is not None
    return Machine(sys.platform, torch.__version__, torch.cuda.is_available(), find_spec("triton") is not None, driver)


def _folders(evidence: Evidence) -> list[Path]:
    """Where the config's dataset may be: the folder of that name, or nanoGPT's data/NAME here or beside the config."""
    config = evidence.config
    dataset = config.settings.get("dataset") if config else None
    if dataset is None or not isinstance(dataset.value, str) or not dataset.value:
        return []
    name, beside = Path(dataset.value), Path(dataset.place.file).parent
    return [name, Path("data") / name, beside / "data" / name, beside.parent / "data" / name]


def corpus_tokens(evidence: Evidence) -> int | None:
    """Tokens of the config's dataset: from its .bin shards, else what the log says. None if neither is there."""
    found = next((found for folder in _folders(evidence) if (found := tokens_in(folder))), None)
    return found or evidence.said("corpus_tokens")


def environment(log: Path) -> list[Note]:
    """What environment.json beside a run's metrics.jsonl says, as the notes that the run's first lines would give."""
    path = log.with_name("environment.json")
    said = read_json(path) if log.name == "metrics.jsonl" else None
    if said is None or not isinstance(said.get("device"), str):
        return []
    tokens = number(str(said.get("corpus_tokens")), whole=True)
    found = {"device": said["device"], "cpu": "arch" not in said, "corpus_tokens": tokens}
    return [Note(kind, Place(str(path)), f"{kind}: {value}", value) for kind, value in found.items() if value]


def vocabulary(evidence: Evidence) -> int | None:
    """The vocabulary that the meta.pkl of the config's dataset says. Its pickle is looked through, never run."""
    for folder in _folders(evidence):
        try:
            with open(folder / "meta.pkl", "rb") as file:
                data = file.read(1 << 21)
            named = False
            for code, value, _ in islice(pickletools.genops(data), 1 << 19):
                if "PUT" in code.name or code.name == "MEMOIZE":  # between the key and its value
                    continue
                if named and isinstance(value, int) and 2 <= value <= 1 << 24:
                    return value
                named = value == "vocab_size"
        except (OSError, ValueError):
            continue
    return None


def tokens_in(folder: Path) -> int | None:
    """Tokens in the train shards of a folder: names without "val". None if it has no shards."""
    try:
        sizes = [path.stat().st_size for path in folder.glob("*.bin") if "val" not in path.name and path.is_file()]
    except (OSError, ValueError):
        return None
    return sum(sizes) // 2 or None
