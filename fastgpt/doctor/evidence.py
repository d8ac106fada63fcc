"""What the doctor knows about a run: plain values, each with the file and line it comes from. Nothing is read here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

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


def seen_as_json(seen: Seen) -> list[dict[str, Any]]:
    return [{"file": place.file, "line": place.line, "text": text} for place, text in seen]


Source = Literal["log", "override", "config", "checkpoint", "data", "known", "default", "assumption"]
"""Where a value comes from. data: files of the run's data set, or --corpus-tokens. known: what its name settles, as the size of
nanoGPT's own data sets or the shape of published weights. default: what the program takes for a setting that is not there.
assumption: nothing that was given says it."""


@dataclass(frozen=True)
class Setting:
    """One value of a config. ``text`` is its line as written, ``comment`` what follows the # on it."""

    value: Any
    place: Place
    text: str = ""
    comment: str = ""
    source: Source = "config"


@dataclass(frozen=True)
class Unread:
    """Something that could not be read, and why, in one sentence."""

    place: Place
    text: str
    why: str


@dataclass
class ConfigFacts:
    """A run's settings under nanoGPT's names (learning_rate, batch_size, gradient_accumulation_steps, ...), whatever
    they were read from, with values that a run can have; later settings win, as in nanoGPT: file, then overrides."""

    kind: Literal["nanogpt", "fastgpt"]
    settings: dict[str, Setting] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What the program takes for a name that is not set."""
    comments: list[Setting] = field(default_factory=list)
    """Every other comment line, its text in ``comment``: claims ("~125M parameters") are made in prose."""
    unread: list[Unread] = field(default_factory=list)
    unread_shapes: list[str] = field(default_factory=list)
    """Names that the program does not have, set to something that describes a model and could not be read."""
    foreign: list[str] = field(default_factory=list)
    """Names set that the program does not have: a fork's, whose other defaults may differ, too."""
    foreign_model: list[str] = field(default_factory=list)
    """Those of them that may change the model."""
    asked: set[str] = field(default_factory=set, compare=False, repr=False)
    """Every name that ``get`` was asked for: what a finding rests on (figures.Figures.weighed)."""

    def get(self, name: str, default: Any = None) -> Any:
        """The value set, else the program's default, else ``default``."""
        self.asked.add(name)
        found = self.settings.get(name)
        return found.value if found else self.defaults.get(name, default)

    def is_set(self, name: str) -> bool:
        return name in self.settings

    def source(self, name: str) -> Source | None:
        """Where ``get(name)`` is from; None for a name that has no value."""
        found = self.settings.get(name)
        return found.source if found else "default" if name in self.defaults else None

    def forget(self, names: Iterable[str]) -> None:
        """Drop names whose line could not be read: neither an earlier value nor the default holds for them."""
        gone = set(names)
        self.settings = {name: setting for name, setting in self.settings.items() if name not in gone}
        self.defaults = {name: value for name, value in self.defaults.items() if name not in gone}


Rows = TypeVar("Rows", bound="Series")


class Series:
    """What Steps and Evals share: a row for each of the log's lines, in columns of one length."""

    step: np.ndarray
    line: np.ndarray

    def __len__(self) -> int:
        return len(self.step)

    def where(self: Rows, rows: Any) -> Rows:
        """Some of the rows: a mask, indices or a slice."""
        return type(self)(*(column[rows] for column in vars(self).values()))


@dataclass
class Steps(Series):
    """Training steps as logged: arrays of one length; NaN where a line did not say."""

    step: np.ndarray  # int64
    loss: np.ndarray  # float64, nats
    ms: np.ndarray  # float64, milliseconds per optimizer step
    mfu: np.ndarray  # float64, as printed, in percent
    tokens_per_second: np.ndarray  # float64, as printed
    lr: np.ndarray  # float64
    grad_norm: np.ndarray  # float64, before clipping
    line: np.ndarray  # int64, line in the file

    def text(self, row: int) -> str:
        return f"step {self.step[row]}: loss {self.loss[row]:.4f}"


