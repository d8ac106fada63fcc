"""What a run leaves for others to look at: metrics.jsonl, TensorBoard events, Weights & Biases. One writer, on rank 0.

metrics.jsonl has one JSON object per line. The first names the run; then comes one per optimizer step (loss, lr, grad_norm;
every log interval also speed and memory), one per evaluation, and one per event. Lines are appended and flushed, so a crash
costs at most the last one, and a resumed run first drops what lies past its checkpoint: every step is there exactly once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastgpt.checkpoints.folder import METRICS
from fastgpt.common import UserError, first_line, open_file, write_whole
from fastgpt.config import Config

LONGEST_LINE = 1 << 20
"""Bytes; a longer line is cut, and then is no record."""


class Metrics:
    """The metrics of run ``run_id`` in folder ``out``, from ``step`` (steps done) on. ``wandb``: what ``connect_wandb`` made.

    Raises UserError for a folder that cannot be written, and for one whose metrics are another run's.
    """

    def __init__(self, out: Path, run_id: str, step: int, config: Config, wandb: Any = None) -> None:
        path = out / METRICS
        try:
            out.mkdir(parents=True, exist_ok=True)
            if step and path.exists():
                _drop_after(path, run_id, step)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (``close`` closes it)
        except OSError as error:
            raise UserError(f"out is {out}, which cannot be written ({error.strerror}): name another folder") from error
        if self._file.tell() == 0:
            self.write({"run": run_id, "config": config.to_dict()})
        self._board = _tensorboard(out, step) if config.train.tensorboard else None
        self._wandb = wandb

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; numbers of a record with a "step" go to TensorBoard and W&B as well."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if "step" not in record:
            return
        step = record["step"]
        numbers = {k: v for k, v in record.items() if k != "step" and isinstance(v, (int, float))}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


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


def _drop_after(path: Path, run_id: str, step: int) -> None:
    """Leave the records up to ``step``: its run goes on from there and will write the others again."""
    records = read(path)
    owner = next((record["run"] for record in records if "run" in record), run_id)
    if owner != run_id:
        raise UserError(
            f"{path} belongs to another run ({owner}, the checkpoint is of {run_id}): move it away, or name another --out"
        )
    write_whole(path, "".join(json.dumps(record) + "\n" for record in records if record.get("step", 0) <= step))


def _tensorboard(out: Path, step: int) -> Any:
    """A SummaryWriter, or None where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)


def connect_wandb(config: Config, run_id: str) -> Any:
    """A W&B run. Raises UserError where the package is not installed, or does not get through."""
    try:
        import wandb

        return wandb.init(
            project=config.train.wandb, name=config.train.out.name, id=run_id, resume="allow", config=config.to_dict()
        )
    except ImportError as error:
        raise UserError(
            f"wandb is {config.train.wandb!r} but the package is not installed: pip install wandb"
        ) from error
    except Exception as error:  # no key, no network: the package has classes of its own for each
        raise UserError(
            f"wandb is {config.train.wandb!r}, which cannot be reached ({first_line(error)}): see `wandb login`"
        ) from error
