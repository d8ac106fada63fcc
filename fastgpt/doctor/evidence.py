"""What the doctor knows about a run: plain values, each with the file and line it comes from. Nothing is read here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Place:
    """Where something was seen. ``line`` counts from 1; None for a file as a whole (a checkpoint)."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


Seen = list[tuple[Place, str]]
"""What was seen, and where."""


@dataclass(frozen=True)
class Setting:
    """One value of a config. ``text`` is its line as written, ``comment`` what follows the # on it."""

    value: Any
    place: Place
    text: str = ""
    comment: str = ""


@dataclass(frozen=True)
class Unread:
    """Something that could not be read, and why, in one sentence."""

    place: Place
    text: str
    why: str


@dataclass
class ConfigFacts:
    """A run's settings under nanoGPT's names (learning_rate, batch_size, gradient_accumulation_steps, ...), whatever
    they were read from; later settings win, as in nanoGPT: file, then overrides."""

    kind: Literal["nanogpt", "fastgpt"]
    settings: dict[str, Setting] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What the program takes for a name that is not set."""
    comments: list[Setting] = field(default_factory=list)
    """Every other comment line, its text in ``comment``: claims ("~125M parameters") are made in prose."""
    unread: list[Unread] = field(default_factory=list)

    def get(self, name: str, default: Any = None) -> Any:
        """The value set, else the program's default, else ``default``."""
        found = self.settings.get(name)
        return found.value if found else self.defaults.get(name, default)

    def is_set(self, name: str) -> bool:
        return name in self.settings

    def forget(self, names: Iterable[str]) -> None:
        """Drop names whose line could not be read: neither an earlier value nor the default holds for them."""
        gone = set(names)
        self.settings = {name: setting for name, setting in self.settings.items() if name not in gone}
        self.defaults = {name: value for name, value in self.defaults.items() if name not in gone}


@dataclass
class Steps:
    """Training steps as logged: arrays of one length; NaN where a line did not say. A very long log is thinned evenly
    (one line in ``thinned`` is kept); its first and last line are always there."""

    step: np.ndarray  # int64
    loss: np.ndarray  # float64, nats
    ms: np.ndarray  # float64, milliseconds per optimizer step
    mfu: np.ndarray  # float64, as printed, in percent
    tokens_per_second: np.ndarray  # float64, as printed
    lr: np.ndarray  # float64
    line: np.ndarray  # int64, line in the file
    thinned: int = 1

    def __len__(self) -> int:
        return len(self.step)


@dataclass
class Evals:
    """Evaluations as logged: arrays of one length; ``train`` is NaN where only validation was logged."""

    step: np.ndarray  # int64
    train: np.ndarray  # float64, nats
    val: np.ndarray  # float64, nats
    line: np.ndarray  # int64

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True)
class Note:
    """A line of a log that is neither step nor evaluation and says something.

    ``kind``: "parameters" (value: count), "tokens_per_step" (value), "no_decay" (tensors without weight decay),
    "sm_gate", "oom", "nan", "resume", "checkpoint", "device" (value: name), "precision" (value: fastgpt's, as it is in
    force), "traceback", "no_cuda", "no_triton", "no_bf16", "vocab" (value), "override" (value: (name, value)).
    """

    kind: str
    place: Place
    text: str
    value: Any = None


LogKind = Literal["nanogpt", "nanochat", "llm.c", "fastgpt", "unknown"]


@dataclass
class LogFacts:
    """A run's log."""

    kind: LogKind
    file: str
    steps: Steps
    evals: Evals
    notes: list[Note] = field(default_factory=list)
    lines: int = 0
    """Lines in the file."""
    unread: list[Unread] = field(default_factory=list)
    config: ConfigFacts | None = None
    """The config that the log repeats (nanoGPT prints it, metrics.jsonl begins with it)."""

    def place(self, line: int) -> Place:
        return Place(self.file, int(line))

    def all(self, kind: str) -> list[Note]:
        return [note for note in self.notes if note.kind == kind]


@dataclass
class CheckpointFacts:
    """A checkpoint, from its metadata and tensor shapes; ``shape`` under nanoGPT's names (n_layer, n_head, ...)."""

    kind: Literal["nanogpt", "fastgpt"]
    file: str
    shape: dict[str, Any]
    step: int | None = None
    best_val_loss: float | None = None
    parameters: int | None = None
    """Counted from the tensors, excluding position embeddings; a tied head counts once."""
    config: ConfigFacts | None = None
    """The config stored in it."""
    unread: list[Unread] = field(default_factory=list)


@dataclass
class Evidence:
    """Everything that the user gave; None for what was not given."""

    config: ConfigFacts | None = None
    log: LogFacts | None = None
    checkpoint: CheckpointFacts | None = None
    unread: list[Unread] = field(default_factory=list)
    """Files that lay in a folder that was given, and were not read."""


# ---------------------------------------------------------------- values that a run can have

RANGES: dict[str, tuple[float, float]] = {
    "n_layer": (1, 10_000),
    "n_head": (1, 10_000),
    "n_embd": (1, 1_000_000),
    "block_size": (1, 100_000_000),
    "vocab_size": (1, 100_000_000),
    "batch_size": (1, 1_000_000),
    "gradient_accumulation_steps": (1, 10_000_000),
    "world_size": (1, 1_000_000),
    "max_iters": (0, 10**12),
    "lr_decay_iters": (0, 10**12),
    "warmup_iters": (0, 10**12),
    "eval_interval": (0, 10**12),
    "eval_iters": (0, 10**12),
    "log_interval": (0, 10**12),
    "learning_rate": (0.0, 1e3),
    "min_lr": (0.0, 1e3),
    "dropout": (0.0, 1.0),
    "beta1": (0.0, 1.0),
    "beta2": (0.0, 1.0),
    "weight_decay": (0.0, 1e6),
}
"""Lowest and highest value of a setting. Bounds that are ints are those of whole numbers."""


def possible(name: str, value: Any) -> bool:
    """Whether a run could have this value."""
    if name not in RANGES:
        return True
    low, high = RANGES[name]
    number = isinstance(value, int if isinstance(low, int) else (int, float)) and not isinstance(value, bool)
    return number and low <= value <= high  # NaN is in no range


def clean(config: ConfigFacts) -> tuple[ConfigFacts, Seen]:
    """The config without impossible values, and what those were. The default does not hold for them either."""
    wrong = {name for name, setting in config.settings.items() if not possible(name, setting.value)}
    kept = replace(config)
    kept.forget(wrong)
    settings = [(name, config.settings[name]) for name in sorted(wrong)]
    return kept, [(s.place, f"{name} = {s.value!r}: no run can have this") for name, s in settings]