@dataclass
class Evals(Series):
    """Evaluations as logged: arrays of one length; ``train`` is NaN where only validation was logged."""

    step: np.ndarray  # int64
    train: np.ndarray  # float64, nats
    val: np.ndarray  # float64, nats
    line: np.ndarray  # int64

    def text(self, row: int) -> str:
        train = f"train {self.train[row]:.4f}, " if np.isfinite(self.train[row]) else ""
        return f"step {self.step[row]}: {train}val {self.val[row]:.4f}"


@dataclass(frozen=True)
class Note:
    """A line of a log that is neither step nor evaluation and says something.

    ``kind``: "parameters" (value: count), "tokens_per_step" (value), "no_decay" (tensors without weight decay),
    "sm_gate", "oom", "nan", "resume", "checkpoint", "device" (value: name), "cpu" (the device is one),
    "corpus_tokens" (value), "precision" (value: fastgpt's, as it is in force), "traceback", "exception" (the line
    that ends one), "no_cuda", "no_triton", "no_compiler", "no_bf16", "vocab" (value), "override" (value: (name,
    value)), "bits_per_byte" (value), "flops_per_token" (value), "gpus" (value: how many), "micro_batch" and
    "micro_batch_of_rank" (value: tokens).
    """

    kind: str
    place: Place
    text: str
    value: Any = None


@dataclass
class LogFacts:
    """A run's log."""

    kind: str
    """Whose it is: a table of reading/log_formats.toml, or "unknown"."""
    file: str
    steps: Steps
    evals: Evals
    notes: list[Note] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)
    config: ConfigFacts | None = None
    """The config that the log repeats (nanoGPT prints it, metrics.jsonl begins with it)."""
    step_like: int = 0
    """Lines that look like steps and could not be read."""

    def place(self, line: int) -> Place:
        return Place(self.file, int(line))

    def seen(self, series: Steps | Evals, row: int) -> tuple[Place, str]:
        """A row as evidence."""
        return self.place(series.line[row]), series.text(row)

    def first_mfu(self) -> tuple[Place, str]:
        """The first step with an mfu, as evidence. There has to be one."""
        row = int(np.flatnonzero(self.steps.mfu > 0)[0])
        return self.place(self.steps.line[row]), f"mfu {self.steps.mfu[row]:.2f}% at {self.steps.ms[row]:,.0f} ms"

    @property
    def last_line(self) -> int:
        """That of the last step or evaluation; 0 without any."""
        return max((int(series.line[-1]) for series in (self.steps, self.evals) if len(series)), default=0)

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
    not_finite: list[str] = field(default_factory=list)
    """Tensors of the model that hold NaN or infinity."""
    unread: list[Unread] = field(default_factory=list)


@dataclass(frozen=True)
class Machine:
    """What the doctor knows of a machine."""

    platform: str = "linux"
    """sys.platform."""
    torch: str | None = None
    """Its version."""
    cuda: bool = False
    """torch sees a CUDA GPU."""
    triton: bool = False
    """Triton is installed."""
    nvidia_driver: bool = False


@dataclass
class Evidence:
    """Everything that the user gave; None for what was not given."""

    config: ConfigFacts | None = None
    log: LogFacts | None = None
    checkpoint: CheckpointFacts | None = None
    unread: list[Unread] = field(default_factory=list)
    """Files that lay in a folder that was given, and were not read."""
    machine: Machine | None = None
    """The machine that the run is to start on."""
    data_vocabulary: int | None = None
    """As the meta.pkl beside the run's data says it."""

    def said(self, kind: str) -> Any:
        """The last value that the log's notes of a kind give; None if there is none."""
        values = [note.value for note in self.log.all(kind) if note.value] if self.log else []
        return values[-1] if values else None
