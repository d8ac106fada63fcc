"""What a run leaves for others to look at: metrics.jsonl, TensorBoard events, Weights & Biases, its configuration and
environment. One writer, on rank 0; none of it is worth the run (outlets.py).

metrics.jsonl has one JSON object per line. The first names the run; then comes one per optimizer step (loss, lr, grad_norm;
every log interval also speed and memory), one per evaluation, and one per event. A crash costs at most the last one. A
checkpoint knows how far the file had come, and a run that goes on from it first drops what follows: every step and every
event is there exactly once.
"""

from __future__ import annotations

import io
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgpt.checkpoints import METRICS
from fastgpt.common import UserError, first_line, open_file, shortened, write_whole
from fastgpt.config import Config
from fastgpt.training.outlets import Appended, Outlet

LONGEST_LINE = 1 << 20
"""Bytes; a longer line is cut, and then is no record."""


class Metrics:
    """The metrics of run ``run_id`` in folder ``out``, from ``step`` (steps done) on. ``wandb``: what ``connect_wandb`` made.

    Raises UserError for a folder that cannot be written, and for one whose metrics are another run's. Later nothing is raised:
    ``news`` gets a sentence.
    """

    def __init__(
        self,
        out: Path,
        run_id: str,
        step: int,
        config: Config,
        wandb: Any = None,
        *,
        kept: int | None = None,
        environment: Mapping[str, Any] | None = None,
        news: list[str] | None = None,
    ) -> None:
        """``kept``: the ``size`` of metrics.jsonl when the checkpoint of ``step`` was made. ``environment``: what
        environment.json will hold."""
        self.news: list[str] = [] if news is None else news
        self._out, self._run_id, self._config = out, run_id, config
        self._files = {"config.json": config.to_dict(), "environment.json": environment or {}}
        path = out / METRICS
        for taken in (*self._files, METRICS):
            if (out / taken).is_dir():
                raise UserError(f"out is {out}, in which {taken} is a folder: name another folder")
        if (out / "tensorboard").is_file():
            raise UserError(f"out is {out}, in which tensorboard is a file: name another folder")
        try:
            if step and path.exists():
                _drop_after(path, run_id, step, kept)
            self._log = Appended(path, self._begin, self.news)
            self._board = _tensorboard(out / "tensorboard", step, self.news) if config.train.tensorboard else None
        except OSError as error:
            raise UserError(f"out is {out}, which cannot be written ({error.strerror}): name another folder") from error
        self._log.write(b"")
        self._describe()
        self._wandb = wandb
        self._sending = Outlet("Weights & Biases", self.news, caught=Exception)

    def _begin(self) -> bytes:
        return _line({"run": self._run_id, "config": self._config.to_dict()})

    def _describe(self) -> None:
        for name, content in self._files.items():
            path = self._out / name
            Outlet(str(path), self.news, self._out).take(
                path.write_text, json.dumps(content, indent=1) + "\n", encoding="utf-8"
            )

    @property
    def size(self) -> int:
        """Bytes of metrics.jsonl so far."""
        return self._log.size

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; numbers of a record with a "step" go to TensorBoard and W&B as well."""
        path, gone = self._log.path, None
        if not os.path.exists(path):  # False where a file system does not answer, too; pathlib would raise
            gone = path if os.path.isdir(self._out) else self._out
        self._log.write(_line(record))
        if gone is not None and os.path.exists(path):
            self.news.append(f"{gone} was deleted or moved away while the run went on: it is begun anew")
            self._describe()
        if "step" not in record:
            return
        step = record["step"]
        numbers = {k: v for k, v in record.items() if k != "step" and isinstance(v, (int, float))}
        if self._board is not None:
            self._board.write(
                _event(step=step, summary={"value": [{"tag": k, "simple_value": v} for k, v in numbers.items()]})
            )
        if self._wandb is not None:
            self._sending.take(self._wandb.log, {**numbers, "step": step})

    def close(self) -> None:
        self._log.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._sending.take(self._wandb.finish)


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, given itself or its run's folder. A last line cut short by a crash is left out.

    Raises UserError for a file that is missing or no metrics file.
    """
    path = path / METRICS if path.is_dir() else path
    records = []
    try:
        with open_file(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
                try:
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError
                except (ValueError, RecursionError) as error:
                    if not file.read(1):
                        break
                    raise UserError(f"metrics file {path} is damaged: line {number} is not a JSON object") from error
                records.append(record)
    except OSError as error:
        raise UserError(f"metrics file {path} cannot be read ({error.strerror})") from error
    return records


def _drop_after(path: Path, run_id: str, step: int, kept: int | None) -> None:
    """Leave the first ``kept`` bytes, which the checkpoint of ``step`` has seen, and of what follows the records up to that
    step: its run goes on from there and will write the others again."""
    records, content = read(path), path.read_bytes()
    owner = next((record["run"] for record in records if "run" in record), run_id)
    if owner != run_id:
        raise UserError(
            f"{path} belongs to another run ({owner}, the checkpoint is of {run_id}): move it away, or name another --out"
        )
    if not isinstance(kept, int) or content[kept - 1 : kept] != b"\n":  # an older checkpoint, or a file begun anew
        kept = 0
    seen = content[:kept].count(b"\n")
    later = []
    for number, record in enumerate(records[seen:], seen + 1):
        at = record.get("step", record.get("at_step", 0))
        if not isinstance(at, (int, float)):
            raise UserError(f"metrics file {path} is damaged: line {number} is of step {shortened(repr(at))}")
        if at <= step and not (kept and "event" in record):
            later.append(_line(record))
    write_whole(path, b"".join([content[:kept], *later]).decode())


def _event(**fields: Any) -> bytes:
    """One event of TensorBoard, as it stands in its files."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    RecordWriter(buffer).write(Event(wall_time=time.time(), **fields).SerializeToString())
    return buffer.getvalue()


def _tensorboard(folder: Path, step: int, news: list[str]) -> Appended | None:
    """A file of TensorBoard events, which replace those after ``step`` of earlier ones; None where tensorboard is not
    installed. (Its own writer works in a thread, which ends when the disk is full, with a traceback.)"""
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        return None

    def head() -> bytes:
        start = _event(step=step + 1, session_log={"status": 1}) if step else b""  # SessionLog.START
        return _event(file_version="brain.Event:2") + start

    name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
    return Appended(folder / name, head, news)


def connect_wandb(config: Config, run_id: str) -> Any:
    """The W&B run of this id, which a checkpoint keeps: a resumed run goes on in it. Raises UserError where the package is not
    installed, or does not get through."""
    try:
        import wandb

        run = wandb.init(
            project=config.train.wandb, name=config.train.out.name, id=run_id, resume="allow", config=config.to_dict()
        )
        # W&B's own count never goes back, and what is logged for an earlier step is dropped: after a resume, a rollback.
        run.define_metric("*", step_metric="step")
        return run
    except ImportError as error:
        raise UserError(
            f"wandb is {config.train.wandb!r} but the package is not installed: pip install wandb"
        ) from error
    except Exception as error:  # no key, no network: the package has classes of its own for each
        raise UserError(
            f"wandb is {config.train.wandb!r}, which cannot be reached ({first_line(error)}): see `wandb login`"
        ) from error
